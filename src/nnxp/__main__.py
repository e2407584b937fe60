"""`python -m nnxp` is `nnxp`."""

from nnxp.cli import main

if __name__ == "__main__":
    main()
