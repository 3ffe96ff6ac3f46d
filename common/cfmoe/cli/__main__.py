"""python -m cfmoe.cli: the command without its script."""

from cfmoe.cli.app import main

main()
