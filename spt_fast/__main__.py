"""`python -m spt_fast` is `spt-fast`."""

from spt_fast.cli import main

if __name__ == "__main__":
    main()
