"""Looking at a tree: its content as arrays, every invariant, a drawing, a file."""
