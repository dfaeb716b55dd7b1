"""What is compared: methods with the settings that each may be tuned over, ablations, switches.

Every method gets as many trials on dev, up to three, and SFT, which has nothing but its learning
rate, one more. The first trial of each is its own paper's settings, or this project's defaults;
GOLD's, whose defaults leave the labels out, has them.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from benchmarks.quality.materials import Materials
from benchmarks.quality.runs import Run, dataset
from dwakd_plugin.recipe.schema import VARIANTS

Settings = dict[str, Any]

HEADLINE = ("sft", "mapped")
METHODS = (*HEADLINE, "dwakd", "uld", "gold", "dskd", "dskdv2", "dwakdv2")
LEARNING_RATES = (7.5e-5, 1.5e-4, 3e-4, 6e-4)  # SFT's four trials; the others start from its best

_WARMED = {"projectors": {"warmup_steps": 100}}
# As on `benchmarks.small_pair`: labels lead, and the ramp leaves little of the student-space term.
_TEACHER_SPACE: Settings = {
    "loss": {"ce_weight": 1.0, "temperature": 1.0, "kd_warmup_steps": 2500}
} | _WARMED
_BOTH_SPACES = {"loss": {"ce_weight": 1.0, "temperature": 1.0}} | _WARMED  # the same, no ramp
_ORDERED: Settings = {"matching": "order", "dtw_weight": 0.0, "temperature": 1.0}
_MAPPED: Settings = VARIANTS["mapped"]["loss"]
# A recipe for `quality.gold`, which puts GOLD's loss in the place of ULD's term.
GOLD: Settings = {"loss": {**_ORDERED, "ce_weight": 0.0, "kd_weight": 1.0}}
# Keys of GOLDConfig, by the trial's name. Labels beside the teacher, which alone does not say where
# a response ends; and each distribution in the place of the token that it predicts.
GOLD_TRIALS: dict[str, Settings] = {
    "labels": {
        "uld_use_hybrid_loss": True,
        "uld_crossentropy_weight": 1.0,
        "uld_token_merge_strategy": "bayesian",
    },
    "hybrid": {"uld_use_hybrid_loss": True},
    "default": {},
}
_TRIALS: dict[str, list[tuple[str, Settings, float]]] = {
    # name, what is laid over the variant, and the learning rate as a multiple of SFT's best
    "uld": [
        ("paper", {"variant": "uld"}, 1),
        ("dskd_authors", {"loss": {**_ORDERED, "ce_weight": 0.5, "kd_weight": 0.5}}, 1),
        ("dskd_authors-faster", {"loss": {**_ORDERED, "ce_weight": 0.5, "kd_weight": 0.5}}, 2),
    ],
    "gold": [(name, GOLD, 1) for name in GOLD_TRIALS],
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
# What else a term can be, one switch of `loss` at a time, over a method's tuned settings.
SWITCHES: dict[str, dict[str, Settings]] = {
    "dwakd": {
        "gate outside": {"student_weighting": "entropy_then_gate"},
        "hidden state as value": {"attention_value": "hidden"},
        "both": {"student_weighting": "entropy_then_gate", "attention_value": "hidden"},
        "no soft-DTW": {"dtw_weight": 0.0},
        "soft-DTW x 50": {"dtw_weight": 10.0},
    },
    "mapped": {
        "token weights": {"student_weighting": "entropy_gate"},
        "token weights, gate outside": {"student_weighting": "entropy_then_gate"},
        "label inside tokens": {"inside_tokens": "label"},
        "ramp over 20 steps": {"kd_warmup_steps": 20},
        "cosine of hidden states": {"cosine_weight": 1.0},
        "cosine of hidden states x 3": {"cosine_weight": 3.0},
        "soft-DTW": {"dtw_weight": 0.2},
        "soft-DTW x 50": {"dtw_weight": 10.0},
    },
}

Train = Callable[[list[Run]], list[float]]
"""Trains runs and returns their bits per byte on dev."""


def tune_sft(train: Train, rates: Sequence[float]) -> Run:
    """Fine-tuning at the best of these learning rates, on dev."""
    trials = [Run(f"tune-sft-{lr:g}", {"variant": "sft"}, lr) for lr in rates]
    return _best(trials, train(trials))


def tune(names: Sequence[str], rate: float, train: Train, count: int = 3) -> dict[str, Run]:
    """The best of each method's first `count` trials on dev; `rate` is SFT's best."""
    trials = {
        method: [
            Run(
                f"tune-{method}-{name}",
                copy.deepcopy(settings),
                times * rate,
                gold=GOLD_TRIALS[name] if method == "gold" else None,
            )
            for name, settings, times in _TRIALS[method][:count]
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
    runs = [replace(tuned, name=f"{name}-seed{seed}", seed=seed) for seed in range(1, seeds + 1)]
    return [tuned, *runs[1:]] if tuned.name else runs  # which was trained under the first seed


def more_rows(
    base: Materials, sft: Run, times: Sequence[float], seeds: int
) -> dict[str, list[Run]]:
    """Fine-tuning alone on so many times the rows, in as many epochs."""
    return {
        f"sft, {count} rows": with_seeds(
            f"sft{count}",
            replace(sft, name="", recipe={"datasets": [dataset(base.first_rows(count))]}),
            seeds,
        )
        for count in (round(each * base.train_rows) for each in times)
    }


def ablations(tuned: dict[str, Run], seeds: int) -> dict[str, list[Run]]:
    """DWA-KD's tuned settings, as another variant of the paper's Table 3 each, beside SFT."""
    best = tuned["dwakd"]
    groups = {"sft": with_seeds("sft", tuned["sft"], seeds)}
    for variant in (*ABLATIONS, "paper"):
        run = replace(best, name="", dwakd={**best.dwakd, "variant": variant})
        # One that is a tuned method goes by its runs, not by new ones.
        same = [m for m, one in tuned.items() if replace(one, name="") == run]
        groups[variant] = (
            with_seeds(same[0], tuned[same[0]], seeds)
            if same
            else with_seeds(f"ablation-{variant}", run, seeds)
        )
    return groups


def switches(tuned: dict[str, Run], seeds: int) -> dict[str, list[Run]]:
    """Each of SWITCHES, beside the settings that it changes and SFT."""
    groups = {}
    for method in ("sft", *SWITCHES):
        groups[method] = with_seeds(method, tuned[method], seeds)
        for name, loss in SWITCHES.get(method, {}).items():
            changed = copy.deepcopy(tuned[method].dwakd)
            changed["loss"] = {**changed.get("loss", {}), **loss}
            run = replace(tuned[method], name="", dwakd=changed)
            folder = re.sub(r"\W+", "-", f"switch {method} {name}")
            groups[f"{method}, {name}"] = with_seeds(folder, run, seeds)
    return groups
