"""The parts of what a recipe's run holds on a card, each by itself: weights, states, activations.

What a step allocates is traced (`trace`), weights are counted (`model_sizes`); the rest is
arithmetic, and every constant of it stands below with its reason. Bytes throughout.

    B rows of a micro-batch   S, T response tokens of a row   d, D widths   Vs, Vt rows of the heads
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

import torch

from dwakd_plugin.errors import UserError
from dwakd_plugin.loss import own_loss_config, tokens_per_chunk_of, trained_projectors, variant_of
from dwakd_plugin.models.teacher.loaded import teacher_device, teacher_dtype
from dwakd_plugin.models.teacher.quantisation import asked, describe, own_quantisation
from dwakd_plugin.plan.cards import Card
from dwakd_plugin.plan.loss_trace import SPELT_SHARE, HeadTrace, LossSizes
from dwakd_plugin.plan.model_sizes import (
    FLOAT,
    Layer,
    Model,
    lora_settings,
    optimizer_bytes,
    quantisation_scratch,
    weight_bytes,
)
from dwakd_plugin.plan.own_answers import read_in_a_step
from dwakd_plugin.plan.recipe_models import (
    body_trace,
    config_of,
    head_trace,
    like_a_llama,
    loss_trace,
    model_of,
)
from dwakd_plugin.plan.soft_dtw import soft_dtw_bytes
from dwakd_plugin.plan.trace import TraceError
from dwakd_plugin.recipe.schema import DWAKDConfig

# What a process takes beside tensors. On a CPU: what axolotl, the data set, numba's compiler and
# the thread pools' scratch memory added to the imports, measured with a pair of a few thousand
# parameters (docs/planning.md, "tiny pair"). On a GPU: the CUDA context and cuBLAS' workspaces.
CPU_RUNTIME = 120 * 2**20
CUDA_RUNTIME = 700 * 2**20
TOKEN_BYTES = 8  # in a batch, of a likely token of the teacher's and its probability


@dataclass(frozen=True)
class Lengths:
    """Tokens of a row: all of them, and those of the response, on both sides."""

    student: int
    teacher: int
    student_response: int
    teacher_response: int


class Parts:
    """What one recipe's run holds on one card, part by part."""

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
        self.student = model_of("base_model", *self.student_key, self.lora)
        self.served = teacher.server is not None
        # Whether anything of it is here, in this run or where its cache is filled.
        self.has_teacher = config.loss.needs_teacher and not self.served
        if not self.has_teacher:
            self.teacher = Model(teacher.called, (), 0, self.student.head_rows, 0)
            self.assume(
                "the teacher is on its server, and takes nothing here but what it says"
                if config.loss.needs_teacher
                else "no term asks for the teacher, and none is loaded"
            )
        else:
            self.teacher = model_of("dwakd.teacher.base_model", *self.teacher_key, None)
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
        self.teacher_dtype, self.teacher_bits = torch.float32, 0
        if self.has_teacher:
            teacher_config = config_of("dwakd.teacher.base_model", *self.teacher_key)
            self.teacher_dtype = teacher_dtype(
                teacher, teacher_config, teacher_device(teacher, on.kind)
            )
            self.teacher_bits = self._teacher_bits(own_quantisation(teacher_config))
        # A body that is elsewhere leaves embeddings and head with the student.
        self.elsewhere = on.kind == "cuda" and teacher.device not in (None, "cuda", "cuda:0")
        if self.elsewhere:
            self.assume(f"the teacher's body is not on this card: device is {teacher.device}")
        self.cached = config.loss.needs_teacher and (teacher.cache is not None or self.served)
        self.accumulation = int(recipe.get("gradient_accumulation_steps") or 1)
        read = read_in_a_step(config, self.cached, batch, self.accumulation)
        self.live_share, self.live_rows = read
        self.reads_here = self.live_rows > 0 and not self.elsewhere
        # Of a teacher whose likeliest tokens are in a cache nothing is loaded.
        self.kept_tokens = teacher.top_k if self.cached else None
        self.losses = [config.loss]
        if config.sampled_answers is not None:
            self.losses.append(own_loss_config(config.sampled_answers, config.loss))

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

    @property
    def student_bits(self) -> int:
        return 8 if self.recipe.get("load_in_8bit") else 4 if self.recipe.get("load_in_4bit") else 0

    def student_weights(self) -> int:
        return weight_bytes(self.student, self.student_weight_dtype, self.student_bits)

    @property
    def student_head(self) -> Layer:
        """The weight that logits are made with; whether it trains, a copy beside it may say."""
        head = [weight for weight in self.student.weights if weight.embedding][-1]
        copies = (w for w in self.student.weights if w.adapter and w.numel == head.numel)
        return next(copies, head)

    def _teacher_bits(self, own: dict[str, Any] | None) -> int:
        """Of its linear layers: 8 or 4 by bitsandbytes, 0 where they have the teacher's dtype."""
        if own is None:
            return {"load_in_8bit": 8, "load_in_4bit": 4, None: 0}[asked(self.config.teacher)]
        bits = 8 if "8" in describe(own) else 4
        self.assume(
            f"the teacher's checkpoint ({describe(own)}) takes what bitsandbytes' {bits} bit would"
        )
        return bits

    def teacher_weights(self, *, body: bool) -> int:
        model = self.teacher
        if not body and self.kept_tokens is not None:
            return 0
        if not body:  # a cache has embeddings and head
            tables = tuple(weight for weight in model.weights if weight.embedding)
            model = replace(model, weights=tables)
        return weight_bytes(model, lambda _: self.teacher_dtype, self.teacher_bits)

    def projectors(self) -> list[Layer]:
        trained = trained_projectors(self.config.loss)
        if not trained:
            return []
        d, D = self.student.hidden_size, self.teacher.hidden_size
        shapes = {"query": (2 * D, 2 * d), "t2s": (d, D), "s2t": (D, d), "embed_t2s": (d, D)}
        return [
            layer
            for name, (rows, columns) in shapes.items()
            for layer in (
                Layer(name, rows, columns, trained=name in trained),
                Layer(f"{name}.bias", rows, 1, trained=name in trained),
            )
        ]

    def optimizer(self) -> float:
        name = str(self.recipe.get("optimizer") or "adamw_torch_fused")
        if "paged" in name.lower():
            self.assume(f"{name}: its pages are counted as if none had moved to the CPU's memory")
        state = 0.0
        for weight, itemsize in self.trained():
            size, assumed = optimizer_bytes(name, weight, itemsize)
            if assumed:
                self.assume(assumed)
            state += size
        return state

    def trained(self) -> list[tuple[Layer, int]]:
        """Trained weights, each with the bytes of an element."""
        own = [
            (w, self.student_weight_dtype(w).itemsize) for w in self.student.weights if w.trained
        ]
        return own + [(weight, FLOAT) for weight in self.projectors() if weight.trained]

    def gradients(self) -> int:
        return sum(weight.numel * size for weight, size in self.trained())

    def weights(self) -> dict[str, float]:
        """What is there from the first step to the last, but for the optimizer's state."""
        runtime = CPU_RUNTIME if self.card.kind == "cpu" else CUDA_RUNTIME
        return {
            "student weights": self.student_weights(),
            "teacher weights": self.teacher_weights(body=self.reads_here),
            "projectors": sum(FLOAT * layer.numel for layer in self.projectors())
            + self._head_follower(),
            "runtime": runtime,
        }

    def _head_follower(self) -> int:
        """Where a projector follows the student's head: a factor (D, D) in float64."""
        follows = self.projectors() and variant_of(self.config.loss).follows_head
        return 8 * self.teacher.hidden_size**2 if follows and self.student_head.trained else 0

    def waiting_states(self) -> int:
        """Of cached teacher states in batches that wait: the trainer fetches all micro-batches of a
        step at once, and its data loader one more, which stays in the CPU's memory."""
        if not self.cached:
            return 0
        more = 1 if self.card.kind == "cpu" else 0
        waiting = self.batch * self.lengths.teacher_response * (self.accumulation - 1 + more)
        if self.kept_tokens is not None:
            return waiting * self.kept_tokens * TOKEN_BYTES
        kept = self.config.teacher.cache_dtype
        # Read back, float8 is float32.
        dtype = {"auto": self.teacher_dtype, "float8_e4m3": torch.float32}.get(kept)
        itemsize = (dtype or getattr(torch, kept)).itemsize
        return waiting * self.teacher.hidden_size * itemsize

    # -- what a step allocates --------------------------------------------------------------------

    def body(self, side: str, *, reading: int = 0) -> tuple[float, float, float]:
        """Held after forward, forward's peak, and backward's need beside what is held.

        reading: so many rows go through it instead of a micro-batch, without a graph.
        """
        if side == "teacher" and not self.has_teacher:
            return 0, 0, 0
        student = side == "student"
        training = student and not reading
        model = self.student if student else self.teacher
        batch = reading or self.batch
        length = self.lengths.student if student else self.lengths.teacher
        dtype = self.student_dtype if student else self.teacher_dtype
        checkpointing = training and bool(self.recipe.get("gradient_checkpointing"))
        attention = str(
            self.recipe.get("attn_implementation") or ""
            if student
            else self.config.teacher.attn_implementation
        )
        eager = attention == "eager" or (student and bool(self.recipe.get("eager_attention")))
        try:
            trace = body_trace(
                *(self.student_key if student else self.teacher_key),
                self.lora if student else None,
                length,
                dtype,
                self.autocast if student else None,
                "eager" if eager else "sdpa",
                self.card.kind == "cuda" and not eager,
                training,
                checkpointing,
            )
            held, peak, backward = trace.at(batch)
        except TraceError as error:
            self.assume(
                f"the {side}'s architecture cannot be traced ({str(error)[:80]}): its activations "
                "are those of a Llama of the same width"
            )
            held, peak, backward = like_a_llama(
                model, length, dtype.itemsize, batch, training, checkpointing
            )
        bits = self.student_bits if student else self.teacher_bits
        scratch = quantisation_scratch(model, bits, dtype.itemsize, batch * length)
        return held, peak + scratch[0], backward + scratch[1]

    def head_pass(self) -> tuple[float, float]:
        """Of the pass that takes most: heads in another dtype or as gradients, and the logits of a
        chunk, forward or backward."""
        B, lengths = self.batch, self.lengths
        places = B * lengths.student_response, B * lengths.teacher_response
        # A spelling goes on once at least, and where it does less lives at once than at its first.
        spelt = round(SPELT_SHARE / 2 * places[1])
        teacher = self.teacher.head_rows * self.teacher.hidden_size
        found = [(0.0, 0.0)]
        for also_spelt, tokens in ((False, places), (True, (spelt, spelt))):
            chunks = [*map(self._chunk_of, self.head_rows, tokens)]
            for each in self.head_traces(spelt=also_spelt):
                copies = each.copies[0] * self.student_head.numel + each.teacher_copies * teacher
                found.append((copies, max(each.at(*chunks))))
        return max(found, key=sum)

    @property
    def head_rows(self) -> tuple[int, int]:
        return self.student.head_rows, self.teacher.head_rows

    def head_traces(self, *, spelt: bool = False) -> list[HeadTrace]:
        """Of each loss; `spelt` as `trace_heads` has it."""
        cpu = self.card.kind == "cpu"
        sizes = replace(self.loss_sizes(), S=0, T=0, d=0)  # which make no difference
        return [
            head_trace(sizes, loss.model_dump_json(), self.head_rows, spelt, cpu)
            for loss in self.losses
        ]

    def head_gradients(self) -> int:
        """Of the student's head, at backward's beginning at most."""
        traces = self.head_traces(spelt=True)
        return max(max(each.copies[1:]) * self.student_head.numel for each in traces)

    def _chunk_of(self, rows: int, tokens: int) -> int:
        return min(tokens, self.chunk(rows))

    def chunk(self, rows: int) -> int:
        """Tokens that go through a head of so many rows at once, on this card."""
        size = self.config.loss.chunk_size
        return tokens_per_chunk_of(size, rows, self.card.kind, self.card.capacity)

    def loss_sizes(self) -> LossSizes:
        head = self.student_head
        return LossSizes(
            self.lengths.student_response,
            self.lengths.teacher_response,
            self.student.hidden_size,
            self.teacher.hidden_size,
            self.student_dtype,
            self.teacher_dtype,
            self.student_weight_dtype(head),
            head.trained,
            self.autocast,
            self.config.teacher.top_k if self.config.loss.needs_teacher else None,
        )

    def loss(self) -> tuple[float, float, float]:
        """Beside logits and soft-DTW: held, forward's peak, backward's peak."""
        cpu, sizes = self.card.kind == "cpu", self.loss_sizes()
        traces = [loss_trace(sizes, loss.model_dump_json(), cpu) for loss in self.losses]
        held, forward, backward = (
            max(sizes) for sizes in zip(*(trace.at(self.batch) for trace in traces), strict=True)
        )
        return held, forward, backward

    @property
    def warps(self) -> bool:
        loss = self.config.loss
        return any(term.role == "warp" for term in variant_of(loss).active(loss))

    def dtw(self) -> tuple[float, float, float]:
        """Soft-DTW at work, what it leaves for backward, and at work there."""
        if not self.warps:
            return 0, 0, 0
        lengths, d, D = self.lengths, self.student.hidden_size, self.teacher.hidden_size
        return soft_dtw_bytes(
            self.card.kind,
            self.batch,
            lengths.student_response,
            lengths.teacher_response,
            d,
            D,
            band=self.config.soft_dtw.band,
        )

    def assume(self, text: str) -> None:
        if text not in self.assumptions:
            self.assumptions.append(text)


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
