"""The console script, also ``python -m nsa_verify.shell``: it starts before the heavy imports, and Ctrl-C is one word."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line."""
    try:
        from nsa_verify.shell.cli import cli
    except KeyboardInterrupt:
        sys.exit(130)
    cli()


if __name__ == "__main__":
    main()
