"""What a run says of itself at its start and at its end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dwakd_plugin.loss import variant_of
from dwakd_plugin.models.causal_lm import causal_lm, parameter_count, size
from dwakd_plugin.models.projectors import PROJECTOR_FILE
from dwakd_plugin.train.distillation import Distillation


def describe_run(cfg: Any, trainer: Any) -> str:
    """The block at the start: both models, both tokenizers, the rows, the projectors, the loss."""
    distillation: Distillation = trainer.distillation
    facts = distillation.facts
    config, teacher, rows = distillation.config, distillation.teacher, distillation.rows
    student = trainer.model
    lm = causal_lm(student)
    parts = [] if distillation.projectors is None else [*distillation.projectors.parameters()]
    projectors = sum(map(size, parts))
    # A submodule of what trains: under LoRA that is not the model itself.
    own = parameter_count(lm) - (projectors if lm is student else 0)
    trained = sum(size(p) for p in student.parameters() if p.requires_grad)
    trained -= sum(size(p) for p in parts if p.requires_grad)
    loss, dtw = config.loss, config.soft_dtw
    evaluated = len(trainer.eval_dataset) if trainer.eval_dataset is not None else 0
    lines = {
        **_teachers(distillation),
        "student": f"{cfg.base_model}: {_count(own)}, "
        f"{_count(trained)} trained ({cfg.adapter or 'full fine-tuning'}), "
        f"{str(lm.dtype).removeprefix('torch.')}, attention "
        f"{lm.config._attn_implementation}, on {student.device}",
        "tokenizers": _tokenizers(distillation),
        "rows": f"{len(trainer.train_dataset):,} to train on, {evaluated:,} to evaluate on; "
        + (f"packed into sequences of {cfg.sequence_len:,} tokens; " if cfg.sample_packing else "")
        + "; ".join(f"{count:,} {status}" for status, count in sorted(rows.counts.items())),
        "projectors": "none"
        if distillation.projectors is None
        else f"{_count(projectors)}, learning rate {config.projectors.learning_rate:g}, "
        f"{facts.initialisation}",
        "loss": f"{loss.ce_weight:g} CE + {loss.kd_weight:g} "
        f"{variant_of(loss).in_words.format(divergence=loss.divergence)}, "
        f"temperature {loss.temperature:g}) + {loss.dtw_weight:g} DTW (gamma {dtw.gamma_start:g} "
        f"to {dtw.gamma_end:g}, {'band' if dtw.band else 'no band'})"
        + (f" + {loss.cosine_weight:g} hidden cosine" if loss.cosine_weight > 0 else "")
        + f"; variant {config.variant}",
        "processes": facts.processes,
        **_caches(distillation),
    }
    own = config.own_answers
    if own is not None and distillation.own_answers is not None:
        lines["own answers"] = (
            f"for {own.share:g} of the rows after step {own.start_after}, at most "
            f"{own.max_new_tokens} tokens; {own.matching}, {own.divergence}"
        )
    width = max(map(len, lines))
    block = "\n".join(f"  {name:<{width}}  {text}" for name, text in lines.items())
    if teacher is None:
        return f"Distillation is off: no term asks for the teacher\n{block}"
    return f"Distillation is on (variant {config.variant})\n{block}"


def _teachers(distillation: Distillation) -> dict[str, str]:
    """A line for each teacher: what it is, how it is held, and of several its weight and rows."""
    each = distillation.config.each_teacher
    lines = {}
    for number, one in enumerate(each):
        words = f"{one.called}: "
        if distillation.teacher is None:
            words += "not loaded, as no term asks for it"
        else:
            teacher = distillation.teachers[number]
            words += f"{_count(teacher.parameters)}, " if teacher.parameters else ""
            words += f"{teacher.precision}, attention {teacher.attention}"
        if len(each) > 1:
            words += f"; weight {one.weight:g}, of " + (
                "all rows" if one.datasets is None else ", ".join(one.datasets)
            )
            counts = distillation.rows.each.get(one.name)
            for status, count in sorted(counts.counts.items()) if counts else ():
                words += f"; {count:,} {status}"
        lines["teacher" if len(each) == 1 else f"teacher {one.name}"] = words
    return lines


def _tokenizers(distillation: Distillation) -> str:
    facts, each = distillation.facts, distillation.config.each_teacher
    student = f"student {facts.student_vocabulary:,}"
    if len(each) == 1:
        first = f"teacher {facts.teacher_vocabulary:,} tokens"
        return f"{first}, {student}; {facts.shared_tokens:,} in both"
    counts = [(facts.teacher_vocabulary, facts.shared_tokens), *facts.further]
    return f"{student} tokens; " + "; ".join(
        f"teacher {one.name} {own:,}, {shared:,} in both"
        for one, (own, shared) in zip(each, counts, strict=True)
    )


def _caches(distillation: Distillation) -> dict[str, str]:
    each = distillation.config.each_teacher
    live = (
        ", for given answers; the teacher is loaded all the same, for the student's own, which "
        "are new in every step"
        if distillation.own_answers is not None
        else ""
    )
    return {
        "cache" if len(each) == 1 else f"cache {one.name}": f"{one.cache}{live}"
        if one.cache
        else f"none: the {'teacher runs' if one.server is None else 'server is asked'} in every "
        "step"
        for one in each
    }


def final_words(cfg: Any) -> str:
    """Where the student is, and how to go on."""
    folder = Path(cfg.output_dir)
    kind = "The student's adapter" if cfg.adapter else "The student"
    if not (folder / PROJECTOR_FILE).is_file():
        return f"{kind} is in {folder}."
    return (
        f"{kind} is in {folder}, without projectors. "
        f"They are in {folder / PROJECTOR_FILE}, for `dwakd.projectors.path` of a later run."
    )


def standing_warnings(warnings: list[str]) -> str:
    """The warnings about a run's health that stood at its end, one a line."""
    lines = "\n".join(f"  - {warning}" for warning in warnings)
    return f"What stood in the way of distillation at the end of the run:\n{lines}"


def _count(parameters: int) -> str:
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if parameters >= limit:
            return f"{parameters / limit:.1f}{unit} parameters"
    return f"{parameters} parameters"
