"""A teacher that a server holds: what it says of rows, asked for ahead of need."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from itertools import count
from typing import Any

from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dwakd_plugin.errors import UserError
from dwakd_plugin.loss import TopTokens
from dwakd_plugin.models.teacher.server import Refused, Server
from dwakd_plugin.models.teacher.server_answers import Left, TokenTexts, Unreadable, top_tokens
from dwakd_plugin.models.teacher.server_check import find_way
from dwakd_plugin.models.teacher.top_tokens import to_bits
from dwakd_plugin.recipe.schema import TeacherConfig

WAIT = 0.5  # seconds between two looks at whether to stop waiting


class Stopped(UserError):
    """Whoever waited for the server was asked to stop."""


class ServedTeacher:
    """Rows' `TopTokens` from the recipe's server, which has been found to be the teacher.

    `want` asks and does not wait; `taken` waits. Raises UserError (see `server_check`).
    """

    def __init__(
        self,
        config: TeacherConfig,
        tokenizer: Any,
        longest: int,
        say: Callable[[str], None] = print,
    ) -> None:
        self._tokenizer = tokenizer
        self._texts = TokenTexts(tokenizer)
        self.server = Server(config, say)
        self.way = find_way(self.server, config, tokenizer, self._texts, longest)
        self.left = Left(self.way.top_k)
        self.unasked = 0  # rows that no text stands for
        self._numbers = count()
        # Of each number: tokens, response positions, and what is to come.
        self._asked: dict[int, tuple[int, int, Future[TopTokens] | None]] = {}

    @property
    def vocabulary(self) -> int:
        """One more than the largest token id."""
        return self._texts.size

    def __str__(self) -> str:
        return (
            f"its {self.way.top_k} likeliest tokens from {self.server.address}, asked for by "
            f"{self.way}; nothing loaded"
        )

    def want(self, teacher_ids: Tensor, teacher_labels: Tensor) -> int:
        """Asks for a row, both (L,); the number to `take` it by."""
        number, future = next(self._numbers), None
        places = [place + 1 for place in teacher_labels[1:].ne(-100).nonzero().flatten().tolist()]
        prompt = self.way.prompt(teacher_ids.tolist(), self._tokenizer) if places else None
        if places and prompt is None:
            self.unasked += 1
        elif prompt is not None:
            future = self.server.submit(
                "/completions", self.way.body(prompt), partial(self._read, teacher_ids, places)
            )
        self._asked[number] = len(teacher_ids), len(places), future
        return number

    def take(self, number: int, stop: Callable[[], bool] = lambda: False) -> TopTokens:
        """What the server says at the response positions (T, k) of a wanted row, once.

        A row that no text stands for has no tokens there. Raises ServerGone where it has not
        answered for as long as the recipe says; Stopped where `stop` says so before; UserError
        where it refuses the row.
        """
        length, positions, future = self._asked.pop(number)
        if future is None:
            return top_tokens([None] * positions, self.way.top_k, self._texts.size)
        while True:
            try:
                return future.result(timeout=WAIT)
            except TimeoutError:
                if stop():
                    raise Stopped(f"Stopped while {self.server.name} did not answer.") from None
            except Refused as refused:
                raise UserError(f"{refused}\nThe row has {length:,} tokens.") from refused
            except Unreadable as error:
                raise UserError(f"{self.server.name} answers a row, and {error}.") from error

    def said(self, rows: Sequence[tuple[Tensor, Tensor]]) -> list[TopTokens]:
        """Of some rows, ids and labels (L,), what the server says; raises as `take` does."""
        return [self.take(number) for number in [self.want(*row) for row in rows]]

    def _read(self, ids: Tensor, places: list[int], answer: dict[str, Any]) -> TopTokens:
        rows = self.way.read(answer, ids.tolist(), self._texts, self.left)
        return top_tokens([rows[place] for place in places], self.way.top_k, self._texts.size)

    def lost(self) -> str | None:
        """What could not be asked or told so far, in words; None where all could."""
        words = []
        if self.unasked:
            words.append(
                f"{self.unasked:,} rows were not asked for: no text is cut into their tokens"
            )
        if self.left.unknown:
            words.append(
                f"{self.left.share:.1%} of the likeliest tokens came as texts of several tokens, "
                "and count as what lies outside of them"
            )
        return f"{self.server.name}: {'; '.join(words)}." if words else None

    def complete(self, batch: dict[str, Tensor], stop: Callable[[], bool] = lambda: False) -> None:
        """Puts `teacher_top` in place of a batch's `teacher_asked`, the numbers of its rows.

        Raises as `take` does.
        """
        asked = batch.pop("teacher_asked", None)
        if asked is not None:
            rows = [to_bits(self.take(number, stop)) for number in asked.tolist()]
            batch["teacher_top"] = pad_sequence(rows, batch_first=True).to(asked.device)
