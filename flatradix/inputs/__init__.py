"""Reading the arguments of callers: checked, and as memory that a kernel can read."""
