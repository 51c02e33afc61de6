"""The command `kvq`, also as `python -m kvq`.

It must not import rich or typer before it has looked for them: only the extra `cli` brings them.
"""

import sys

NEEDED = ("rich", "typer")
"""What the extra `cli` brings."""


def main() -> None:
    """Run the command line, or say in one line what it needs and exit with code 2."""
    try:
        from kvq.cli import main as run
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in NEEDED:
            raise
        sys.stderr.write("error: the command line needs the extra `cli`: pip install '.[cli]' in the checkout of kvq\n")
        sys.exit(2)
    run()


if __name__ == "__main__":
    main()
