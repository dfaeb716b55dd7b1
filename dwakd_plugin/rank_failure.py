"""How a process of a run ends on an error that the user can put right: said once, by one rank."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import NoReturn

# Set by `dwakd train`: the file in which it waits for the message, to say it and to end the run.
MESSAGE_FILE = "DWAKD_MESSAGE_FILE"
PATIENCE = 60.0  # seconds


def end_run(message: str) -> NoReturn:
    """Says why the run ends, and ends this process with code 1.

    Under `dwakd train` the first rank to fail leaves the message for it, and all wait to be ended:
    a launcher whose worker exits by itself would answer with a traceback of its own.
    """
    file = os.environ.get(MESSAGE_FILE)
    if file is None:
        from axolotl.utils.logging import get_logger

        get_logger("axolotl.dwakd").error("dwakd: %s", message, main_process_only=False)
        raise SystemExit(1)
    partial = Path(f"{file}.{os.getpid()}")
    partial.write_text(message, encoding="utf-8")
    try:
        os.link(partial, file)  # whole, and the first one's
    except FileExistsError:
        pass
    finally:
        partial.unlink()
    time.sleep(PATIENCE)
    raise SystemExit(1)
