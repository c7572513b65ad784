"""The JSON and HTML reports."""
