"""The moments of a run that may be its worst, and which parts are there at each."""

from __future__ import annotations

from pathlib import Path

from dwakd_plugin.models.teacher.cache import INDEX
from dwakd_plugin.plan.parts import TOKEN_BYTES, Parts
from dwakd_plugin.plan.recipe_models import shared_tokens

INITIALISATION = "the projectors' initialisation"  # on a CPU; over before anything is trained
FILL_TOKENS = 2048  # of a batch while a cache is filled, about
FILL_WAITING = 64 * 2**20  # states that wait to be written then


def moments(run: Parts) -> dict[str, dict[str, float]]:
    """Bytes of each part at each moment that may be the worst, by the moment's name."""
    weights = run.weights()
    held, student_peak, student_backward = run.body("student")
    _, teacher_peak, _ = run.body("teacher")
    if run.cached or run.elsewhere:
        states = run.batch * run.lengths.teacher_response * run.teacher.hidden_size
        teacher_peak = states * run.teacher_dtype.itemsize
    if run.kept_tokens is not None:
        teacher_peak = run.batch * run.lengths.teacher_response * run.kept_tokens * TOKEN_BYTES
    loss_held, loss_forward, loss_backward = run.loss()
    chunks, chunks_backward = run.head_chunks()
    dtw, dtw_held = run.dtw()
    gradients = run.gradients()
    accumulated = int(run.recipe.get("gradient_accumulation_steps") or 1) > 1
    before = gradients if accumulated else 0
    optimizer = run.optimizer()
    step = weights | {"optimizer": optimizer, "states that wait": run.waiting_states()}
    found = {
        "the models' forward passes": step
        | {
            "gradients": before,
            "student activations": student_peak,
            "teacher activations": teacher_peak,
        },
        "soft-DTW": step
        | {"gradients": before, "student activations": held, "loss": loss_held, "soft-DTW": dtw},
        "the heads' logits": step
        | {
            "gradients": max(before, _head_gradient(run)),
            "student activations": held,
            "loss": max(loss_forward, loss_backward),
            "soft-DTW": dtw_held,
            "head chunks": max(chunks, chunks_backward),
        },
        "the start of the student's backward pass": step
        | {"gradients": before, "student activations": held + student_backward},
        "the end of the student's backward pass": step
        | {
            "gradients": gradients,
            "student activations": held / run.student.layers + student_backward,
        },
        "the optimizer's step": step
        | {"gradients": gradients, "optimizer": optimizer + _optimizer_scratch(run)},
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
        found["the filling of the teacher cache"] = weights | {
            "teacher weights": run.teacher_weights(body=True),
            "teacher activations": filling.body("teacher")[1] + FILL_WAITING,
        }
    projectors = run.config.projectors
    if run.card.kind == "cpu" and projectors.init != "random" and projectors.path is None:
        found[INITIALISATION] = weights | {"tables of shared tokens": _initialisation(run)}
    return found


def _head_gradient(run: Parts) -> int:
    """Of the student's head, where it is trained: it comes first."""
    heads = [w for w in run.student.weights if w.embedding and w.trained]
    return heads[-1].numel * run.student_weight_dtype(heads[-1]).itemsize if heads else 0


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
