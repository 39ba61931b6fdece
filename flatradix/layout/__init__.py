"""Definitions that host code and kernels share. They import nothing else of flatradix and hold no messages."""
