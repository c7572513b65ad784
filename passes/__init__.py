"""What changes the model: one file a pass."""
