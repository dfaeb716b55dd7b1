"""The process `dwakd`, also as `python -m dwakd_cli`."""

from __future__ import annotations

import sys


def main() -> None:
    """Runs the command line, and stands by while it is being imported."""
    try:
        from dwakd_cli.main import main as run
    except KeyboardInterrupt:
        sys.exit(130)
    run()


if __name__ == "__main__":
    main()
