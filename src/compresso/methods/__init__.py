"""One file a published method. Modules here are found by name: dropping in a file registers its stages."""
