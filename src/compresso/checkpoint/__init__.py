"""Reading models safely and writing folders that are either complete or not there."""
