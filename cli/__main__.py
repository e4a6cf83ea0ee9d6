"""`python -m skynet.cli`: the same as the `skynet` command."""

from .main import main

main()
