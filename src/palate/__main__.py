"""`python -m palate` is the command `palate`."""

from palate.cli import main

if __name__ == "__main__":
    main()
