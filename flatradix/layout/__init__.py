"""The ground floor: what host code and kernels both know. It imports nothing of flatradix and holds no messages."""
