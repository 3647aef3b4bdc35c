"""The console script: hands over to the command line and returns its exit code."""

from __future__ import annotations

import sys


def main() -> None:
    """Entry point of `timmy-dispatch` and `python -P -m bot`."""
    from bot.cli import run

    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
