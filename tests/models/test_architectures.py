"""Each architecture, as student and as teacher: the model's own logits, whatever the padding."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from axolotl.monkeypatch.lora_kernels import patch_self_attn_lora
from axolotl.prompt_tokenizers import AlpacaPromptTokenizingStrategy
from axolotl.prompters import AlpacaPrompter
from axolotl.utils.dict import DictDefault
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, CohereConfig, GraniteConfig
from transformers.models.gpt2.modeling_gpt2 import GPT2Attention
from transformers.models.llama.modeling_llama import LlamaAttention
from transformers.models.opt.modeling_opt import OPTAttention

from dwakd_plugin.data.collator import DISTILLATION_KEYS, DualCollator
from dwakd_plugin.errors import UserError
from dwakd_plugin.loss import LossTerms, ResponseStates, dwakd_loss
from dwakd_plugin.models.causal_lm import (
    check_positions,
    embedding_table,
    hidden_states,
    output_head,
)
from dwakd_plugin.models.projectors import Projectors
from dwakd_plugin.models.student import student_states
from dwakd_plugin.models.teacher.loaded import Teacher, load_teacher
from dwakd_plugin.recipe.schema import TeacherConfig
from tests.conftest import ROWS, SHARED
from tests.families import FAMILIES, WIDTHS, WINDOW, create
from tests.runs import TERMS

CHOSEN = (ROWS[1], ROWS[7], ROWS[3], ROWS[8])  # two are not ASCII, and their lengths differ

# Each is a student once and a teacher once.
NAMES = list(FAMILIES)
PAIRS = list(zip(NAMES, [*NAMES[5:], *NAMES[:5]], strict=True))

Zoo = Callable[[str], Path]


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    """The folder of a family's tiny model, made when it is asked for."""
    root = tmp_path_factory.mktemp("zoo")

    def folder(name: str) -> Path:
        return root / name if (root / name).is_dir() else create(name, root / name)

    return folder


def tokenised(student: Any, teacher: Any) -> list[dict[str, Any]]:
    """The rows through axolotl's alpaca strategy, once per tokenizer."""
    rows = []
    for index, row in enumerate(CHOSEN):
        own, theirs = (
            AlpacaPromptTokenizingStrategy(
                AlpacaPrompter(), tokenizer, train_on_inputs=False, sequence_len=2048
            ).tokenize_prompt(row)
            for tokenizer in (student, teacher)
        )
        rows.append(
            {
                **own,
                "teacher_input_ids": theirs["input_ids"],
                "teacher_labels": theirs["labels"],
                "source_row": index,
            }
        )
    return rows


def collated(rows: list[dict[str, Any]], tokenizer: Any, side: str) -> dict[str, Tensor]:
    tokenizer.padding_side = side
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # as axolotl does
    return DualCollator(tokenizer=tokenizer)(rows)


def states(student: Any, inputs: dict[str, Tensor]) -> tuple[ResponseStates, dict[str, Tensor]]:
    inputs = dict(inputs)
    batch = {key: inputs.pop(key) for key in DISTILLATION_KEYS if key in inputs}
    return student_states(student, batch, **inputs), batch


def terms(
    student: Any, teacher: Teacher, projectors: Projectors, inputs: dict[str, Tensor]
) -> LossTerms:
    own, batch = states(student, inputs)
    return dwakd_loss(own, teacher.states(batch), projectors)


class Pair:
    """A student, a teacher, projectors, and rows tokenised for both."""

    def __init__(self, student: Path, teacher: Path) -> None:
        # Gemma 2's own advice: sdpa would leave out its soft-capping.
        attention = "eager" if student.name == "gemma2" else "sdpa"
        self.student = AutoModelForCausalLM.from_pretrained(
            student, attn_implementation=attention
        ).eval()
        self.teacher = load_teacher(TeacherConfig.model_validate(str(teacher)), "cpu")
        self.tokenizer = AutoTokenizer.from_pretrained(student)
        self.rows = tokenised(self.tokenizer, AutoTokenizer.from_pretrained(teacher))
        torch.manual_seed(3)
        width = embedding_table(self.student).weight.shape[1]
        self.projectors = Projectors(width, self.teacher.hidden_size)


def check_logits(model: Any, rows: list[dict[str, Any]], given: ResponseStates, key: str) -> None:
    """The states' logits are the model's own for each row alone, at its response positions."""
    labels_key = "teacher_labels" if key == "teacher_input_ids" else "labels"
    for index, row in enumerate(rows):
        ids = torch.tensor(row[key])
        counts = torch.tensor(row[labels_key])[1:] != -100
        own = model(input_ids=ids[None]).logits[0, :-1][counts]
        length = int(given.lengths[index])
        assert length == int(counts.sum())
        mine = given.head.logits(given.hidden[index, :length])
        assert mine.shape == own.shape
        assert (mine - own).abs().max() < 1e-5 * own.abs().max()
        embeddings = model.get_input_embeddings()(ids)
        assert torch.equal(given.input_embeds[index, :length], embeddings[:-1][counts])
        assert torch.equal(given.target_embeds[index, :length], embeddings[1:][counts])


@torch.no_grad()
def check_pair(pair: Pair) -> None:
    """Logits, and terms that are those of single rows without padding, on either side."""
    single = [
        terms(pair.student, pair.teacher, pair.projectors, collated([row], pair.tokenizer, "right"))
        for row in pair.rows
    ]
    for side in ("right", "left"):
        inputs = collated(pair.rows, pair.tokenizer, side)
        assert not inputs["attention_mask"].all()
        own, batch = states(pair.student, inputs)
        check_logits(pair.student, pair.rows, own, "input_ids")
        check_logits(pair.teacher.model, pair.rows, pair.teacher.states(batch), "teacher_input_ids")
        together = terms(pair.student, pair.teacher, pair.projectors, inputs)
        for name, value in vars(together).items():
            alone = sum(getattr(each, name) for each in single)
            assert torch.isfinite(value), name
            # float32 sums over some hundred tokens; accuracy is a count.
            assert float(value) == pytest.approx(float(alone), rel=2e-5, abs=1e-5), name
        assert all(float(getattr(together, name)) > 0 for name in TERMS)


def check_training(pair: Pair) -> None:
    """Two optimizer steps change every weight of the student and of the projectors."""
    inputs = collated(pair.rows, pair.tokenizer, "right")
    modules = {"student": pair.student, "projectors": pair.projectors}
    before = {
        side: {name: value.detach().clone() for name, value in module.named_parameters()}
        for side, module in modules.items()
    }
    frozen = {name: value.clone() for name, value in pair.teacher.model.named_parameters()}
    parameters = [value for module in modules.values() for value in module.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0)
    for _ in range(2):
        found = terms(pair.student, pair.teacher, pair.projectors, inputs)
        loss = sum(getattr(found, name) for name in TERMS) / found.student_tokens
        assert torch.isfinite(loss)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for side, module in modules.items():
        for name, value in module.named_parameters():
            assert torch.isfinite(value).all(), name
            assert not torch.equal(value, before[side][name]), name
    for name, value in pair.teacher.model.named_parameters():
        assert torch.equal(value, frozen[name]), name


@pytest.mark.parametrize(("student", "teacher"), PAIRS)
def test_an_architecture_on_both_sides(student: str, teacher: str, zoo: Zoo) -> None:
    pair = Pair(zoo(student), zoo(teacher))
    check_pair(pair)
    check_training(pair)


@pytest.mark.parametrize(
    ("student", "student_tokenizer", "teacher", "teacher_tokenizer"),
    [
        ("gpt2", "gpt2", "qwen2", "qwen1.5"),
        ("llama", "tinyllama", "mistral", "mistral-v0.1"),
        pytest.param(*("smollm2", "smollm2-instruct", "qwen3", "qwen1.5"), marks=pytest.mark.slow),
    ],
)
def test_real_tokenizers(
    student: str, student_tokenizer: str, teacher: str, teacher_tokenizer: str, tmp_path: Path
) -> None:
    if not (SHARED / "tokenizers").is_dir():
        pytest.skip("needs the real tokenizers")
    own, theirs = (
        AutoTokenizer.from_pretrained(SHARED / "tokenizers" / name)
        for name in (student_tokenizer, teacher_tokenizer)
    )
    check_pair(
        Pair(create(student, tmp_path / student, own), create(teacher, tmp_path / teacher, theirs))
    )


@pytest.mark.parametrize("name", ["mistral", "qwen2-instruct", "gemma2", "gemma3"])
@torch.no_grad()
def test_the_window_is_shorter_than_the_rows(name: str, zoo: Zoo) -> None:
    """What the other tests say of sliding windows, they say of windows that cut something off."""
    tokenizer = AutoTokenizer.from_pretrained(zoo(name))
    rows = tokenised(tokenizer, tokenizer)
    assert min(len(row["input_ids"]) for row in rows) > 2 * WINDOW
    ids = torch.tensor([rows[0]["input_ids"]])
    windowed = AutoModelForCausalLM.from_pretrained(zoo(name), attn_implementation="eager")
    whole = AutoModelForCausalLM.from_pretrained(
        zoo(name), attn_implementation="eager", sliding_window=4096
    )
    given, other = (hidden_states(model, ids, torch.ones_like(ids)) for model in (windowed, whole))
    assert torch.equal(given[:, :WINDOW], other[:, :WINDOW])
    assert not torch.allclose(given[:, WINDOW:], other[:, WINDOW:], rtol=1e-2)


@torch.no_grad()
def test_a_soft_capped_teacher_is_not_read_with_sdpa(zoo: Zoo) -> None:
    teacher = load_teacher(TeacherConfig.model_validate(str(zoo("gemma2"))), "cpu")
    assert teacher.attention.startswith("eager (no flash attention")
    assert "sdpa leaves out its soft-capping" in teacher.attention
    asked = TeacherConfig.model_validate(
        {"base_model": str(zoo("gemma2")), "attn_implementation": "sdpa"}
    )
    if not teacher.model._supports_sdpa:  # transformers says so itself from 5.24 on
        with pytest.raises(UserError, match="Gemma2ForCausalLM has no sdpa attention"):
            load_teacher(asked, "cpu")
        return
    sdpa = load_teacher(asked, "cpu")
    ids = torch.arange(10, 40)[None]
    given, other = (
        hidden_states(each.model, ids, torch.ones_like(ids)) for each in (teacher, sdpa)
    )
    assert not torch.allclose(given, other, rtol=1e-2)


@pytest.mark.parametrize(
    ("config_class", "scaling"),
    [(CohereConfig, {"logit_scale": 0.25}), (GraniteConfig, {"logits_scaling": 4.0})],
)
@torch.no_grad()
def test_a_head_scales_as_its_model_does(config_class: Any, scaling: dict[str, float]) -> None:
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config_class(**WIDTHS, vocab_size=64, **scaling))
    ids = torch.arange(1, 11)[None]
    mine = output_head(model).logits(hidden_states(model, ids, torch.ones_like(ids)))
    torch.testing.assert_close(mine, model(input_ids=ids).logits)


@pytest.mark.parametrize(("name", "count"), [("gpt2", 1024), ("opt", 1024), ("opt-350m", 1024)])
def test_rows_longer_than_the_learned_positions_are_refused(
    name: str, count: int, zoo: Zoo
) -> None:
    model = AutoModelForCausalLM.from_pretrained(zoo(name))
    check_positions(model, count, "sequence_len")
    model.config.max_position_embeddings = 4096  # as axolotl sets it
    with pytest.raises(UserError, match=f"learned {count} positions. Set sequence_len: {count}"):
        check_positions(model, count + 1, "sequence_len")
    ids = torch.zeros(1, count, dtype=torch.long)
    assert hidden_states(model, ids, torch.ones_like(ids)).shape[1] == count
    check_positions(AutoModelForCausalLM.from_pretrained(zoo("llama")), 10**6, "sequence_len")


@torch.no_grad()
def test_a_teacher_of_the_students_architecture_beside_lora_kernels(
    zoo: Zoo, monkeypatch: pytest.MonkeyPatch
) -> None:
    """axolotl's kernels rewrite the attention's class, which the teacher's layers have, too."""
    folder = zoo("llama")
    config = TeacherConfig.model_validate(str(folder))
    ids = torch.arange(5, 50)[None]
    exact = hidden_states(load_teacher(config, "cpu").model, ids, torch.ones_like(ids))
    monkeypatch.setattr(LlamaAttention, "forward", LlamaAttention.forward)  # to be put back
    monkeypatch.setattr(LlamaAttention, "_original_forward", None, raising=False)
    del LlamaAttention._original_forward
    patch_self_attn_lora(DictDefault(base_model=str(folder)))
    with pytest.raises(AttributeError, match="apply_qkv"):
        AutoModelForCausalLM.from_pretrained(folder)(input_ids=ids)
    patched = hidden_states(load_teacher(config, "cpu").model, ids, torch.ones_like(ids))
    assert torch.equal(patched, exact)


@pytest.mark.parametrize(("name", "attention"), [("gpt2", GPT2Attention), ("opt", OPTAttention)])
def test_lora_kernels_cannot_patch_these(name: str, attention: Any, zoo: Zoo) -> None:
    """Why the recipes turn them off: where this no longer fails, they need not."""
    words = r"not found|could not import|does not use a supported"  # the last since axolotl 0.21
    try:
        with pytest.raises((AssertionError, ValueError), match=words):
            patch_self_attn_lora(DictDefault(base_model=str(zoo(name))))
    finally:
        if "_original_forward" in vars(attention):
            del attention._original_forward
