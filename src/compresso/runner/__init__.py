"""From a recipe to a checkpoint: recipes read and checked, dry runs, stages run and saved, results written."""
