"""`python -m anchored` is the `anchored` command."""

from anchored.cli import main

if __name__ == "__main__":
    main()
