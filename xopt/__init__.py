"""xopt: an optimizing compiler for trained transformer models."""
