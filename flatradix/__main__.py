"""`python -m flatradix`."""

from flatradix.cli import main

main()
