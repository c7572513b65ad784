"""What wins back the accuracy that a lossy pass lost."""
