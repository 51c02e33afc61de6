"""`python -m kvq`, the same as the command `kvq`."""

from kvq.cli import main

if __name__ == "__main__":
    main()
