"""What makes an operator fast: one file a kernel family."""
