"""What is compared: methods with the settings that each may be tuned over, ablations, and levers.

Every method gets three trials on dev, and SFT, which has nothing but its learning rate, four. The
first trial of each is its own paper's settings, or this project's defaults.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from benchmarks.quality.materials import Materials
from benchmarks.quality.runs import EPOCHS, Run, dataset
from dwakd_plugin.io.files import replace_file
from dwakd_plugin.recipe.schema import VARIANTS

Settings = dict[str, Any]

HEADLINE = ("sft", "dskd", "dwakd", "mapped")
METHODS = (*HEADLINE, "dskdv2", "dwakdv2", "uld")
LEARNING_RATES = (7.5e-5, 1.5e-4, 3e-4, 6e-4)  # SFT's four trials; the others start from its best

FEWER = 4

_WARMED = {"projectors": {"warmup_steps": 100}}
# As on `benchmarks.small_pair`: labels lead, and the ramp leaves little of the student-space term.
_TEACHER_SPACE: Settings = {
    "loss": {"ce_weight": 1.0, "temperature": 1.0, "kd_warmup_steps": 2500}
} | _WARMED
_BOTH_SPACES = {"loss": {"ce_weight": 1.0, "temperature": 1.0}} | _WARMED  # the same, no ramp
_ORDERED: Settings = {"matching": "order", "dtw_weight": 0.0, "temperature": 1.0}
_MAPPED: Settings = VARIANTS["mapped"]["loss"]
_TRIALS: dict[str, list[tuple[str, Settings, float]]] = {
    # name, what is laid over the variant, and the learning rate as a multiple of SFT's best
    "uld": [
        ("paper", {"variant": "uld"}, 1),
        ("dskd_authors", {"loss": {**_ORDERED, "ce_weight": 0.5, "kd_weight": 0.5}}, 1),
        ("dskd_authors-faster", {"loss": {**_ORDERED, "ce_weight": 0.5, "kd_weight": 0.5}}, 2),
    ],
    "mapped": [
        ("default", {"variant": "mapped"}, 1),
        ("default-faster", {"variant": "mapped"}, 2),
        ("half", {"loss": {**_MAPPED, "ce_weight": 0.5, "kd_weight": 0.5}}, 2),
    ],
    **{
        method: [
            (name, {"variant": "paper" if method == "dwakd" else method} | settings, 1)
            for name, settings in (
                ("paper", {}),
                ("teacher_space", _TEACHER_SPACE),
                ("both_spaces", _BOTH_SPACES),
            )
        ]
        for method in ("dskd", "dwakd", "dskdv2", "dwakdv2")
    },
}
# The paper's Table 3 between DSKD and DWA-KD, at DWA-KD's tuned settings.
ABLATIONS = ("dskd", "dskd_weights", "dskd_dtw", "dskd_banded_dtw", "no_gate")
# What `teacher_space` changes of DWA-KD's paper settings, one at a time.
LEVERS: dict[str, Settings] = {
    "labels": {"loss": {"ce_weight": 1.0}},
    "temperature": {"loss": {"temperature": 1.0}},
    "ramp": {"loss": {"kd_warmup_steps": 2500}},
    "warmed": _WARMED,
}


Train = Callable[[list[Run]], list[float]]
"""Trains runs and returns their bits per byte on dev."""


def tune_sft(train: Train, rates: Sequence[float]) -> Run:
    """Fine-tuning at the best of these learning rates, on dev."""
    trials = [Run(f"tune-sft-{lr:g}", {"variant": "sft"}, lr) for lr in rates]
    return _best(trials, train(trials))


def tune(names: Sequence[str], rate: float, train: Train) -> dict[str, Run]:
    """The best of each method's three trials on dev; `rate` is SFT's best."""
    trials = {
        method: [
            Run(f"tune-{method}-{name}", copy.deepcopy(settings), times * rate)
            for name, settings, times in _TRIALS[method]
        ]
        for method in names
    }
    together = [run for runs in trials.values() for run in runs]
    # All methods' at once: there is more to do side by side.
    bits = dict(zip((run.name for run in together), train(together), strict=True))
    return {
        method: _best(runs, [bits[run.name] for run in runs]) for method, runs in trials.items()
    }


def _best(runs: list[Run], bits: list[float]) -> Run:
    return min(zip(bits, runs, strict=True), key=lambda pair: pair[0])[1]


def with_seeds(name: str, tuned: Run, seeds: int) -> list[Run]:
    """The tuned settings of a method under the training seeds 1 to `seeds`."""
    runs = [
        Run(f"{name}-seed{seed}", tuned.dwakd, tuned.learning_rate, seed, tuned.recipe)
        for seed in range(1, seeds + 1)
    ]
    return [tuned, *runs[1:]] if tuned.name else runs  # which was trained under the first seed


def few_rows(base: Materials, tuned: dict[str, Run], seeds: int) -> dict[str, list[Run]]:
    """As many steps on a quarter of the rows: four epochs, in which fine-tuning alone overfits."""
    few = base.rows("few")
    if not few.is_file():
        lines = base.rows("train").read_text(encoding="utf-8").splitlines(keepends=True)
        replace_file(few, "".join(lines[: len(lines) // FEWER]))
    recipe = {"datasets": [dataset(few)], "num_epochs": FEWER * EPOCHS}
    return {
        method: with_seeds(f"few-{method}", replace(best, name="", recipe=recipe), seeds)
        for method, best in tuned.items()
        if method in HEADLINE
    }


def ablations(tuned: dict[str, Run], seeds: int) -> dict[str, list[Run]]:
    """DWA-KD's tuned settings, as another variant of the paper's Table 3 each, beside SFT."""
    best = tuned["dwakd"]
    rows = {
        variant: replace(best, name="", dwakd={**best.dwakd, "variant": variant})
        for variant in (*ABLATIONS, "paper")
    }
    return _beside_sft("ablation", rows, tuned, seeds)


def levers(tuned: dict[str, Run], seeds: int) -> dict[str, list[Run]]:
    """DWA-KD at the paper's settings, with each of its levers alone, and with all, beside SFT."""
    rows = {
        lever: replace(
            tuned["sft"], name=name, dwakd={"variant": "paper"} | copy.deepcopy(settings)
        )
        for lever, name, settings in (
            ("none", "tune-dwakd-paper", {}),
            *((lever, "", own) for lever, own in LEVERS.items()),
            ("all", "tune-dwakd-teacher_space", _TEACHER_SPACE),
        )
    }
    return _beside_sft("lever", rows, tuned, seeds)


def _beside_sft(
    kind: str, rows: dict[str, Run], tuned: dict[str, Run], seeds: int
) -> dict[str, list[Run]]:
    """Each row under every seed; one that is a tuned method goes by its runs, not by new ones."""
    groups = {"sft": with_seeds("sft", tuned["sft"], seeds)}
    for name, run in rows.items():
        same = [m for m, best in tuned.items() if replace(best, name=run.name) == run]
        groups[name] = (
            with_seeds(same[0], tuned[same[0]], seeds)
            if same
            else with_seeds(f"{kind}-{name}", run, seeds)
        )
    return groups
