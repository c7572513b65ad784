"""Which passes are kept, and how strong: each is tried, measured, and kept, weakened or rolled back."""
