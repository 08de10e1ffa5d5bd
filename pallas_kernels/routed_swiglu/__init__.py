"""Each token through its own experts."""
