"""The index in host memory."""
