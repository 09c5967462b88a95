"""The only code that changes a model: masks, shapes, adapters."""
