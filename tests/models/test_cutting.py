"""Fewer layers and another vocabulary, on every family, against plain transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from dwakd_plugin.errors import UserError
from dwakd_plugin.models.causal_lm import output_head
from dwakd_plugin.models.cutting import (
    SHAPES,
    Reader,
    change,
    choices,
    influences,
    keep_layers,
    loss,
    readings,
    shape_of,
)
from dwakd_plugin.models.new_vocabulary import replace_vocabulary, rows_from
from dwakd_plugin.tokenizers.respelling import spellings
from dwakd_plugin.tokenizers.training import train_tokenizer
from tests import families
from tests.cutting import CAN, TEXTS, deep, ids_of, load, logits

# Layers


@pytest.mark.parametrize("name", CAN)
def test_all_layers_kept_is_the_very_model(name, tmp_path, monkeypatch):
    model = load(deep(name, tmp_path / "model", monkeypatch))
    before = logits(model, ids_of(model))
    keep_layers(model, [0, 1, 2, 3])
    assert torch.equal(logits(model, ids_of(model)), before)


class Through(nn.Module):
    """A layer that gives on what it is given."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.attention_type = getattr(layer, "attention_type", None)

    def forward(self, hidden_states: Tensor, *args: Any, **options: Any) -> Tensor:
        return hidden_states


@pytest.mark.parametrize("name", CAN)
def test_a_cut_model_is_the_model_whose_other_layers_do_nothing(name, tmp_path, monkeypatch):
    """The oracle leaves configs alone; the cut one is saved and loaded by plain transformers."""
    folder = deep(name, tmp_path / "model", monkeypatch)
    kept = [0, 2, 3]
    whole = load(folder)
    layers = getattr(whole.base_model, shape_of(whole.config).layers)
    layers[1] = Through(layers[1])
    expected = logits(whole, ids_of(whole))
    model = load(folder)
    keep_layers(model, kept)
    assert torch.equal(logits(model, ids_of(model)), expected)
    model.save_pretrained(tmp_path / "cut")
    loaded, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "cut", dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert loaded.config.num_hidden_layers == 3
    assert torch.equal(logits(loaded.eval(), ids_of(loaded)), expected)
    # With a cache, where layers know their place.
    prompt = ids_of(loaded, 1, 8)
    made = model.generate(prompt, max_new_tokens=6, do_sample=False)
    assert torch.equal(made, loaded.generate(prompt, max_new_tokens=6, do_sample=False))


def test_lists_by_layer_are_cut_along(tmp_path, monkeypatch):
    qwen = load(deep("qwen2-instruct", tmp_path / "qwen", monkeypatch))
    assert qwen.config.layer_types == ["full_attention"] * 2 + ["sliding_attention"] * 2
    keep_layers(qwen, [0, 2, 3])
    assert qwen.config.layer_types == ["full_attention"] + ["sliding_attention"] * 2
    assert qwen.config.max_window_layers == 1
    gemma = load(deep("gemma3", tmp_path / "gemma", monkeypatch))
    keep_layers(gemma, [1, 3])
    assert gemma.config.layer_types == ["full_attention"] * 2


@pytest.mark.parametrize("name", CAN)
def test_a_reader_without_layers_is_the_model_without_them(name, tmp_path, monkeypatch):
    model = load(deep(name, tmp_path / "model", monkeypatch))
    ids = ids_of(model)
    found = loss(Reader(model, ids), [0, 3])
    keep_layers(model, [0, 3])
    expected = nn.functional.cross_entropy(
        logits(model, ids)[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="sum"
    )
    assert found == pytest.approx(expected.item(), rel=1e-5)  # float32 sums in another order


def test_influence_is_that_of_hidden_states(tmp_path, monkeypatch):
    model = load(deep("llama", tmp_path / "model", monkeypatch))
    ids = ids_of(model)
    with torch.no_grad():
        states = model(input_ids=ids, output_hidden_states=True).hidden_states
    found = influences(Reader(model, ids), range(4))
    for index in range(3):  # the last state is given after the norm
        one, other = states[index].double(), states[index + 1].double()
        cosine = (one * other).sum(-1) / one.norm(dim=-1) / other.norm(dim=-1)
        assert found[index] == pytest.approx((1 - cosine).sum().item(), rel=1e-4)
    assert change(states[0], 3 * states[0]) == pytest.approx(0, abs=1e-4)


def test_a_layer_that_does_nothing_goes_first_and_the_others_are_measured_anew(
    tmp_path, monkeypatch
):
    model = load(deep("llama", tmp_path / "model", monkeypatch))
    idle = model.model.layers[2]
    with torch.no_grad():
        idle.self_attn.o_proj.weight.zero_()
        idle.mlp.down_proj.weight.zero_()
    ids = ids_of(model, 4)
    readers = [Reader(model, some) for some in ids.split(2)]
    called: list[int] = []
    first, (at_once, one_by_one) = choices(readers, 4, 2, lambda: called.append(1))
    assert len(called) == len(readers) * readings(4, 2)
    assert first == pytest.approx(
        [each / ids.numel() for each in influences(Reader(model, ids), range(4))], rel=1e-5
    )
    assert first[2] == pytest.approx(0, abs=1e-6)
    assert (at_once.way, one_by_one.way) == ("at once", "one by one")
    assert at_once.left_out == sorted(range(4), key=first.__getitem__)[:2]
    anew = influences(Reader(model, ids), [0, 1, 3])
    assert one_by_one.left_out == [2, [0, 1, 3][anew.index(min(anew))]]
    for choice in (at_once, one_by_one):
        rest = [index for index in range(4) if index not in choice.left_out]
        whole = loss(Reader(model, ids), rest) / (4 * 39)
        assert choice.loss == pytest.approx(whole, rel=1e-5)
    before = logits(model, ids)
    keep_layers(model, [0, 1, 3])
    assert torch.equal(logits(model, ids), before)


def test_other_kinds_are_refused_by_name(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"kind `opt` cannot be cut.*llama.*gpt2"):
        shape_of(load(families.create("opt", tmp_path / "opt")).config)
    folder = deep("gpt2", tmp_path / "model", monkeypatch, scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(UserError, match="scale_attn_by_inverse_layer_idx"):
        shape_of(load(folder).config)
    config = load(deep("llama", tmp_path / "llama", monkeypatch)).config
    config.quantization_config = {"quant_method": "gptq"}
    with pytest.raises(UserError, match="quantised"):
        shape_of(config)
    assert set(SHAPES) >= {"llama", "mistral", "qwen2", "qwen3", "gemma3_text", "gpt2"}


# Vocabulary


def test_rows_are_copies_means_and_the_mean_of_all():
    torch.manual_seed(0)
    weight = torch.randn(7, 3)
    rows = rows_from(weight, [[4], [], [1, 2, 2], [6]], known=5)
    assert torch.equal(rows[0], weight[4]) and torch.equal(rows[3], weight[6])
    torch.testing.assert_close(rows[1], weight[:5].mean(0))
    torch.testing.assert_close(rows[2], (weight[1] + 2 * weight[2]) / 3)
    assert rows_from(weight.bfloat16(), [[1]], 5).dtype == torch.bfloat16
    bias = rows_from(weight[:, 0], [[2], [0, 1]], 5)
    torch.testing.assert_close(bias, torch.stack([weight[2, 0], weight[:2, 0].mean()]))


@pytest.mark.parametrize("name", CAN)
def test_the_same_tokenizer_again_changes_nothing(name, tmp_path, monkeypatch):
    folder = deep(name, tmp_path / "model", monkeypatch)
    model, tokenizer = load(folder), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(TEXTS[0], return_tensors="pt")["input_ids"]
    before = logits(model, ids)
    spelled = spellings(tokenizer, tokenizer)
    doubled = {id for id, same in enumerate(spelled) if same != [id]}
    known = tokenizer.get_vocab()  # a byte fallback beside an ordinary token of the same byte
    assert all(tokenizer.convert_ids_to_tokens(id).startswith("<0x") for id in doubled), known
    replace_vocabulary(model, spelled, len(tokenizer))
    assert torch.equal(logits(model, ids), before[..., : len(tokenizer)]) or doubled
    kept = [id for id in range(len(tokenizer)) if id not in doubled]
    assert torch.equal(logits(model, ids)[..., kept], before[..., kept])


@pytest.mark.parametrize("name", CAN)
def test_a_new_tokenizer_under_each_family(name, tmp_path, monkeypatch):
    folder = deep(name, tmp_path / "model", monkeypatch)
    model, old = load(folder), AutoTokenizer.from_pretrained(folder)
    new = train_tokenizer(TEXTS, 420)
    tied = model.config.tie_word_embeddings
    table = model.get_input_embeddings().weight.detach().clone()
    head = output_head(model).weight.detach().clone()
    spelled = spellings(new, old)
    replace_vocabulary(model, spelled, len(old))
    assert model.config.vocab_size == len(new) == len(spelled)
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) is bool(
        tied
    )
    rows = model.get_input_embeddings().weight
    exact = [index for index, ids in enumerate(spelled) if len(ids) == 1]
    assert len(exact) > 256
    assert torch.equal(rows[exact], table[[spelled[index][0] for index in exact]])
    several = [index for index, ids in enumerate(spelled) if len(ids) > 1]
    for index in several:
        torch.testing.assert_close(rows[index], table[spelled[index]].mean(0))
    assert torch.equal(
        model.get_output_embeddings().weight[exact],
        head[[spelled[index][0] for index in exact]],
    )
    # Texts of exact tokens are read as before: scaled embeddings (Gemma) are scaled as they were.
    model.save_pretrained(tmp_path / "new")
    loaded = load(tmp_path / "new")
    some = torch.tensor([exact[5:45]])
    same = torch.tensor([[spelled[index][0] for index in exact[5:45]]])
    whole = logits(load(folder), same)[..., [spelled[index][0] for index in exact]]
    torch.testing.assert_close(logits(loaded, some)[..., exact], whole)


def test_a_head_with_a_bias_gets_its_means(tmp_path, monkeypatch):
    model = load(deep("llama", tmp_path / "model", monkeypatch))
    model.lm_head.bias = nn.Parameter(torch.randn(model.config.vocab_size))
    bias = model.lm_head.bias.detach().clone()
    replace_vocabulary(model, [[3], [1, 2], []], 300)
    expected = torch.stack([bias[3], bias[1:3].mean(), bias[:300].mean()])
    torch.testing.assert_close(model.get_output_embeddings().bias.detach(), expected)
