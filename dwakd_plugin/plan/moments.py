"""The moments of a run that may be its worst, and which parts are there at each."""

from __future__ import annotations

from pathlib import Path

from dwakd_plugin.models.teacher.cache import INDEX
from dwakd_plugin.plan.parts import Parts, total
from dwakd_plugin.plan.recipe_models import shared_tokens
from dwakd_plugin.plan.trace import Bytes

LOADING, INITIALISATION, FILLING = (
    "the loading of the teacher",
    "the projectors' initialisation",
    "the filling of the teacher cache",
)
BEFORE = (LOADING, INITIALISATION, FILLING)  # happen once, before the first step


def moments(run: Parts) -> dict[str, dict[str, Bytes]]:
    """Parts at each moment that may be the worst, by the moment's name."""
    weights = run.weights()
    optimizer, gradients = run.optimizer(), run.gradients()
    held, student_peak, student_backward = run.body("student")
    _, teacher_peak, _ = run.body("teacher")
    if run.cached or run.elsewhere:
        states = run.batch * run.lengths.teacher_response * run.teacher.hidden_size
        teacher_peak = Bytes.of(states * run.teacher_dtype.itemsize)
    loss_held, loss_peak, loss_backward = run.loss()
    chunks, chunks_backward = run.head_chunks()
    dtw, dtw_held = run.dtw()
    head = _head_gradient(run)
    accumulated = (
        gradients if int(run.recipe.get("gradient_accumulation_steps") or 1) > 1 else Bytes()
    )
    step = weights | {"optimizer": optimizer, "states that wait": run.waiting_states()}
    largest = max(weight.numel * size for weight, size in run.trained())
    found = {
        "the student's forward pass": step
        | {"gradients": accumulated, "student activations": student_peak},
        "the teacher's forward pass": step
        | {
            "gradients": accumulated,
            "student activations": held,
            "teacher activations": teacher_peak,
        },
        "soft-DTW": step
        | {
            "gradients": accumulated,
            "student activations": held,
            "loss": loss_held,
            "soft-DTW": dtw,
        },
        "the heads' logits": step
        | {
            "gradients": Bytes.peak([accumulated, head]),
            "student activations": held,
            "loss": loss_peak,
            "soft-DTW": dtw_held,
            "head chunks": chunks,
        },
        "the loss's backward pass": step
        | {
            "gradients": Bytes.peak([accumulated, head * 2]),
            "student activations": held,
            "loss": loss_backward,
            "soft-DTW": dtw_held,
            "head chunks": chunks_backward,
        },
        "the start of the student's backward pass": step
        | {
            "gradients": Bytes.peak([accumulated, head]),
            "student activations": held + student_backward,
        },
        "the end of the student's backward pass": step
        | {
            "gradients": gradients + head,  # a second one of the embeddings, before it is added
            "student activations": (held * (1 / run.student.layers)) + student_backward,
        },
        "the optimizer's step": step
        | {
            "gradients": gradients,
            # Unfused Adam has two temporaries of a weight's size; on a GPU, of all weights'.
            "optimizer": optimizer + _optimizer_scratch(run, largest),
        },
    }
    filled = run.cached and (Path(str(run.config.teacher.cache)) / INDEX).is_file()
    if filled:
        run.assume("the teacher cache that is there has every row")
    elif run.cached and not run.elsewhere:
        run.assume("the teacher cache is filled by the run itself, before the first step")
        found[FILLING] = {
            **weights,
            "teacher weights": run.teacher_weights(body=True),
            "teacher activations": _scaled_teacher(run),
        }
    if run.card.kind == "cpu":
        found |= _loading(run, weights, body=not filled)
    return found


def _head_gradient(run: Parts) -> Bytes:
    """Of the student's head, where it is trained: it comes first."""
    heads = [w for w in run.student.weights if w.embedding and w.trained]
    if not heads:
        return Bytes()
    return Bytes.of(heads[-1].numel * run.student_weight_dtype(heads[-1]).itemsize)


def _optimizer_scratch(run: Parts, largest: int) -> Bytes:
    name = str(run.recipe.get("optimizer") or "adamw_torch_fused").lower()
    if run.card.kind == "cpu":
        return Bytes.of(largest, 2)
    return run.gradients() if name == "adamw_torch" else Bytes()


def _loading(run: Parts, weights: dict[str, Bytes], *, body: bool) -> dict[str, dict[str, Bytes]]:
    """On a CPU, what happens before training counts too."""
    file = run.teacher.checkpoint_bytes or 2 * run.teacher.parameters
    loading = {}
    if body:
        loading[LOADING] = {
            **weights,
            "teacher weights": run.teacher_weights(body=True),
            "checkpoint file (mapped)": Bytes(file, 0, file),
        }
    projectors = run.config.projectors
    if projectors.init == "random" or projectors.path is not None:
        return loading
    shared = shared_tokens(
        run.recipe.get("tokenizer_config") or run.student.name,
        run.config.teacher.tokenizer or run.teacher.name,
    )
    if shared is None:
        shared = min(run.student.head_rows, run.teacher.head_rows)
        run.assume("no tokenizers at hand: all of the smaller vocabulary is taken as shared")
    d, D = run.student.hidden_size, run.teacher.hidden_size
    # Rows of both heads and embeddings in float32, and centred in float64; two more at work.
    tables = [Bytes.of(12 * shared * width, 2) for width in (d, D)]
    initialisation = {"loss": total(tables) + Bytes.of(8 * shared * D, 2)}
    return loading | {INITIALISATION: weights | initialisation}


def _scaled_teacher(run: Parts) -> Bytes:
    """The teacher's activations while a cache is filled, in batches of about 2048 tokens."""
    rows = max(1, 2048 // run.lengths.teacher)
    filling = Parts(run.recipe, run.config, run.card, rows, lengths=run.lengths)
    _, peak, _ = filling.body("teacher")
    return peak + Bytes.of(64 * 2**20 / 64, 64)  # states that wait to be written
