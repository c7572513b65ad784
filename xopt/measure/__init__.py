"""Latency and accuracy on this machine, and the peers beside it."""
