"""Images and their labels: reading them from disk, cropping them, and ordering them into batches."""
