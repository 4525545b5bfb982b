"""What a task makes of an example: one file a task."""
