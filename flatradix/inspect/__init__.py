"""Inspection of a tree: its content as arrays, a check of its invariants, a drawing, and a file."""
