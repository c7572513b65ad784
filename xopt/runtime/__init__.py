"""Sessions over compiled artifacts, and the reference execution."""
