"""What is said of a pair of tokenizers: findings, and whether it is fit for distillation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from dwakd_plugin.tokenizers.pair import ByteCutter

# Thresholds: docs/checking_a_pair.md says why.
GOOD = {"length_ratio": 1.5, "boundary_agreement": 0.8, "identical_span_share": 0.7}
WORKABLE = {"length_ratio": 2.5, "boundary_agreement": 0.4, "identical_span_share": 0.25}

Severity = Literal["info", "warning", "problem"]
Verdict = Literal["good", "workable", "poor"]


class Finding(NamedTuple):
    """Something to know about a pair: a stable code, how much it matters, and what to do."""

    code: str
    severity: Severity
    message: str


class Side(NamedTuple):
    """One of the two tokenizers. `head_rows`: the model's `vocab_size`, where it is known.

    `refused`: the class that its config names, where that cuts texts differently from its own file.
    """

    role: Literal["teacher", "student"]
    tokenizer: Any
    cutter: ByteCutter
    head_rows: int | None
    refused: str | None = None


def verdict_of(
    figures: Mapping[str, Any], findings: Sequence[Finding]
) -> tuple[Verdict, list[str]]:
    """`good`, `workable` or `poor`, and why it is not better; thresholds: GOOD and WORKABLE.

    figures: TextFigures.as_dict(). A finding of severity `problem` makes the verdict poor.
    """
    problems = [finding.code for finding in findings if finding.severity == "problem"]
    if figures["length_ratio"] is None:
        return "poor", ["no text could be compared", *problems]
    ratio = figures["length_ratio"]["mean"]
    agreement = min(figures["boundary_agreement_student"], figures["boundary_agreement_teacher"])
    identical = figures["identical_span_share"]

    def short_of(bar: Mapping[str, float]) -> list[str]:
        reasons = []
        if not 1 / bar["length_ratio"] <= ratio <= bar["length_ratio"]:
            reasons.append(
                f"the student has {ratio:.2f} times the teacher's tokens (between "
                f"{1 / bar['length_ratio']:.2f} and {bar['length_ratio']:.2f} wanted)"
            )
        if agreement < bar["boundary_agreement"]:
            reasons.append(
                f"{agreement:.0%} of one side's tokens end where one of the other ends "
                f"({bar['boundary_agreement']:.0%} wanted)"
            )
        if identical < bar["identical_span_share"]:
            reasons.append(
                f"{identical:.0%} of the student's tokens are also tokens of the teacher in place "
                f"({bar['identical_span_share']:.0%} wanted)"
            )
        return reasons

    if reasons := [*problems, *short_of(WORKABLE)]:
        return "poor", reasons
    if reasons := short_of(GOOD):
        return "workable", reasons
    return "good", []
