"""Images and their labels: where they lie, how they are cropped, and the order in which they come."""
