"""A process of its own that reads an export back: it starts while there is nothing yet to read."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from types import TracebackType
from typing import Any, Self

from dwakd_plugin.errors import UserError

# transformers imports them where they are installed, which takes seconds, and no export needs them:
# for drafts by an assistant, and for weights that were quantised by the other.
UNNEEDED = ("sklearn", "torchao")

_VERIFY = "from dwakd_plugin.export.verify import main; main()"
_LEAN = f"import sys; sys.modules.update(dict.fromkeys({UNNEEDED!r})); {_VERIFY}"


class NewProcess:
    """Imports what reading an export takes, and waits for one. Ends with the block at the latest.

    `lean` leaves out what only a model's own code may need.
    """

    def __init__(self, *, lean: bool = True) -> None:
        self._code = _LEAN if lean else _VERIFY

    def __enter__(self) -> Self:
        self._said = tempfile.TemporaryFile("w+", encoding="utf-8")
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-W", "ignore", "-c", self._code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
        )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.communicate()
        self._said.close()

    def verify(self, request: dict[str, Any]) -> dict[str, Any]:
        """What `verify.main` finds out, once. Raises UserError where the export cannot be used."""
        answer, _ = self._process.communicate(json.dumps(request))
        if self._process.returncode != 0:
            self._said.seek(0)
            end = "\n".join(f"  {line}" for line in self._said.read().strip().splitlines()[-8:])
            raise UserError(f"The export cannot be used, and was not kept:\n{end}")
        found: dict[str, Any] = json.loads(answer.splitlines()[-1])
        return found
