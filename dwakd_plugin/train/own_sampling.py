"""What samples the student's own answers: transformers from itself, or vLLM from a copy of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from transformers import GenerationConfig

from dwakd_plugin.errors import UserError
from dwakd_plugin.models.causal_lm import causal_lm
from dwakd_plugin.models.sampling import Generator, Sampling, with_transformers
from dwakd_plugin.models.vllm import AT_ONCE as AT_ONCE_VLLM
from dwakd_plugin.models.vllm import HeldByVLLM, is_installed
from dwakd_plugin.models.whole_weights import whole_weights, why_not_whole
from dwakd_plugin.recipe.blocks import OwnAnswersConfig

AT_ONCE = 64  # answers that transformers samples together at most
_PROBE = 8  # tokens of a text that both sides continue, and of the continuation
_KEY = "dwakd.own_answers"


def backend_of(own: OwnAnswersConfig, student: Any) -> Literal["transformers", "vllm"]:
    """What samples in a run. Raises UserError where the recipe asks for what cannot be."""
    problem = None if is_installed() else "vLLM isn't installed"
    problem = problem or why_not_whole(student)
    if own.backend == "vllm" and problem is not None:
        raise UserError(
            f"{_KEY}.backend: vllm cannot hold this student, as {problem}. Remove the key, and "
            "transformers samples."
        )
    if own.backend == "auto" and problem is None and causal_lm(student).device.type == "cpu":
        problem = "the student is on a CPU"
    if own.backend != "transformers" and problem is None:
        return "vllm"
    if own.refresh_every > 1:
        raise UserError(
            f"{_KEY}.refresh_every is {own.refresh_every}, which is for vLLM and its copy of the "
            f"student, and here transformers samples from the student as it is, as {problem}. Set "
            f"it to 1, or see that vLLM can sample ({_KEY}.backend: vllm)."
        )
    return "transformers"


class FromItself:
    """Samples with transformers, from the student as it is in each step."""

    at_once = AT_ONCE

    def __init__(self, own: OwnAnswersConfig) -> None:
        self._sampling = Sampling(own.temperature, own.top_p, own.max_new_tokens)

    @contextmanager
    def generator(self, student: Any, stop: Sequence[int], step: int) -> Iterator[Generator]:
        """Generates up to `stop`, without dropout, and without what the model's own generation
        settings do to probabilities. `step` is how many optimizer steps are done."""
        lm, training = causal_lm(student), student.training
        settings = lm.generation_config
        lm.generation_config = GenerationConfig(use_cache=True)
        student.eval()
        try:
            yield with_transformers(lm, self._sampling, stop)
        finally:
            lm.generation_config = settings
            student.train(training)

    def saved(self) -> None:
        """Hears that there is a checkpoint of the student as it is now."""


class FromCopy:
    """Samples with vLLM, which is handed the student's weights each `refresh_every` steps.

    And after each checkpoint, so that a run which goes on from it samples from the same weights.
    """

    at_once = AT_ONCE_VLLM

    def __init__(
        self, own: OwnAnswersConfig, student: Any, dtype: torch.dtype, longest: int, processes: int
    ) -> None:
        """dtype: that the student computes in. longest: tokens of a prompt with its answer.

        Raises UserError where vLLM cannot hold the student, or answers with other probabilities.
        """
        self._own = own
        self._sampling = Sampling(own.temperature, own.top_p, own.max_new_tokens)
        longest = max(longest, 2 * _PROBE)
        self._held = HeldByVLLM(causal_lm(student), dtype, longest, own.vllm_memory, processes)
        self._fresh_at: int | None = None  # the step of the weights that it has
        self._hand_over(student)
        _check_same(self._held, student, whole=dtype == torch.float32)

    @contextmanager
    def generator(self, student: Any, stop: Sequence[int], step: int) -> Iterator[Generator]:
        """As `FromItself` has it, but from the student of up to `refresh_every` - 1 steps ago."""
        due = step - (step - self._own.start_after) % self._own.refresh_every
        if self._fresh_at is None or self._fresh_at < due:
            self._hand_over(student)
            self._fresh_at = step
        yield self._held.generator(self._sampling, stop)

    def saved(self) -> None:
        """Hears that there is a checkpoint of the student as it is now."""
        self._fresh_at = None

    def _hand_over(self, student: Any) -> None:
        self._held.hand_over(whole_weights(student, untied=self._held.unties))


@torch.no_grad()
def _check_same(held: HeldByVLLM, student: Any, *, whole: bool) -> None:
    """Raises UserError where a copy that was just handed the weights is another model.

    Both continue random tokens: it takes the likeliest, and the student has to find them as likely.
    `whole`: that both compute in float32.
    """
    lm = causal_lm(student)
    rows, numbers = lm.get_input_embeddings().weight.shape[0], torch.Generator().manual_seed(0)
    ids = torch.randint(rows, (_PROBE,), generator=numbers)
    (sample,) = held.generator(Sampling(0.0), [], scored=True)([ids.tolist()], [(0, 0)], _PROBE)
    read = torch.cat((ids, torch.tensor(sample.tokens))).to(lm.device)
    training = student.training
    student.eval()
    try:
        logits = lm(input_ids=read.unsqueeze(0)).logits[0, len(ids) - 1 : -1]
    finally:
        student.train(training)
    found = logits.float().log_softmax(-1)
    own = found.gather(-1, read[len(ids) :].unsqueeze(-1)).squeeze(-1)
    assert sample.log_probability is not None
    apart = abs(sample.log_probability - float(own.sum())) / len(own)
    behind = float((found.max(-1).values - own).max())
    if max(apart, behind) > (0.01 if whole else 0.5):  # nats; half precision rounds otherwise
        raise UserError(
            f"vLLM answers with other probabilities than the student, of the same weights: "
            f"{type(lm).__name__} has another form there, by {apart:.2g} nats a token. Set "
            f"{_KEY}.backend: transformers."
        )
