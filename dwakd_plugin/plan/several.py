"""Several teachers side by side: each moment of a step with all of them, from the plans of each.

A step asks every teacher before any part of the loss is computed, one after another, and the parts'
gradients wait for one backward (`train.parts`). Every row is taken to have all teachers. Bytes.
"""

from __future__ import annotations

from collections.abc import Mapping

from dwakd_plugin.plan.moments import FILLING, LOGITS, STUDENT_BACKWARD, TEACHER, moments, said
from dwakd_plugin.plan.parts import Parts

WEIGHTS, WAITING = "teacher weights", "states that wait"


def moments_of_several(runs: Mapping[str, Parts]) -> dict[str, dict[str, float]]:
    """As `moments`, by the names of the teachers, each of which has a run of its own."""
    each = {name: moments(run) for name, run in runs.items()}
    states = {name: said(run) for name, run in runs.items()}
    held = {name: max(states[name], run.loss()[0]) for name, run in runs.items()}
    copies = {name: run.head_gradients() for name, run in runs.items()}
    throughout = {name: run.weights()[WEIGHTS] for name, run in runs.items()}
    waiting = sum(run.waiting_states() for run in runs.values())
    found: dict[str, dict[str, float]] = {}
    for place, (name, own) in enumerate(each.items()):
        before, behind = list(runs)[:place], list(runs)[place + 1 :]
        for moment, alone in own.items():
            parts = dict(alone)
            weights = dict(throughout)
            if moment == FILLING:  # before any live teacher is loaded
                weights = {other: throughout[other] * runs[other].cached for other in runs}
                weights[name] = parts[WEIGHTS]
            del parts[WEIGHTS]
            parts |= {f"{WEIGHTS} ({other})": size for other, size in weights.items()}
            if WAITING in parts:
                parts[WAITING] = waiting
            if moment == TEACHER:
                parts["teacher activations"] += sum(states[other] for other in before)
            elif moment == LOGITS:
                parts["gradients"] += sum(copies[other] for other in before)
                parts["loss"] += sum(held[other] for other in before)
                parts["loss"] += sum(states[other] for other in behind)
            elif moment == STUDENT_BACKWARD:
                parts["gradients"] += sum(copies[other] for other in runs if other != name)
            whose = f" ({name})" if moment in (TEACHER, LOGITS, FILLING) else ""
            known = found.get(moment + whose)
            if known is None or sum(known.values()) < sum(parts.values()):
                found[moment + whose] = parts
    return found


def assumptions_of(runs: Mapping[str, Parts]) -> tuple[str, ...]:
    """What holds of all once, and the rest with the name of the teacher that it holds of."""
    lists = [run.assumptions for run in runs.values()]
    shared = [text for text in lists[0] if all(text in own for own in lists)]
    own = [
        f"{name}: {text}"
        for name, run in runs.items()
        for text in run.assumptions
        if text not in shared
    ]
    return ("every row is taken to learn from all of the teachers", *shared, *own)
