"""The console script (``python -m nsa_verify.shell``), up before the heavy imports: Ctrl-C is never a traceback."""

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
