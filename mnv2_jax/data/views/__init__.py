"""Views, which a task makes of examples: one file a task."""
