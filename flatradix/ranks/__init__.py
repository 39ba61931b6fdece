"""Several ranks that each keep a tree of their own: are the trees equal, and if not, since which call?"""
