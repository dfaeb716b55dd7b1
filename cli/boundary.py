"""The one place where errors become messages and exit codes."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from dwakd_plugin.errors import UserError


@contextmanager
def error_boundary() -> Iterator[None]:
    """Ends the process with a message and an exit code where a user can put the error right."""
    try:
        yield
    except (UserError, OSError) as error:
        # Of the file system's own errors those that name a file: too long a name, no permission.
        if "--debug" in sys.argv or (isinstance(error, OSError) and error.filename is None):
            raise
        if isinstance(error, OSError):
            error = UserError(f"{error.filename}: {error.strerror}.")
        from dwakd_cli.console import PlainConsole

        # Unbroken lines: a command in a message can be copied.
        PlainConsole(stderr=True).print(f"Error: {error}", style="red", soft_wrap=True)
        sys.exit(1)
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        sys.exit(130)
