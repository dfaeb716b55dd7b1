"""Whether distillation does anything: warnings, in words, from the figures that a run logs.

`Health` takes the figures of one log line after another and says what is wrong with them, and what
to try. It knows nothing of trainers and models.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from dwakd_plugin.io.files import replace_file
from dwakd_plugin.loss import names_of, projects_labels, variant_of
from dwakd_plugin.recipe.schema import DWAKDConfig, ProjectorConfig

HEALTH_FILE = Path("dwakd") / "health.json"  # within the output folder

# What is judged is the mean of the last lines, of so many steps and so many lines at least. In 50
# steps Adam moves a weight by up to 50 learning rates: at the default 1e-3 by more than the weights
# of random projectors are. Three lines are the least that has a noise.
WINDOW_STEPS = 50
WINDOW_LINES = 3

# Of the way from chance to always right. Words alone, without their places, stay below chance; what
# a window of some thousand tokens strays by is less.
CHANCE_MARGIN = 0.02
# Of log T, what a student token's place says about where it looks (the mutual information). A
# diagonal has nearly all of it; none is left where all tokens look everywhere, or at one place.
INFORMATION_SHARE = 0.1
WIDE_SHARE = 0.5  # of log T, the entropy that tells these two apart: of 100 tokens, 10
FEWEST_POSITIONS = 4  # with fewer to look at on average, looking says nothing either way
# As where `dwakd check` stops calling a pair workable by its identical spans.
FEWEST_PAIRED = 0.25
# A term that is four fifths of the loss leaves the labels to steer by what is left of the gradient.
DTW_SHARE = 0.8
KD_SHARE = 0.01  # a hundredth of the loss is below what its other terms stray by from step to step
WANTED_SHARE = 0.2  # of the loss, for the weight that is proposed in either case
# Two responses have different end tokens, and a teacher may pay a nat for one that it never saw.
TEACHER_MARGIN = 1.05
# So ends are allowed that nat. A teacher that has not learnt where such responses end pays several.
END_MARGIN = 1.0
# Of the share of sampled answers that end. Of fifteen answers, a first line's, nine in ten end with
# a standard deviation of 0.08; a window has more answers, and less noise.
ENDED_DROP = 0.2
# Soft-DTW is flat where in so many windows no mean was lower than the first by three times its
# noise. Three, as there are many windows to look at.
FLAT_WINDOWS = 4
FLAT_NOISE = 3.0

DTW = names_of("warp")

DEFAULT_RATE: float = ProjectorConfig.model_fields["learning_rate"].default

Figures = Mapping[str, float]


@dataclass
class Alarm:
    """A warning of a run: from when on, in what words (its latest figures), and until when."""

    name: str
    since: int
    message: str
    until: int | None = None


@dataclass
class Health:
    """A run's warnings so far.

    settled_after   the step until which projectors are not expected to know anything: warm-up of
                    the learning rate, or of the student-space term
    cold_start      whether the projectors began untrained, so that soft-DTW has a way to go
    """

    config: DWAKDConfig
    settled_after: int = 0
    cold_start: bool = True
    step: int = 0  # of the last line
    alarms: list[Alarm] = field(default_factory=list)
    _lines: list[tuple[int, Figures]] = field(default_factory=list)
    _well_since: dict[str, int] = field(default_factory=dict)
    _first_dtw: dict[str, tuple[float, float]] | None = None  # mean and noise, of the first window
    _first_window_at: int = 0
    _dtw_fell: bool = False
    _first_ended: float | None = None  # share of the student's own answers, in their first line

    def observe(self, step: int, figures: Figures) -> list[str]:
        """Takes the figures of one log line; returns the warnings that are new with it.

        Figures are means since the line before. Of training: those of the variant's record
        (`loss.variants`), `epoch`, `chance` (the share of the most frequent label),
        `attention_spread` and `attention_limit` (nats per token), `kd_share` and `dtw_share` (see
        `shares`). Of evaluation:
        `eval_teacher_ce`, `eval_paired_ce`, `eval_teacher_end_ce` and `eval_end_ce`. One that is
        missing is not judged. Of own answers: `own_ended`. What several teachers' own figures are
        called, `metrics.means` says.
        """
        self.step = step
        if any(name.startswith("eval_") for name in figures):
            own = {name.removeprefix("eval_"): value for name, value in figures.items()}
            judged = self._of_each_teacher(own, _teacher) if step >= WINDOW_STEPS else {}
        else:
            self._lines.append((step, figures))
            if self._first_ended is None:
                self._first_ended = figures.get("own_ended")
            judged = self._judge_window()
        return [
            message
            for name, message in judged.items()
            if self._note(step, name, message) and message is not None
        ]

    @property
    def standing(self) -> list[str]:
        """The warnings that stand, in their latest words."""
        return [alarm.message for alarm in self.alarms if alarm.until is None]

    def report(self) -> dict[str, Any]:
        """All that was found, for `write_report`."""
        return {"step": self.step, "warnings": [asdict(alarm) for alarm in self.alarms]}

    def _note(self, step: int, name: str, message: str | None) -> bool:
        """Keeps what was found under a name, None where it is well; says whether it is new."""
        standing = next((a for a in self.alarms if a.name == name and a.until is None), None)
        if message is None:
            # Figures about a threshold would warn each time; a few good lines do for one window.
            if standing and step - self._well_since.setdefault(name, step) >= 2 * WINDOW_STEPS:
                standing.until = step
                del self._well_since[name]
            return False
        self._well_since.pop(name, None)
        if standing:
            standing.message = message
            return False
        self.alarms.append(Alarm(name, step, message))
        return True

    def _judge_window(self) -> dict[str, str | None]:
        """Each warning's words, or None where all is well; nothing of what cannot be told yet."""
        for count in range(WINDOW_LINES + 1, len(self._lines) + 1):
            if self.step - self._lines[-count][0] >= WINDOW_STEPS:
                break
        else:
            return {}
        self._lines = self._lines[-count:]
        start, window = self._lines[0][0], [figures for _, figures in self._lines[1:]]
        common = set.intersection(*(set(figures) for figures in window))
        mean = {name: fmean(figures[name] for figures in window) for name in common}
        judged = {
            "dtw_dominates": self._dtw_dominates(mean),
            "kd_negligible": self._kd_negligible(mean),
            "own_answers_unend": self._own_answers_unend(mean),
        }
        judged |= self._of_each_teacher(mean, self._few_pairs)
        if window[-1].get("epoch", 0.0) <= 1:  # after that the student knows the rows by heart
            judged |= self._of_each_teacher(mean, _teacher)
        if start >= self.settled_after and projects_labels(self.config.loss):
            judged["t2s_at_chance"] = self._t2s_at_chance(mean)
            judged["gate_low"] = self._gate_low(mean)
            judged |= self._attention(mean)
        if self.cold_start and all(name in mean for name in DTW):
            judged |= self._dtw_flat(window)
        return judged

    def _of_each_teacher(
        self, mean: Figures, judge: Callable[[Figures], dict[str, str | None]]
    ) -> dict[str, str | None]:
        """What is judged of a teacher, of each: where there are several, by its own figures."""
        if len(self.config.teachers) < 2:
            return judge(mean)
        judged = {}
        for teacher in self.config.teachers:
            whose = f"{teacher.name}/"
            own = {
                name.removeprefix(whose): value
                for name, value in mean.items()
                if name.startswith(whose)
            }
            for name, words in judge(own).items():
                said = None if words is None else f"Of teacher `{teacher.name}`: {words}"
                judged[whose + name] = said
        return judged

    # -- one warning each: its words, or None -----------------------------------------------------

    def _t2s_at_chance(self, mean: Figures) -> str | None:
        if not {"t2s_accuracy", "chance"} <= mean.keys():
            return None
        accuracy, chance = mean["t2s_accuracy"], mean["chance"]
        if accuracy > chance + CHANCE_MARGIN * (1 - chance):
            return None
        random = self.config.projectors.init == "random"
        start = "start from dwakd.projectors.init: auto, or " if random else ""
        return (
            f"The projected teacher is right at {accuracy:.1%} of the tokens (t2s_accuracy), and "
            f"always guessing the most frequent one would be at {chance:.1%}: there is nothing to "
            f"learn from it. Either {start}{self._warm_up()}, or {self._higher_rate()}."
        )

    def _gate_low(self, mean: Figures) -> str | None:
        if not {"gate", "chance"} <= mean.keys() or mean["gate"] > mean["chance"]:
            return None
        return (
            f"The projected teacher is unsure everywhere: its first choice has a probability of "
            f"{mean['gate']:.2%} on average (gate), less than the most frequent token has by "
            f"itself ({mean['chance']:.2%}). The student-space term then teaches the student to be "
            f"as unsure. Let it wait (dwakd.loss.kd_warmup_steps: {max(200, 2 * self.step)}), or "
            f"{self._warm_up()}."
        )

    def _attention(self, mean: Figures) -> dict[str, str | None]:
        names = ("attention_entropy", "attention_spread", "attention_limit")
        if not all(name in mean for name in names):
            return {}
        entropy, spread, limit = (mean[name] for name in names)
        if limit < math.log(FEWEST_POSITIONS):
            return {}
        uniform = collapsed = None
        alike = spread - entropy < INFORMATION_SHARE * limit
        if alike and entropy > WIDE_SHARE * limit:
            uniform = (
                "The attention looks at the teacher's tokens alike, whichever student token asks "
                f"(attention_entropy {entropy:.2f} nats of at most {limit:.2f}): all of them learn "
                "from the same mean state. Start from dwakd.projectors.init: shared_vocab, or "
                f"{self._warm_up()}; `dwakd align` shows a row."
            )
        elif alike:
            collapsed = (
                f"All student tokens look at the same few tokens of the teacher "
                f"(attention_entropy {entropy:.2f} nats, and {spread:.2f} for a whole row's mean): "
                "where a token stands makes no difference. Lower dwakd.projectors.learning_rate "
                f"(now {self.config.projectors.learning_rate:g}) to "
                f"{self.config.projectors.learning_rate / 3:.1g}, and start again from "
                "dwakd.projectors.init: shared_vocab; `dwakd align` shows a row."
            )
        return {"attention_uniform": uniform, "attention_collapsed": collapsed}

    def _few_pairs(self, mean: Figures) -> dict[str, str | None]:
        share = mean.get("paired_share", 1.0) + mean.get("spelt_share", 0.0)  # both are taught
        if variant_of(self.config.loss).match.rows is None or share >= FEWEST_PAIRED:
            return {"few_pairs": None}
        words = (
            f"Only {share:.0%} of the student's tokens have a teacher's token of the same bytes to "
            "learn from (paired_share); the others learn from the labels alone. Use the attention "
            "instead (dwakd.variant: paper), or another teacher: `dwakd check` compares tokenizers."
        )
        return {"few_pairs": words}

    def _dtw_dominates(self, mean: Figures) -> str | None:
        share = mean.get("dtw_share", 0.0)
        if share <= DTW_SHARE:
            return None
        weight = self.config.loss.dtw_weight
        return (
            f"Soft-DTW is {share:.0%} of the loss: labels and distillation hardly count beside it. "
            f"Lower dwakd.loss.dtw_weight (now {weight:g}) to {_weight_for(weight, share)}."
        )

    def _kd_negligible(self, mean: Figures) -> str | None:
        share, weight = mean.get("kd_share", 1.0), self.config.loss.kd_weight
        if weight == 0 or share >= KD_SHARE:
            return None
        return (
            f"Distillation is {share:.2%} of the loss: this is fine-tuning on the labels in all "
            f"but name. Raise dwakd.loss.kd_weight (now {weight:g}) to "
            f"{_weight_for(weight, share)}, or train without a teacher."
        )

    def _own_answers_unend(self, mean: Figures) -> str | None:
        own = self.config.own_answers
        if own is None or self._first_ended is None or "own_ended" not in mean:
            return None
        if mean["own_ended"] > self._first_ended - ENDED_DROP:
            return None
        return (
            f"The student's own answers unlearn to end: {mean['own_ended']:.0%} of them end by "
            f"themselves (own_ended), and {self._first_ended:.0%} did at first. The teacher sees "
            "no end behind text that makes no sense to it, so this student doesn't write well "
            "enough yet. Let it learn from given answers for longer "
            f"(dwakd.own_answers.start_after, now {own.start_after}), or alone (share: 0)."
        )

    def _dtw_flat(self, window: Sequence[Figures]) -> dict[str, str | None]:
        now = {}
        for name in DTW:
            values = [figures[name] for figures in window]
            now[name] = fmean(values), stdev(values) / math.sqrt(len(values))
        if self._first_dtw is None:
            self._first_dtw, self._first_window_at = now, self.step
        self._dtw_fell |= any(
            now[name][0] < first - FLAT_NOISE * math.hypot(noise, now[name][1])
            for name, (first, noise) in self._first_dtw.items()
        )
        if self._dtw_fell:
            return {"dtw_flat": None}
        if self.step < max(self._first_window_at, self.settled_after) + FLAT_WINDOWS * WINDOW_STEPS:
            return {}
        was = ", ".join(
            f"{name} {first:.3f} then, {now[name][0]:.3f} now"
            for name, (first, _) in self._first_dtw.items()
        )
        weight = self.config.loss.dtw_weight
        message = (
            f"Soft-DTW has not come down since the first steps ({was}): it draws nothing together. "
            f"Raise dwakd.loss.dtw_weight (now {weight:g}) to {3 * weight:.2g}, or "
            f"{self._higher_rate()}, or save its time (dwakd.loss.dtw_weight: 0)."
        )
        return {"dtw_flat": message}

    # -- what to try ------------------------------------------------------------------------------

    def _warm_up(self) -> str:
        steps = max(250, 2 * self.config.projectors.warmup_steps)
        return f"warm the projectors up (dwakd.projectors.warmup_steps: {steps}, or `dwakd warmup`)"

    def _higher_rate(self) -> str:
        rate = self.config.projectors.learning_rate
        higher = max(DEFAULT_RATE, 3 * rate)
        return f"raise dwakd.projectors.learning_rate (now {rate:g}) to {higher:.1g}"


def _teacher(mean: Figures) -> dict[str, str | None]:
    """What is judged in training and evaluation alike."""
    return {"teacher_worse": _teacher_worse(mean), "teacher_misses_ends": _misses_ends(mean)}


def _misses_ends(mean: Figures) -> str | None:
    if not {"teacher_end_ce", "end_ce"} <= mean.keys():
        return None
    teacher, student = mean["teacher_end_ce"], mean["end_ce"]
    if teacher <= student + END_MARGIN:
        return None
    return (
        "The teacher does not know where these responses end: the last token of one costs it "
        f"{teacher:.2f} nats, and the student {student:.2f}. It teaches the student to go on, and "
        "other habits of its own. Fine-tune the teacher on the data first "
        "(dwakd.teacher.adapter takes its LoRA), and look whether both sides end a response alike: "
        "dwakd.teacher.chat_template, and `dwakd check` for the end tokens."
    )


def _teacher_worse(mean: Figures) -> str | None:
    if not {"teacher_ce", "paired_ce"} <= mean.keys():
        return None
    teacher, student = mean["teacher_ce"], mean["paired_ce"]
    if teacher <= TEACHER_MARGIN * student:
        return None
    return (
        f"The teacher is worse at these responses than the student: {teacher:.2f} nats per student "
        f"token (teacher_ce) against {student:.2f}. Fine-tune the teacher on the data first "
        "(dwakd.teacher.adapter takes its LoRA), look whether dwakd.teacher.chat_template is its "
        "own, or take another; `dwakd evaluate` gives both models' bits per byte."
    )


def _weight_for(weight: float, share: float) -> str:
    """The weight that would make a term `WANTED_SHARE` of the loss, others as they are."""
    share = min(max(share, 1e-6), 1 - 1e-6)
    return f"{weight * WANTED_SHARE / (1 - WANTED_SHARE) * (1 - share) / share:.1g}"


def shares(weighted: Figures) -> dict[str, float]:
    """Shares of the loss from its terms, each times its weight: `kd_share` and `dtw_share`.

    kd_share counts what teaches the student but for soft-DTW; t2s_ce, which trains projectors, is
    of the rest.
    Normalised soft-DTW may be a little below 0, and counts as 0 then.
    """
    parts = {name: max(0.0, value) for name, value in weighted.items()}
    whole = sum(parts.values())
    if whole == 0:
        return {}
    return {
        "kd_share": sum(parts.get(name, 0.0) for name in names_of("teach", "hidden")) / whole,
        "dtw_share": sum(parts.get(name, 0.0) for name in DTW) / whole,
    }


def write_report(health: Health, folder: Path) -> None:
    """Writes what was found to the output folder. Raises OSError."""
    file = folder / HEALTH_FILE
    file.parent.mkdir(parents=True, exist_ok=True)
    replace_file(file, json.dumps(health.report(), indent=1))


def standing_in(folder: Path) -> list[str]:
    """The warnings that stood at the end of the run in an output folder; none without a report."""
    file = folder / HEALTH_FILE
    if not file.is_file():
        return []
    warnings = json.loads(file.read_text(encoding="utf-8"))["warnings"]
    return [warning["message"] for warning in warnings if warning["until"] is None]
