"""What a distillation run takes, in memory and time, from the configs of its models alone.

Weights are counted on models that are built without memory (torch's meta device); what a step
allocates is traced (`memory_trace`); the rest is arithmetic, and every constant of it stands below
with its reason. Bytes throughout.

    B rows of a micro-batch   S, T response tokens of a row   d, D widths   Vs, Vt rows of the heads
"""

from __future__ import annotations

import functools
import json
import math
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dwakd_plugin.config import DWAKDConfig, LossConfig, parse_recipe
from dwakd_plugin.errors import UserError
from dwakd_plugin.loss.divergence import (
    AUTO_CHUNK_ELEMENTS,
    AUTO_CHUNK_SHARE,
    AUTO_CHUNK_TOKENS,
)
from dwakd_plugin.memory_trace import (
    BodyTrace,
    Bytes,
    LossSizes,
    TraceError,
    trace_body,
    trace_loss,
    vocabulary_tensors,
)
from dwakd_plugin.teacher import teacher_device, teacher_dtype
from dwakd_plugin.teacher_cache import INDEX
from dwakd_plugin.teacher_quantisation import asked, describe, own_quantisation

GIB = 2**30
FLOAT = 4  # bytes

# bitsandbytes: a scale in float32 per row of an 8-bit layer; nf4 with double quantisation has a
# byte per 64 weights, a float32 per 256 of those, and two code books and an offset per layer.
NF4_BLOCK, NF4_NESTED_BLOCK = 64, 256
NF4_PER_LAYER = 4 * (256 + 16 + 1)
ADAM_8BIT_BLOCK, ADAM_8BIT_LEAST = 256, 4096  # a float32 per block; smaller tensors stay float32

# Soft-DTW takes the hidden states, then the embeddings, and forms its gradients at once. It has per
# cell of the cost the cost itself and its edges (loss/soft_dtw/cpu.py: 2 of 32), a gradient and
# that with its sign turned; of the features of both sequences the input, the unit vectors and two
# gradients; and after it one gradient.
DTW_CELLS, DTW_CELLS_AT_WORK = 1 + 2 / 32, 2
DTW_FEATURES, DTW_FEATURES_HELD = 4, 1

# What a process takes beside tensors. On a CPU: what axolotl, the data set, numba's compiler and
# the thread pools' scratch memory added to the imports, measured with a pair of a few thousand
# parameters (docs/planning.md, "tiny pair"). On a GPU: the CUDA context and cuBLAS' workspaces.
CPU_RUNTIME = 120 * 2**20
CUDA_RUNTIME = 700 * 2**20
CPU_IMPORTS = 750 * 2**20  # what the imports took before; not part of the plan, but of the machine
KEPT = "kept by malloc"  # the part's name
LOADING, INITIALISATION, FILLING = (
    "the loading of the teacher",
    "the projectors' initialisation",
    "the filling of the teacher cache",
)
BEFORE = (LOADING, INITIALISATION, FILLING)  # happen once, before the first step
# malloc's heap ends between the most that was on it at one moment (every freed block used again)
# and the sum of each part's own most (none, as long-lived blocks lie between). So far from the one
# to the other: one figure for all, fitted to the measurements in docs/planning.md.
NOT_USED_AGAIN = 0.4
# What is left for fragments of torch's allocator on a GPU, and for the system on a CPU; assumed.
USABLE = {"cuda": 0.95, "cpu": 0.97}

# Time. Shares of the peak rates that training reaches.
MATMUL_SHARE, BANDWIDTH_SHARE = 0.4, 0.6
VOCABULARY_PASSES = 12  # times that a chunk's logits are read or written, per head, in float32
DTW_CELLS_PER_SECOND = {"cpu": 5e8, "cuda": 5e9}  # cpu: measured (docs/performance.md)

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


# The machine --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Card:
    """What the run should fit on, and how fast that is taken to be."""

    name: str
    kind: str  # cuda or cpu
    capacity: int
    flops: float  # of matrix products, per second, as training reaches them
    bandwidth: float  # bytes per second, likewise
    note: str  # where the figures are from

    @property
    def usable(self) -> float:
        own = CPU_IMPORTS if self.kind == "cpu" else 0
        return self.capacity * USABLE[self.kind] - own


# GiB, TFLOPS of dense bf16 (fp16 where there is no bf16), GB/s: the makers' data sheets.
CARDS = {
    "T4": (16, 65, 320),
    "V100": (32, 125, 900),
    "L4": (24, 121, 300),
    "A10": (24, 125, 600),
    "A6000": (48, 155, 768),
    "RTX3090": (24, 71, 936),
    "RTX4090": (24, 165, 1008),
    "RTX5090": (32, 210, 1792),
    "L40S": (48, 362, 864),
    "A100-40GB": (40, 312, 1555),
    "A100-80GB": (80, 312, 2039),
    "H100": (80, 989, 3350),
    "H200": (141, 989, 4800),
    "B200": (180, 2250, 8000),
}


def card(wanted: str | None) -> Card:
    """The card that `wanted` names (`24GB`, `A100-80GB`); without one the GPU here, else the CPU.

    Raises UserError where `wanted` is neither a size nor a known card.
    """
    if wanted is None:
        return _gpu_here() if torch.cuda.is_available() else _cpu()
    if wanted.lower() == "cpu":
        return _cpu()
    if size := re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:g|gb|gib)", wanted.strip(), re.IGNORECASE):
        capacity = float(size[1])
        if capacity <= 0:
            raise UserError(f"--gpu {wanted}: a card of no memory. Give its size, as in 24GB.")
        alike = min(CARDS, key=lambda name: (abs(CARDS[name][0] - capacity), CARDS[name][1]))
        return replace(
            _from_sheet(alike, capacity),
            name=f"{capacity:g} GB card",
            note=f"time as on a {alike}: {_sheet_note(alike)}",
        )
    for name in CARDS:
        if _plain(name) == _plain(wanted):
            return _from_sheet(name)
    alike_names = [name for name in CARDS if _plain(name).startswith(_plain(wanted))]
    if len(alike_names) == 1:
        return _from_sheet(alike_names[0])
    raise UserError(
        f"--gpu {wanted} is neither a size nor a known card. Give a size, as in 24GB, `cpu`, or "
        f"one of {', '.join(CARDS)}."
    )


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _sheet_note(name: str) -> str:
    _, tflops, bandwidth = CARDS[name]
    return (
        f"{tflops} TFLOPS at {MATMUL_SHARE:.0%}, {bandwidth} GB/s at {BANDWIDTH_SHARE:.0%} "
        "(data sheet; shares assumed)"
    )


def _from_sheet(name: str, capacity: float | None = None) -> Card:
    size, tflops, bandwidth = CARDS[name]
    return Card(
        name,
        "cuda",
        int((capacity or size) * GIB),
        tflops * 1e12 * MATMUL_SHARE,
        bandwidth * 1e9 * BANDWIDTH_SHARE,
        _sheet_note(name),
    )


def _gpu_here() -> Card:
    properties = torch.cuda.get_device_properties(0)
    capacity = properties.total_memory
    known = [name for name in CARDS if _plain(name.split("-")[0]) in _plain(properties.name)]
    alike = min(known or CARDS, key=lambda name: abs(CARDS[name][0] * GIB - capacity))
    return replace(_from_sheet(alike), name=f"{properties.name} (found here)", capacity=capacity)


def _cpu() -> Card:
    capacity = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    matrix = torch.ones(768, 768)
    flops = 2 * 768**3 * _rate(lambda: matrix @ matrix)
    block, result = torch.ones(2**24), torch.empty(2**24)
    bandwidth = 2 * block.numel() * FLOAT * _rate(lambda: torch.exp(block, out=result))
    return Card(
        "this machine's memory (no GPU)",
        "cpu",
        capacity,
        flops,
        bandwidth,
        f"{flops / 1e9:.0f} GFLOPS and {bandwidth / 1e9:.1f} GB/s, measured here just now",
    )


def _rate(work: Callable[[], Any]) -> float:
    """Calls per second, over a fifth of one."""
    work()
    calls, begun = 0, time.perf_counter()
    while (passed := time.perf_counter() - begun) < 0.2:
        work()
        calls += 1
    return calls / passed


# Models -------------------------------------------------------------------------------------


def model_config(name: str, place: str, **options: Any) -> Any:
    """A model's transformers config. Raises UserError where there is none."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(name, **options)
    except (OSError, ValueError) as error:
        raise UserError(
            f"The model `{name}` has no config to plan with: {str(error).splitlines()[0]}\n"
            f"{place} takes a folder with a config.json, or a hub id."
        ) from error


@dataclass(frozen=True)
class Layer:
    """One weight of a model, as a number of rows and columns (1 where it is a vector)."""

    name: str
    rows: int
    columns: int
    quantised: bool = False  # where the model is loaded in 8 or 4 bit
    embedding: bool = False  # an input embedding or a head
    norm: bool = False
    trained: bool = True
    adapter: bool = False

    @property
    def numel(self) -> int:
        return self.rows * self.columns


@dataclass(frozen=True)
class Model:
    """What the plan needs to know of a model."""

    name: str
    weights: tuple[Layer, ...]
    hidden_size: int
    head_rows: int
    layers: int
    checkpoint_bytes: int  # of its safetensors, where they are a local folder's

    @property
    def parameters(self) -> int:
        return sum(weight.numel for weight in self.weights if not weight.adapter)

    @property
    def body_parameters(self) -> int:
        """Those that a token is multiplied with, head left out."""
        return sum(weight.numel for weight in self.weights if not weight.embedding)

    @property
    def trained(self) -> int:
        return sum(weight.numel for weight in self.weights if weight.trained)


def measure_model(name: str, config: Any, adapter: dict[str, Any] | None = None) -> Model:
    """Counts a model's weights; with `adapter` (LoraConfig's settings) also those of the LoRA.

    Raises UserError where the architecture cannot be built or the LoRA fits nothing in it.
    """
    from transformers import AutoModelForCausalLM
    from transformers.quantizers.base import get_keys_to_not_convert

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except (ValueError, ImportError, KeyError, AttributeError, TypeError) as error:
        raise UserError(
            f"The model `{name}` ({config.model_type}) cannot be built from its config: "
            f"{str(error).splitlines()[0]}"
        ) from error
    kept = get_keys_to_not_convert(model)
    tables = {
        id(module.weight)
        for module in (model.get_input_embeddings(), model.get_output_embeddings())
        if module is not None
    }
    from transformers.pytorch_utils import Conv1D

    linear, turned = set(), set()
    for place, module in model.named_modules():
        if type(module) is nn.Linear or isinstance(module, Conv1D):
            if not any(key in place for key in kept):
                linear.add(id(module.weight))
            if isinstance(module, Conv1D):  # its weight is (in, out)
                turned.add(id(module.weight))
    if adapter is not None:
        model = with_lora(model, adapter)
    weights = tuple(
        Layer(
            place,
            *_rows_and_columns(parameter, turned=id(parameter) in turned),
            quantised=id(parameter) in linear,
            embedding=id(parameter) in tables,
            norm="norm" in place,
            trained=parameter.requires_grad,
            adapter="lora_" in place or "modules_to_save" in place,
        )
        for place, parameter in model.named_parameters()
    )
    text = config.get_text_config()
    folder = Path(name)
    files = folder.glob("*.safetensors") if folder.is_dir() else []
    return Model(
        name,
        weights,
        int(text.hidden_size),
        int(text.vocab_size),
        int(text.num_hidden_layers),
        sum(file.stat().st_size for file in files),
    )


def _rows_and_columns(parameter: torch.Tensor, *, turned: bool) -> tuple[int, int]:
    shape = tuple(parameter.shape) or (1,)
    if len(shape) == 1:
        return shape[0], 1
    rows, columns = math.prod(shape[:-1]), shape[-1]
    return (columns, rows) if turned else (rows, columns)


def lora_settings(recipe: dict[str, Any]) -> dict[str, Any] | None:
    """The recipe's LoRA as LoraConfig's settings; None for full fine-tuning."""
    if not recipe.get("adapter"):
        return None
    return {
        "r": recipe.get("lora_r") or 8,
        "lora_alpha": recipe.get("lora_alpha") or 16,
        "lora_dropout": recipe.get("lora_dropout") or 0.0,
        "target_modules": recipe.get("lora_target_modules") or [],
        "all_linear": bool(recipe.get("lora_target_linear")),
        "modules_to_save": recipe.get("lora_modules_to_save") or None,
    }


def with_lora(model: Any, settings: dict[str, Any]) -> Any:
    """The model with a LoRA on it, as axolotl builds it. Raises UserError where it fits nothing."""
    from peft import LoraConfig, get_peft_model

    settings = dict(settings)
    targets = settings["target_modules"]
    if settings.pop("all_linear"):
        targets = [targets] if isinstance(targets, str) else list(targets)
        head = model.get_output_embeddings()
        targets += [
            name.rpartition(".")[2]
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and module is not head
        ]
        targets = sorted(set(targets))
    try:
        return get_peft_model(
            model, LoraConfig(task_type="CAUSAL_LM", **settings | {"target_modules": targets})
        )
    except ValueError as error:
        raise UserError(
            f"The recipe's LoRA cannot be put on the student: {str(error).splitlines()[0]}\n"
            "Name its layers in lora_target_modules, or set lora_target_linear: true."
        ) from error


def weight_bytes(
    model: Model, dtype: Callable[[Layer], torch.dtype], bits: int | None = None
) -> Iterator[Bytes]:
    """Bytes of each weight: in its dtype, or in 8 or 4 bits by bitsandbytes where it is linear."""
    for weight in model.weights:
        if bits == 8 and weight.quantised:
            yield Bytes.of(weight.numel) + Bytes.of(FLOAT * weight.rows)
        elif bits == 4 and weight.quantised:
            blocks = math.ceil(weight.numel / NF4_BLOCK)
            scales = FLOAT * math.ceil(blocks / NF4_NESTED_BLOCK) + NF4_PER_LAYER
            yield Bytes.of(math.ceil(weight.numel / 2)) + Bytes.of(blocks) + Bytes.of(scales)
        else:
            yield Bytes.of(weight.numel * dtype(weight).itemsize)


def optimizer_bytes(name: str, weight: Layer, itemsize: int) -> tuple[float, str | None]:
    """State of one trained weight, and what had to be assumed."""
    name = name.lower()
    if "8bit" in name or "4bit" in name:
        moments = 1 if "lion" in name or "sgd" in name else 2
        if weight.numel < ADAM_8BIT_LEAST:
            return moments * FLOAT * weight.numel, None
        each = 0.5 if "4bit" in name else 1.0
        return moments * (each + FLOAT / ADAM_8BIT_BLOCK) * weight.numel, None
    if "adafactor" in name:  # a row's and a column's second moments
        return FLOAT * (weight.rows + weight.columns if weight.columns > 1 else weight.rows), None
    if "lion" in name or "muon" in name:
        return itemsize * weight.numel, None
    if name == "sgd":
        return 0, None
    if "lomo" in name or "galore" in name:
        return 0, f"optimizer {name}: no state is counted"
    known = "adam" in name
    return 2 * itemsize * weight.numel, (
        None if known else f"optimizer {name}: two moments a parameter, as Adam has, are assumed"
    )


# The plan -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Lengths:
    """Tokens of a row: all of them, and those of the response, on both sides."""

    student: int
    teacher: int
    student_response: int
    teacher_response: int


@dataclass(frozen=True)
class Plan:
    """What a micro-batch of a recipe takes on a card."""

    card: Card
    micro_batch: int
    peak: str  # the phase of a step (or of loading) that takes most
    total: float
    parts: dict[str, float]  # at that moment; they add up to `total`
    largest: dict[str, float]  # of each part, at its own worst moment
    seconds_per_step: float
    cache_bytes_per_row: float
    teacher_name: str
    student_parameters: int
    trained_parameters: int
    teacher_parameters: int
    lengths: Lengths
    assumptions: tuple[str, ...]

    @property
    def fits(self) -> bool:
        return self.total <= self.card.usable


def plan(
    recipe: dict[str, Any],
    on: Card,
    *,
    micro_batch: int | None = None,
    response_share: float = 1.0,
    lengths: Lengths | None = None,
) -> Plan:
    """Plans an effective recipe (with its `dwakd:` block). Raises UserError.

    Rows are as long as `sequence_len`, with `response_share` of that being response, or have the
    `lengths` given, as far as `sequence_len` lets them.
    """
    config = parse_recipe(recipe)
    if config is None:
        raise UserError("The recipe does not say `distillation: dwakd`.")
    batch = micro_batch or int(recipe.get("micro_batch_size") or 1)
    return _Run(recipe, config, on, batch, response_share, lengths).plan()


def largest_micro_batch(
    recipe: dict[str, Any],
    on: Card,
    *,
    response_share: float = 1.0,
    lengths: Lengths | None = None,
    limit: int = 4096,
) -> int:
    """The largest micro-batch whose plan fits on the card; 0 where not even one row does."""

    def fits(batch: int) -> bool:
        return plan(
            recipe, on, micro_batch=batch, response_share=response_share, lengths=lengths
        ).fits

    if not fits(1):
        return 0
    low, high = 1, 2
    while high <= limit and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


class _Run:
    """The quantities of one recipe on one card, each worked out once."""

    def __init__(
        self,
        recipe: dict[str, Any],
        config: DWAKDConfig,
        on: Card,
        batch: int,
        response_share: float = 1.0,
        lengths: Lengths | None = None,
    ) -> None:
        self.recipe, self.config, self.card, self.batch = recipe, config, on, batch
        self.assumptions: list[str] = []
        lora = lora_settings(recipe)
        self.lora = json.dumps(lora, sort_keys=True) if lora else None
        student_name = str(recipe.get("base_model") or "")
        if not student_name:
            raise UserError("The recipe names no student: base_model is missing.")
        trust = bool(recipe.get("trust_remote_code"))
        self.student_key = (student_name, recipe.get("revision_of_model"), trust)
        teacher = config.teacher
        self.teacher_key = (teacher.base_model, teacher.revision, teacher.trust_remote_code)
        self.student = _model("base_model", *self.student_key, self.lora)
        self.teacher = _model("dwakd.teacher.base_model", *self.teacher_key, None)
        length = int(recipe.get("sequence_len") or 512)  # axolotl's default
        teacher_length = int(teacher.sequence_len or length)
        if lengths is None:
            lengths = Lengths(
                length,
                teacher_length,
                max(1, round(response_share * length)),
                max(1, round(response_share * teacher_length)),
            )
        self.lengths = Lengths(
            min(lengths.student, length),
            min(lengths.teacher, teacher_length),
            min(lengths.student_response, length),
            min(lengths.teacher_response, teacher_length),
        )
        self.student_dtype, self.autocast = _student_precision(recipe, on.kind)
        teacher_config = _config("dwakd.teacher.base_model", *self.teacher_key)
        self.teacher_dtype = teacher_dtype(
            teacher, teacher_config, teacher_device(teacher, on.kind)
        )
        self.teacher_bits = self._teacher_bits(own_quantisation(teacher_config))
        # A body that is elsewhere leaves embeddings and head with the student.
        self.elsewhere = on.kind == "cuda" and teacher.device not in (None, "cuda", "cuda:0")
        if self.elsewhere:
            self.assume(f"the teacher's body is not on this card: device is {teacher.device}")
        self.cached = teacher.cache is not None

    # -- what is held throughout ------------------------------------------------------------------

    def student_weight_dtype(self, weight: Layer) -> torch.dtype:
        """As axolotl's loader leaves it."""
        if weight.adapter:
            return torch.float32  # peft raises half-precision adapters
        attention = str(self.recipe.get("attn_implementation") or "")
        flash = "flash" in attention or bool(self.recipe.get("flash_attention"))
        raised = weight.embedding or weight.norm
        if raised and not self.recipe.get("adapter") and not flash:
            return torch.float32
        return self.student_dtype

    def student_weights(self) -> Bytes:
        bits = 8 if self.recipe.get("load_in_8bit") else 4 if self.recipe.get("load_in_4bit") else 0
        return _sum(weight_bytes(self.student, self.student_weight_dtype, bits))

    def _teacher_bits(self, own: dict[str, Any] | None) -> int:
        """Of its linear layers: 8 or 4 by bitsandbytes, 0 where they have the teacher's dtype."""
        if own is None:
            return {"load_in_8bit": 8, "load_in_4bit": 4, None: 0}[asked(self.config.teacher)]
        bits = 8 if "8" in describe(own) else 4
        self.assume(
            f"the teacher's checkpoint ({describe(own)}) takes what bitsandbytes' {bits} bit would"
        )
        return bits

    def teacher_weights(self, *, body: bool) -> Bytes:
        model = self.teacher
        if not body:  # a cache has embeddings and head
            tables = tuple(weight for weight in model.weights if weight.embedding)
            model = replace(model, weights=tables)
        return _sum(weight_bytes(model, lambda _: self.teacher_dtype, self.teacher_bits))

    def projectors(self) -> list[Layer]:
        d, D = self.student.hidden_size, self.teacher.hidden_size
        shapes = {"query": (2 * D, 2 * d), "t2s": (d, D), "s2t": (D, d), "embed_t2s": (d, D)}
        return [
            layer
            for name, (rows, columns) in shapes.items()
            for layer in (Layer(name, rows, columns), Layer(f"{name}.bias", rows, 1))
        ]

    def optimizer(self) -> Bytes:
        name = str(self.recipe.get("optimizer") or "adamw_torch_fused")
        if "paged" in name.lower():
            self.assume(f"{name}: its pages are counted as if none had moved to the CPU's memory")
        states = []
        for weight, itemsize in self._trained():
            size, assumed = optimizer_bytes(name, weight, itemsize)
            if assumed:
                self.assume(assumed)
            states += [Bytes.of(size / 2, 2)]
        return _sum(states)

    def _trained(self) -> list[tuple[Layer, int]]:
        """Trained weights, each with the bytes of an element."""
        own = [
            (w, self.student_weight_dtype(w).itemsize) for w in self.student.weights if w.trained
        ]
        return own + [(weight, FLOAT) for weight in self.projectors()]

    def gradients(self) -> Bytes:
        return _sum(Bytes.of(weight.numel * size) for weight, size in self._trained())

    def weights(self) -> dict[str, Bytes]:
        """What is there from the first step to the last, but for the optimizer's state."""
        runtime = CPU_RUNTIME if self.card.kind == "cpu" else CUDA_RUNTIME
        return {
            "student weights": self.student_weights(),
            "teacher weights": self.teacher_weights(body=not self.cached and not self.elsewhere),
            "projectors": _sum(Bytes.of(FLOAT * layer.numel) for layer in self.projectors()),
            "runtime": Bytes.of(runtime / 64, 64),
        }

    # -- what a step allocates --------------------------------------------------------------------

    def body(self, side: str) -> tuple[Bytes, Bytes, Bytes]:
        """Held after forward, forward's peak, and backward's need beside what is held."""
        training = side == "student"
        model = self.student if training else self.teacher
        length = self.lengths.student if training else self.lengths.teacher
        dtype = self.student_dtype if training else self.teacher_dtype
        checkpointing = training and bool(self.recipe.get("gradient_checkpointing"))
        attention = str(
            self.recipe.get("attn_implementation") or ""
            if training
            else self.config.teacher.attn_implementation
        )
        eager = attention == "eager" or (training and bool(self.recipe.get("eager_attention")))
        try:
            trace = _body_trace(
                *(self.student_key if training else self.teacher_key),
                self.lora if training else None,
                length,
                dtype,
                self.autocast if training else None,
                "eager" if eager else "sdpa",
                self.card.kind == "cuda" and not eager,
                training,
                checkpointing,
            )
            return trace.at(self.batch)
        except TraceError as error:
            self.assume(
                f"the {side}'s architecture cannot be traced ({str(error)[:80]}): its activations "
                "are those of a Llama of the same width"
            )
            return _like_a_llama(model, length, dtype.itemsize, self.batch, training, checkpointing)

    def head_chunks(self) -> tuple[Bytes, Bytes]:
        """Logits of a chunk, forward and backward, in the worse of the two spaces."""
        (student, student_back), (teacher, teacher_back) = _vocabulary_tensors(
            self.loss_sizes(), self.config.loss.model_dump_json()
        )

        def tensors(count: float, rows: int, tokens: int) -> Bytes:
            chunk = min(tokens, self.chunk(rows))
            return Bytes.of(FLOAT * chunk * rows, count)

        S = self.batch * self.lengths.student_response
        T = self.batch * self.lengths.teacher_response
        Vs, Vt = self.student.head_rows, self.teacher.head_rows
        return (
            Bytes.peak([tensors(student, Vs, S), tensors(teacher, Vt, T)]),
            Bytes.peak([tensors(student_back, Vs, S), tensors(teacher_back, Vt, T)]),
        )

    def chunk(self, rows: int) -> int:
        """`tokens_per_chunk` of the loss, for a card that need not be here."""
        chunk_size = self.config.loss.chunk_size
        if chunk_size != "auto":
            return chunk_size
        wanted = max(AUTO_CHUNK_TOKENS * rows, AUTO_CHUNK_ELEMENTS[self.card.kind])
        return max(1, min(wanted, int(self.card.capacity * AUTO_CHUNK_SHARE) // FLOAT) // rows)

    def loss_sizes(self) -> LossSizes:
        return LossSizes(
            self.lengths.student_response,
            self.lengths.teacher_response,
            self.student.hidden_size,
            self.teacher.hidden_size,
            self.student_dtype,
            self.teacher_dtype,
        )

    def loss(self) -> tuple[Bytes, Bytes, Bytes]:
        """Beside logits and soft-DTW: held, forward's peak, backward's peak."""
        events = _loss_trace(self.loss_sizes(), self.config.loss.model_dump_json())
        return events.at(self.batch)

    def dtw(self) -> tuple[Bytes, Bytes]:
        """Soft-DTW at work, and what it leaves for backward."""
        if self.config.loss.dtw_weight == 0:
            return Bytes(), Bytes()
        S, T = self.lengths.student_response, self.lengths.teacher_response
        B, d = self.batch, self.student.hidden_size
        costs = [S * T, S * S, T * T]
        cells = [Bytes.of(FLOAT * B * cost) * DTW_CELLS for cost in costs]
        at_work = Bytes.of(FLOAT * B * max(costs), DTW_CELLS_AT_WORK)
        features = Bytes.of(FLOAT * B * S * d) + Bytes.of(FLOAT * B * T * d)
        band = Bytes.of(FLOAT * B * S * T) if self.config.soft_dtw.band else Bytes()
        held = features * (2 * DTW_FEATURES_HELD)  # of hidden states and of embeddings
        return _sum([*cells, at_work, band, features * DTW_FEATURES, held]), held

    # -- the moments ------------------------------------------------------------------------------

    def moments(self) -> dict[str, dict[str, Bytes]]:
        """Parts at each moment that may be the worst, by the moment's name."""
        weights = self.weights()
        optimizer, gradients = self.optimizer(), self.gradients()
        held, student_peak, student_backward = self.body("student")
        _, teacher_peak, _ = self.body("teacher")
        if self.cached or self.elsewhere:
            states = self.batch * self.lengths.teacher_response * self.teacher.hidden_size
            teacher_peak = Bytes.of(states * self.teacher_dtype.itemsize)
        loss_held, loss_peak, loss_backward = self.loss()
        chunks, chunks_backward = self.head_chunks()
        dtw, dtw_held = self.dtw()
        head = self._head_gradient()
        accumulated = (
            gradients if int(self.recipe.get("gradient_accumulation_steps") or 1) > 1 else Bytes()
        )
        step = weights | {"optimizer": optimizer}
        largest = max(weight.numel * size for weight, size in self._trained())
        moments = {
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
                "student activations": (held * (1 / self.student.layers)) + student_backward,
            },
            "the optimizer's step": step
            | {
                "gradients": gradients,
                # Unfused Adam has two temporaries of a weight's size; on a GPU, of all weights'.
                "optimizer": optimizer + self._optimizer_scratch(largest),
            },
        }
        filled = self.cached and (Path(str(self.config.teacher.cache)) / INDEX).is_file()
        if filled:
            self.assume("the teacher cache that is there has every row")
        elif self.cached and not self.elsewhere:
            self.assume("the teacher cache is filled by the run itself, before the first step")
            moments[FILLING] = {
                **weights,
                "teacher weights": self.teacher_weights(body=True),
                "teacher activations": _scaled_teacher(self),
            }
        if self.card.kind == "cpu":
            moments |= self._loading(weights, body=not filled)
        return moments

    def _head_gradient(self) -> Bytes:
        """Of the student's head, where it is trained: it comes first."""
        heads = [w for w in self.student.weights if w.embedding and w.trained]
        if not heads:
            return Bytes()
        return Bytes.of(heads[-1].numel * self.student_weight_dtype(heads[-1]).itemsize)

    def _optimizer_scratch(self, largest: int) -> Bytes:
        name = str(self.recipe.get("optimizer") or "adamw_torch_fused").lower()
        if self.card.kind == "cpu":
            return Bytes.of(largest, 2)
        return self.gradients() if name == "adamw_torch" else Bytes()

    def _loading(self, weights: dict[str, Bytes], *, body: bool) -> dict[str, dict[str, Bytes]]:
        """On a CPU, what happens before training counts too."""
        file = self.teacher.checkpoint_bytes or 2 * self.teacher.parameters
        loading = {}
        if body:
            loading[LOADING] = {
                **weights,
                "teacher weights": self.teacher_weights(body=True),
                "checkpoint file (mapped)": Bytes(file, 0, file),
            }
        projectors = self.config.projectors
        if projectors.init == "random" or projectors.path is not None:
            return loading
        shared = _shared_tokens(
            self.recipe.get("tokenizer_config") or self.student.name,
            self.config.teacher.tokenizer or self.teacher.name,
        )
        if shared is None:
            shared = min(self.student.head_rows, self.teacher.head_rows)
            self.assume("no tokenizers at hand: all of the smaller vocabulary is taken as shared")
        d, D = self.student.hidden_size, self.teacher.hidden_size
        # Rows of both heads and embeddings in float32, and centred in float64; two more at work.
        tables = [Bytes.of(12 * shared * width, 2) for width in (d, D)]
        initialisation = {"loss": _sum(tables) + Bytes.of(8 * shared * D, 2)}
        return loading | {INITIALISATION: weights | initialisation}

    # -- the result -------------------------------------------------------------------------------

    def assume(self, text: str) -> None:
        if text not in self.assumptions:
            self.assumptions.append(text)

    def plan(self) -> Plan:
        moments = self.moments()
        totals = {name: _sum(parts.values()) for name, parts in moments.items()}
        name, highest = max(totals.items(), key=lambda item: item[1].total)
        peak = highest.total
        if self.card.kind == "cpu":
            # malloc keeps small blocks once a step has had them, whatever they were for.
            steps = {moment: size for moment, size in totals.items() if moment not in BEFORE}
            heap = max(size.heap for size in steps.values())
            apart: dict[str, float] = {}
            for sizes in moments.values():
                for part, size in sizes.items():
                    apart[part] = max(apart.get(part, 0), size.heap)
            heap += NOT_USED_AGAIN * max(0, sum(apart.values()) - heap)
            moment = max(steps, key=lambda one: (steps[one].mapped, steps[one].heap))
            if heap + steps[moment].mapped > peak:
                name, peak = moment, heap + steps[moment].mapped
        parts = {part: size.total for part, size in moments[name].items()}
        parts[KEPT] = peak - totals[name].total
        largest: dict[str, float] = {}
        for sizes in moments.values():
            for part, size in sizes.items():
                largest[part] = max(largest.get(part, 0), size.total)
        largest[KEPT] = parts[KEPT]
        return Plan(
            card=self.card,
            micro_batch=self.batch,
            peak=name,
            total=peak,
            parts={part: size for part, size in parts.items() if size > 0},
            largest={part: size for part, size in largest.items() if size > 0},
            seconds_per_step=self.seconds(),
            cache_bytes_per_row=self.lengths.teacher_response * self._cached_token_bytes(),
            teacher_name=self.teacher.name,
            student_parameters=self.student.parameters,
            trained_parameters=self.student.trained,
            teacher_parameters=self.teacher.parameters,
            lengths=self.lengths,
            assumptions=tuple(self.assumptions),
        )

    def _cached_token_bytes(self) -> float:
        """Of one teacher token's state, on disk."""
        asked, width = self.config.teacher.cache_dtype, self.teacher.hidden_size
        if asked == "float8_e4m3":
            return width + FLOAT  # and its scale
        return width * (self.teacher_dtype if asked == "auto" else _DTYPES[asked]).itemsize

    def seconds(self) -> float:
        """Of one optimizer step: products, passes over logits, and soft-DTW's cells."""
        lengths, B = self.lengths, self.batch
        full = not self.lora
        student, teacher = self.student, self.teacher
        passes = (6 if full else 4) + (2 if self.recipe.get("gradient_checkpointing") else 0)
        flops = passes * student.body_parameters * B * lengths.student
        if not self.cached:
            flops += 2 * teacher.body_parameters * B * lengths.teacher
        S, T = B * lengths.student_response, B * lengths.teacher_response
        # Two products in each space, and in backward one per input and one for a trained head.
        heads = S * student.head_rows * student.hidden_size * (5 if full else 4)
        heads += T * teacher.head_rows * teacher.hidden_size * 3
        logits = S * student.head_rows + T * teacher.head_rows
        cells = (
            2
            * B
            * sum(
                a * b
                for a, b in (
                    (lengths.student_response, lengths.teacher_response),
                    (lengths.student_response,) * 2,
                    (lengths.teacher_response,) * 2,
                )
            )
        )
        if self.config.loss.dtw_weight == 0:
            cells = 0
        micro = (
            (flops + 2 * heads) / self.card.flops
            + logits * FLOAT * VOCABULARY_PASSES / self.card.bandwidth
            + cells / DTW_CELLS_PER_SECOND[self.card.kind]
        )
        return micro * int(self.recipe.get("gradient_accumulation_steps") or 1)


def _scaled_teacher(run: _Run) -> Bytes:
    """The teacher's activations while a cache is filled, in batches of about 2048 tokens."""
    rows = max(1, 2048 // run.lengths.teacher)
    filling = _Run(run.recipe, run.config, run.card, rows, lengths=run.lengths)
    _, peak, _ = filling.body("teacher")
    return peak + Bytes.of(64 * 2**20 / 64, 64)  # states that wait to be written


def _sum(sizes: Any) -> Bytes:
    return functools.reduce(lambda a, b: a + b, sizes, Bytes())


def _student_precision(recipe: dict[str, Any], kind: str) -> tuple[torch.dtype, torch.dtype | None]:
    """The dtype in which axolotl loads the student, and that of mixed precision, if any."""
    bf16, fp16 = recipe.get("bf16", "auto"), recipe.get("fp16")
    if bf16 == "auto":
        bf16 = not fp16 and kind == "cuda"
        fp16 = fp16 or (not bf16 and fp16 is None and not recipe.get("float16"))
    if bf16 or recipe.get("bfloat16"):
        return torch.bfloat16, torch.bfloat16 if bf16 else None
    if recipe.get("load_in_8bit") or fp16 or recipe.get("float16"):
        return torch.float16, torch.float16 if fp16 else None
    return torch.float32, None


@functools.cache
def _config(place: str, name: str, revision: str | None, trust: bool) -> Any:
    return model_config(name, place, revision=revision, trust_remote_code=trust)


@functools.cache
def _model(place: str, name: str, revision: str | None, trust: bool, lora: str | None) -> Model:
    config = _config(place, name, revision, trust)
    return measure_model(name, config, json.loads(lora) if lora else None)


@functools.lru_cache(maxsize=64)
def _body_trace(
    name: str,
    revision: str | None,
    trust: bool,
    lora: str | None,
    length: int,
    dtype: torch.dtype,
    autocast: torch.dtype | None,
    attention: str,
    fused_dropout: bool,
    training: bool,
    checkpointing: bool,
) -> BodyTrace:
    from transformers import AutoModelForCausalLM

    config = _config("base_model", name, revision, trust)

    def build(config: Any) -> Any:
        if getattr(config, "quantization_config", None) is not None:
            del config.quantization_config
        if fused_dropout:  # of attention weights: a GPU's kernels do not keep it, a CPU's cannot
            for name in ("attention_dropout", "attn_pdrop"):
                if hasattr(config, name):
                    setattr(config, name, 0.0)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation=attention, trust_remote_code=trust
            )
        return with_lora(model, json.loads(lora)) if lora else model

    return trace_body(
        build,
        config,
        length,
        training=training,
        checkpointing=checkpointing,
        autocast=autocast,
    )


@functools.lru_cache(maxsize=64)
def _loss_trace(sizes: LossSizes, loss: str) -> Any:
    return trace_loss(sizes, LossConfig.model_validate_json(loss))


@functools.lru_cache(maxsize=64)
def _vocabulary_tensors(
    sizes: LossSizes, loss: str
) -> tuple[tuple[float, float], tuple[float, float]]:
    return vocabulary_tensors(sizes, LossConfig.model_validate_json(loss))


@functools.cache
def _shared_tokens(student: str, teacher: str) -> int | None:
    """How many tokens both vocabularies have; None where a tokenizer is not at hand."""
    from transformers import AutoTokenizer

    from dwakd_plugin.tokenizer_pair import shared_vocabulary

    try:
        tokenizers = [AutoTokenizer.from_pretrained(name) for name in (teacher, student)]
    except (OSError, ValueError):
        return None
    return len(shared_vocabulary(*tokenizers))


def _like_a_llama(
    model: Model, length: int, itemsize: int, batch: int, training: bool, checkpointing: bool
) -> tuple[Bytes, Bytes, Bytes]:
    """Activations by rule of thumb: a layer keeps about 34 numbers a feature and token."""
    state = batch * length * model.hidden_size * itemsize
    layer = Bytes.of(state, 34)
    if not training:
        return Bytes.of(state), layer, Bytes()
    if checkpointing:
        return Bytes.of(state, model.layers), Bytes.of(state, model.layers) + layer, layer * 1.5
    return layer * model.layers, layer * model.layers, layer * 0.5


# What would help ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Suggestion:
    """A change of the recipe, and what it saves."""

    title: str
    yaml: str
    saves: float
    fits: bool


def suggestions(
    recipe: dict[str, Any],
    now: Plan,
    *,
    response_share: float = 1.0,
    lengths: Lengths | None = None,
) -> list[Suggestion]:
    """Changes that save memory, each planned anew by itself, the most effective first."""
    found = []
    for title, yaml, changed in _changes(recipe, now):
        try:
            then = plan(changed, now.card, response_share=response_share, lengths=lengths)
        except UserError:
            continue  # a LoRA that fits nothing, say
        if now.total - then.total > 0.01 * now.total:
            found.append(Suggestion(title, yaml, now.total - then.total, then.fits))
    return sorted(found, key=lambda one: -one.saves)


def _changes(recipe: dict[str, Any], now: Plan) -> Iterator[tuple[str, str, dict[str, Any]]]:
    block = recipe["dwakd"]
    teacher = block["teacher"]
    teacher = {"base_model": teacher} if isinstance(teacher, str) else dict(teacher)

    def with_teacher(**changes: Any) -> dict[str, Any]:
        return recipe | {"dwakd": block | {"teacher": teacher | changes}}

    if not teacher.get("cache"):
        if not teacher.get("load_in_8bit") and not teacher.get("load_in_4bit"):
            yield (
                "the teacher in 8 bit",
                "dwakd:\n  teacher:\n    load_in_8bit: true",
                with_teacher(load_in_8bit=True),
            )
        if not teacher.get("load_in_4bit"):
            yield (
                "the teacher in 4 bit",
                "dwakd:\n  teacher:\n    load_in_4bit: true",
                with_teacher(load_in_8bit=False, load_in_4bit=True),
            )
        yield (
            "the teacher's states from a cache on disk",
            "dwakd:\n  teacher:\n    cache: teacher_states",
            with_teacher(cache="teacher_states"),
        )
    if teacher.get("dtype", "auto") in ("auto", "float32") and now.card.kind == "cuda":
        yield (
            "the teacher in bfloat16",
            "dwakd:\n  teacher:\n    dtype: bfloat16",
            with_teacher(dtype="bfloat16"),
        )
    if not recipe.get("gradient_checkpointing"):
        yield (
            "gradient checkpointing",
            "gradient_checkpointing: true",
            recipe | {"gradient_checkpointing": True},
        )
    if "8bit" not in str(recipe.get("optimizer")):
        yield (
            "an optimizer with 8-bit state",
            "optimizer: adamw_bnb_8bit",
            recipe | {"optimizer": "adamw_bnb_8bit"},
        )
    if not recipe.get("adapter"):
        lora = {"adapter": "lora", "lora_r": 16, "lora_alpha": 32, "lora_target_linear": True}
        yield (
            "a LoRA instead of full fine-tuning",
            "\n".join(f"{key}: {json.dumps(value)}" for key, value in lora.items()).replace(
                '"', ""
            ),
            recipe | lora,
        )
    batch = now.micro_batch
    if batch > 1:
        smaller = max(1, batch // 2)
        steps = int(recipe.get("gradient_accumulation_steps") or 1) * math.ceil(batch / smaller)
        changed = {"micro_batch_size": smaller, "gradient_accumulation_steps": steps}
        yield (
            "half the micro-batch, twice the accumulation",
            "\n".join(f"{key}: {value}" for key, value in changed.items()),
            recipe | changed,
        )
    length = now.lengths.student
    if length >= 128:
        yield (
            "half the sequence length (longer rows are dropped)",
            f"sequence_len: {length // 2}",
            recipe | {"sequence_len": length // 2},
        )
