"""`python -m tokcache`: the command line."""

from tokcache.cli import main

main()
