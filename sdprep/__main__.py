"""`python -m sdprep`: the same as the console script."""

from sdprep.cli import main

if __name__ == "__main__":
    main()
