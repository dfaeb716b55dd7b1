"""A tokenising strategy that `datasets` pickles by a name, not with the tokenizers in it.

`datasets` pickles what it maps with: once to name the file of the mapped rows, and once for each
process that maps. transformers 5 keeps vocabulary and merges as Python objects too, which takes
seconds each time (of Qwen1.5's tokenizer `datasets.fingerprint.Hasher.hash` 3.3 of CPU time, and
`dill.dumps` 2.8). The processes are forked from this one, and hold the strategy already.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakValueDictionary

import multiprocess  # which `datasets` starts processes with
import numpy as np

_OF_TOKENS = ("input_ids", "attention_mask", "labels")  # how columns of token ids begin

_OF_THIS_PROCESS: WeakValueDictionary[str, NamedStrategy] = WeakValueDictionary()


class NamedStrategy:
    """Tokenises as `strategy` does.

    Its name tells all that the rows depend on: rows that were mapped under it are taken from
    `datasets`' own cache.
    """

    def __init__(self, strategy: Any, name: str) -> None:
        self.strategy = strategy
        self.name = name
        self.supports_batched = strategy.supports_batched
        self.filter_rows = strategy.filter_rows
        _OF_THIS_PROCESS[name] = self

    def tokenize_prompt(self, row: dict[str, Any]) -> dict[str, Any]:
        columns: dict[str, Any] = self.strategy.tokenize_prompt(row)
        return {name: _as_array(name, value) for name, value in columns.items()}

    def __reduce__(self) -> Any:
        if multiprocess.get_start_method() == "fork":
            return _of_this_process, (self.name,)
        return NamedStrategy, (self.strategy, self.name)


def _as_array(name: str, value: Any) -> Any:
    """A list of tokens as an array: `datasets` looks at each number of a list before it writes."""
    if not isinstance(value, list) or not name.removeprefix("teacher_").startswith(_OF_TOKENS):
        return value
    return np.array(value, dtype=None if value else np.int64)


def _of_this_process(name: str) -> NamedStrategy:
    return _OF_THIS_PROCESS[name]
