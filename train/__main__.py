"""`python -m train` is `jpeft`."""

from train.cli import main

main()
