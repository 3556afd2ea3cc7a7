"""`python -m sdtrain`: the same as the console script."""

from sdtrain.cli import main

if __name__ == "__main__":
    main()
