"""What a server that holds the teacher is asked: requests, tried again while they may succeed.

All requests run in one thread of their own, at most `server_requests` at once; what is asked beyond
them waits. The key comes from the environment alone, and is in no message.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

import httpx

from dwakd_plugin.errors import UserError
from dwakd_plugin.recipe.schema import TeacherConfig

KEY = "DWAKD_SERVER_KEY"  # where the key is, in the environment
PROMPTLY = 6.0  # seconds in which a server that is there answers at start-up
LONGEST_PAUSE = 30.0  # seconds between two tries
QUIET = 5.0  # seconds of silence that nobody is told of


Answer = TypeVar("Answer")


class Refused(UserError):
    """What a server says of a request that would fail again; `status` is HTTP's."""

    def __init__(self, message: str, status: int, words: str) -> None:
        super().__init__(message)
        self.status = status
        self.words = words


class ServerGone(UserError):
    """It has not answered for as long as anyone is to wait."""


class _Again(Exception):
    """A try that failed; the same one may succeed after a pause of `after` seconds."""

    def __init__(self, reason: str, status: int = 0, after: float | None = None) -> None:
        super().__init__(reason)
        self.status = status
        self.after = after


class Server:
    """An OpenAI-compatible server at the recipe's address; see the module."""

    def __init__(self, config: TeacherConfig, say: Callable[[str], None] = print) -> None:
        assert config.server is not None
        self.address = config.server.rstrip("/")
        self.patience = config.server_patience
        self._say = say
        self._key = server_key()
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        # It tells of every request, and a run has as many as rows.
        logging.getLogger("httpx").setLevel(logging.WARNING)
        self._client = httpx.AsyncClient(
            headers=headers,
            timeout=httpx.Timeout(self.patience / 2, connect=10, pool=None),
            limits=httpx.Limits(max_connections=config.server_requests),
        )
        self._places = asyncio.Semaphore(config.server_requests)
        self._random = random.Random()  # its own: the run's is seeded
        self._silent_since: float | None = None
        self._told = False
        self._loop = asyncio.new_event_loop()
        # Not waited for at the end of the process, whatever the server does.
        threading.Thread(target=self._loop.run_forever, daemon=True).start()

    @property
    def name(self) -> str:
        return f"The server {self.address} (dwakd.teacher.server)"

    def submit(
        self, path: str, body: dict[str, Any], read: Callable[[dict[str, Any]], Answer]
    ) -> Future[Answer]:
        """What `read` makes of the JSON that the server answers to a POST, which may be large.

        It raises what `read` does; `Refused`; `ServerGone` after the recipe's `server_patience`;
        UserError where the server answers no JSON.
        """

        async def asked() -> Answer:
            return read(await self._ask(path, body, self.patience))

        return asyncio.run_coroutine_threadsafe(asked(), self._loop)

    def ask(
        self, path: str, body: dict[str, Any] | None = None, *, form: bool = False
    ) -> dict[str, Any]:
        """The JSON of a POST, or of a GET without a body, with the patience of a start-up.

        form: the request's form may be none of the server's, and a 500 is then `Refused` too, as
        llama-cpp-python refuses one.
        """
        patience = min(PROMPTLY, self.patience)
        asked = self._ask(path, body, patience, form=form)
        return asyncio.run_coroutine_threadsafe(asked, self._loop).result()

    async def _ask(
        self, path: str, body: dict[str, Any] | None, patience: float, *, form: bool = False
    ) -> dict[str, Any]:
        async with self._places:
            begun, tries = time.monotonic(), 0
            while True:
                try:
                    answer = await self._try(path, body)
                except _Again as again:
                    if form and again.status == 500:
                        raise Refused(f"{self.name} {again}", 500, str(again)) from again
                    tries += 1
                    left = begun + patience - time.monotonic()
                    pause = self._pause(tries) if again.after is None else again.after
                    if left <= 0 or (again.after is not None and pause > left):
                        raise ServerGone(self._gone(str(again), patience)) from again
                    self._tell_of_silence(str(again), patience)
                    await asyncio.sleep(min(pause, left))
                else:
                    if self._told:
                        self._say(f"{self.name} answers again.")
                    self._silent_since, self._told = None, False
                    return answer

    def _pause(self, tries: int) -> float:
        """Seconds before the next try: they double, and differ between those that wait."""
        return min(LONGEST_PAUSE, 0.25 * 2**tries) * self._random.uniform(0.5, 1.0)

    def _tell_of_silence(self, reason: str, patience: float) -> None:
        now = time.monotonic()
        if self._silent_since is None:
            self._silent_since = now
        elif not self._told and now - self._silent_since > QUIET and patience > PROMPTLY:
            self._told = True
            self._say(f"{self.name} {reason}. Trying again for {patience:.0f} s.")

    def _gone(self, reason: str, patience: float) -> str:
        remedy = (
            "It takes fewer requests than it gets: lower dwakd.teacher.server_requests, or wait."
            if " 429" in reason
            else "Start it, or correct the address; it usually ends in /v1."
        )
        return f"{self.name} {reason}, for {patience:.0f} s. {remedy}"

    async def _try(self, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        method = "GET" if body is None else "POST"
        try:
            answer = await self._client.request(method, self.address + path, json=body)
        except httpx.TimeoutException as error:
            raise _Again(f"gives no answer in time ({type(error).__name__})") from error
        except httpx.TransportError as error:
            reason = str(error) or type(error).__name__
            raise _Again(f"cannot be reached: {self._without_key(reason)}") from error
        status = answer.status_code
        words = self._words(answer)
        if status in (408, 429) or status >= 500:
            raise _Again(f"answers {status} ({words})", status, _retry_after(answer))
        if status in (401, 403):
            given = f"the key in {KEY}" if self._key else f"no key, as {KEY} is not set"
            raise Refused(
                f"{self.name} refuses access ({status}: {words}). It was given {given}.",
                status,
                words,
            )
        if status != 200:
            raise Refused(f"{self.name} answers {status}: {words}", status, words)
        try:
            found = answer.json()
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise UserError(
                f"{self.name} answers {path} with no JSON object, so it isn't an OpenAI-compatible "
                f"server: {words}"
            )
        return found

    def _words(self, answer: httpx.Response) -> str:
        """What the server says of a request, in a line."""
        try:
            found: Any = answer.json()
        except ValueError:
            found = answer.text
        for key in ("error", "message", "detail"):
            if isinstance(found, dict) and found.get(key):
                found = found[key]
        return self._without_key(" ".join(str(found).split()))[:300] or "no words"

    def _without_key(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key else text


def server_key() -> str | None:
    """The key that the environment holds for the server. Raises UserError where it cannot be one.

    A name of our own: a server that a recipe names is not to get a key of another's.
    """
    key = os.environ.get(KEY, "").strip()
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise UserError(
            f"The environment's {KEY} has characters that no key has (white space, controls, "
            "letters beyond ASCII). Set it again."
        )
    return key or None


def _retry_after(answer: httpx.Response) -> float | None:
    """Seconds that the server asks to wait; None where it doesn't say."""
    asked = answer.headers.get("Retry-After", "")
    try:
        return max(0.0, float(asked))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(asked).timestamp() - time.time())
    except ValueError:
        return None
