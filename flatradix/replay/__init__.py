"""Replaying request traces through a tree, and reporting the results: figures, tables, plots."""
