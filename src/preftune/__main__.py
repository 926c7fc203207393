"""`python -m preftune`."""

from preftune.cli import main

if __name__ == "__main__":
    main()
