"""Views, which turn the examples of a task into rows of a batch: one file for each task."""
