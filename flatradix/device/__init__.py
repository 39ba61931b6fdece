"""The index on a GPU."""
