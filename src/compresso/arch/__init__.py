"""What can be removed from each architecture: one file an architecture."""
