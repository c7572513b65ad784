"""Exporters' dialects rewritten into the canonical form."""
