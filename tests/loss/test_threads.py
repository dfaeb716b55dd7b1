"""Compiled kernels on several threads."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator

import pytest
import torch

from dwakd_plugin.loss.threads import in_threads


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_results_come_in_order_from_as_many_threads_as_are_worth_it() -> None:
    used = set()

    def square(i: int) -> int:
        used.add(threading.get_ident())
        time.sleep(0.01)
        return i * i

    for worth, threads in ((0.5, 1), (1.9, 1), (9.0, 2)):
        used.clear()
        assert in_threads(square, 6, worth) == [0, 1, 4, 9, 16, 25]
        assert len(used) == threads
    assert in_threads(square, 0, 9.0) == []


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("bad", range(4))
def test_errors_are_raised(bad: int) -> None:
    def work(i: int) -> None:
        time.sleep(0.01)
        if i == bad:
            raise ValueError(f"number {i}")

    with pytest.raises(ValueError, match=f"number {bad}"):
        in_threads(work, 4, 9.0)
    assert in_threads(str, 2, 9.0) == ["0", "1"]


@pytest.mark.usefixtures("two_threads")
def test_a_forked_process_has_threads_of_its_own() -> None:
    in_threads(str, 2, 9.0)
    child = os.fork()
    if child == 0:  # no thread of the parent's waits for work here
        os._exit(0 if in_threads(str, 2, 9.0) == ["0", "1"] else 1)
    for _ in range(500):
        process, status = os.waitpid(child, os.WNOHANG)
        if process:
            break
        time.sleep(0.02)
    else:
        os.kill(child, 9)
        os.waitpid(child, 0)
        pytest.fail("the child waits for threads that it does not have")
    assert os.waitstatus_to_exitcode(status) == 0
