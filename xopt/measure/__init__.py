"""Latency and accuracy, and the peers side by side."""
