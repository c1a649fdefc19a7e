"""`python -m tlt_cli`: the same as `tlt`."""

from tlt_cli.cli import main

if __name__ == "__main__":
    main()
