"""Replaying request traces through a tree, and what they come to: figures, tables, pictures."""
