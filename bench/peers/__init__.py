"""The other projects' caches that tests and benchmarks compare flatradix with. None is needed to use flatradix."""
