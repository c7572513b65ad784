"""The graph: import and export, canonical form, transformer structure, cost, FX view."""
