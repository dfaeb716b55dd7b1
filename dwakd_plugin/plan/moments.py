"""The moments of a run that may be its worst, and which parts are there at each."""

from __future__ import annotations

from pathlib import Path

from dwakd_plugin.models.teacher.cache import INDEX
from dwakd_plugin.plan.model_sizes import FLOAT
from dwakd_plugin.plan.own_answers import (
    answers_at_once,
    drawing_bytes,
    key_value_bytes,
    samples_with_vllm,
)
from dwakd_plugin.plan.parts import TOKEN_BYTES, Parts
from dwakd_plugin.plan.recipe_models import config_of, shared_tokens
from dwakd_plugin.recipe.blocks import OwnAnswersConfig
from dwakd_plugin.train.own_sampling import AT_ONCE

INITIALISATION = "the projectors' initialisation"  # on a CPU; over before anything is trained
TEACHER = "the teacher's forward pass"
LOGITS = "the heads' logits"
STUDENT_BACKWARD = "the start of the student's backward pass"
FILLING = "the filling of the teacher cache"
FILL_TOKENS = 2048  # of a batch while a cache is filled, about
FILL_WAITING = 64 * 2**20  # states that wait to be written then


def moments(run: Parts) -> dict[str, dict[str, float]]:
    """Bytes of each part at each moment that may be the worst, by the moment's name."""
    weights = run.weights()
    held, student_peak, student_backward = run.body("student")
    loss_held, loss_forward, loss_backward = run.loss()
    dtw, dtw_held, dtw_backward = run.dtw()
    (copies, chunks), copies_held = run.head_pass(), run.head_gradients()
    gradients = run.gradients()
    accumulated = int(run.recipe.get("gradient_accumulation_steps") or 1) > 1
    before = gradients if accumulated else 0
    optimizer = run.optimizer()
    step = weights | {"optimizer": optimizer, "states that wait": run.waiting_states()}
    own = run.config.sampled_answers
    by_vllm = own is not None and samples_with_vllm(
        own, run.card.kind, run.recipe, bits=run.student_bits
    )
    if own is not None and by_vllm:
        step |= {"own answers": own.vllm_memory * run.card.capacity}
    middle = step | {"gradients": before, "student activations": held}
    found = {
        "the student's forward pass": middle | {"student activations": student_peak},
        TEACHER: middle | {"teacher activations": _teacher_states(run)},
        "soft-DTW": middle
        | {
            "gradients": before + copies_held,
            "loss": loss_forward,
            "soft-DTW": max(dtw, dtw_held),
        },
        "soft-DTW's backward pass": middle
        | {"gradients": before + copies_held, "loss": loss_held, "soft-DTW": dtw_backward},
        LOGITS: middle
        | {
            "gradients": before + copies,
            "loss": max(loss_forward, loss_backward),
            "head chunks": chunks,
        },
        STUDENT_BACKWARD: middle
        | {
            "gradients": before + copies_held,
            "student activations": held + student_backward,
        },
        "the end of the student's backward pass": step
        | {
            "gradients": gradients,
            "student activations": held / run.student.layers + student_backward,
        },
        "the optimizer's step": step
        | {"gradients": gradients, "optimizer": optimizer + _optimizer_scratch(run)},
    }
    if not run.warps:
        found = {name: parts for name, parts in found.items() if "soft-DTW" not in name}
    if own is not None and not by_vllm:
        sampled, drawn = _sampling(run, own)
        found["the sampling of the student's own answers"] = step | {
            "own answers": sampled,
            "head chunks": drawn,
        }
    filled = run.cached and (Path(str(run.config.teacher.cache)) / INDEX).is_file()
    if filled:
        run.assume("the teacher cache that is there has every row")
    elif run.cached and not run.elsewhere and not run.served:
        run.assume("the teacher cache is filled by the run itself, before the first step")
        filling = Parts(
            run.recipe,
            run.config,
            run.card,
            max(1, FILL_TOKENS // run.lengths.teacher),
            lengths=run.lengths,
        )
        found[FILLING] = weights | {
            "teacher weights": run.teacher_weights(body=True),
            "teacher activations": filling.body("teacher")[1] + FILL_WAITING,
        }
    projectors = run.config.projectors
    starts = run.projectors() and projectors.init != "random" and projectors.path is None
    if run.card.kind == "cpu" and starts:
        found[INITIALISATION] = weights | {"tables of shared tokens": _initialisation(run)}
    return found


def said(run: Parts) -> float:
    """What the loss gets of the teacher: its states, or its likeliest tokens."""
    positions = run.batch * run.lengths.teacher_response
    if run.kept_tokens is not None:
        return positions * run.kept_tokens * TOKEN_BYTES
    return positions * run.teacher.hidden_size * run.teacher_dtype.itemsize


def _teacher_states(run: Parts) -> float:
    """At most, until the loss has what the teacher says."""
    states = said(run)
    if run.kept_tokens is not None:
        return states
    positions = run.batch * run.lengths.teacher_response
    peak = states
    if run.reads_here:
        peak = run.body("teacher", reading=run.live_rows)[1] + (states if run.cached else 0)
    if run.has_teacher and run.config.teacher.top_k is not None:  # of its head's logits, and again
        chunk = min(positions, run.chunk(run.teacher.head_rows)) * run.teacher.head_rows
        peak = max(peak, states + 2 * FLOAT * chunk)
    return peak


def _sampling(run: Parts, own: OwnAnswersConfig) -> tuple[float, float]:
    """Keys and values, and the prompts' forward pass; and what draws the next tokens."""
    accumulation = int(run.recipe.get("gradient_accumulation_steps") or 1)
    answers = answers_at_once(own, run.batch * accumulation)
    config = config_of("base_model", *run.student_key)
    itemsize = (run.autocast or run.student_dtype).itemsize
    cache = key_value_bytes(config, answers, run.lengths.student, itemsize)
    prompts = run.body("student", reading=answers)[1]
    # A packed sequence has several rows: as long together, but each is drawn for.
    drawn_for = AT_ONCE if run.recipe.get("sample_packing") else answers
    return cache + prompts, drawing_bytes(own, drawn_for, run.student.head_rows)


def _optimizer_scratch(run: Parts) -> int:
    """Unfused Adam on a GPU has a temporary of each weight's size; on a CPU, one at a time."""
    name = str(run.recipe.get("optimizer") or "adamw_torch_fused").lower()
    return run.gradients() if run.card.kind == "cuda" and name == "adamw_torch" else 0


def _initialisation(run: Parts) -> int:
    """Rows of both heads and embeddings of shared tokens: float32, centred in float64, at work."""
    shared = shared_tokens(
        run.recipe.get("tokenizer_config") or run.student.name,
        run.config.teacher.tokenizer or run.teacher.name,
    )
    if shared is None:
        shared = min(run.student.head_rows, run.teacher.head_rows)
        run.assume("no tokenizers at hand: all of the smaller vocabulary is taken as shared")
    d, D = run.student.hidden_size, run.teacher.hidden_size
    return shared * (24 * (d + D) + 8 * D)
