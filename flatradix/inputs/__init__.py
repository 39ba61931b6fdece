"""From what callers pass to what the operations take: checked, and as memory that a kernel can read."""
