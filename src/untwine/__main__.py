"""`python -m untwine` is the same as `untwine`."""

from untwine.cli import main

main()
