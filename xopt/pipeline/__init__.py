"""Passes, their manager, textual pipelines and instruments."""
