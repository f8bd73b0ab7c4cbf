"""What is trained: one file a task, one object in it, and nobody else compares its name."""
