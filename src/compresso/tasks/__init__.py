"""What a run trains and judges by, one file a task."""
