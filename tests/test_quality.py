"""The quality benchmark's parts: what it trims, what it trains with, and how it compares."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.quality import methods, report
from benchmarks.quality.materials import TEST_SETS, Materials, rendered, trim_vocabulary
from benchmarks.quality.runs import Run, recipe
from dwakd_cli import embedded
from dwakd_plugin.config import parse_recipe

TEXTS = ["the cat sat on the mat", "the dog sat on a log", "<|endoftext|>", "12 cats, 12 mats"]


def test_a_trimmed_teacher_is_the_same_model_on_these_texts(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = embedded.train_tokenizer([*TEXTS, "a quite different sentence, quite"] * 3, 400)
    sizes = {"hidden_size": 16, "layers": 1, "heads": 2, "intermediate_size": 32, "seed": 1}
    whole = embedded.create_student(tmp_path / "whole", tokenizer, **sizes)
    trim_vocabulary(whole, TEXTS, tmp_path / "trimmed")
    both = []
    for folder in (whole, tmp_path / "trimmed"):
        own = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        ids = [own(text, return_tensors="pt")["input_ids"] for text in TEXTS]
        with torch.no_grad():
            states = [model.model(input_ids=one).last_hidden_state for one in ids]
        words = [own.convert_ids_to_tokens(one[0]) for one in ids]
        both.append((words, states, model.get_output_embeddings().weight.shape[0], own))
    (words, states, rows, _), (trimmed_words, trimmed_states, fewer, own) = both
    assert trimmed_words == words
    torch.testing.assert_close(trimmed_states, states)
    assert 256 < fewer < rows
    other = "Other wörds are spelled with what is left"
    assert own.decode(own(other)["input_ids"]) == other


@pytest.mark.parametrize("method", methods.METHODS)
def test_every_trial_is_a_valid_recipe(method: str, tmp_path: Path) -> None:
    """And each method has as many as the others."""
    seen: list[Run] = []

    def train(runs: list[Run]) -> list[float]:
        seen.extend(runs)
        return [float(index) for index, _ in enumerate(runs)]

    if method == "sft":
        best = methods.tune_sft(train, methods.LEARNING_RATES, "tune", {})
    else:
        best = methods.tune([method], 1e-3, train)[method]
    assert len({run.name for run in seen}) == (4 if method == "sft" else 3)
    assert best.name == seen[0].name
    assert [run.seed for run in methods.with_seeds(method, best, 3)] == [1, 2, 3]
    if method == "dwakd":
        seen += [run for runs in methods.ablations(best, 2).values() for run in runs]
    for run in seen:
        settings = parse_recipe(recipe(Materials(tmp_path), run))
        assert settings is not None
        assert settings.loss.needs_teacher == (method != "sft")


def test_few_rows_are_read_as_often_as_there_are_fewer(tmp_path: Path) -> None:
    base = Materials(tmp_path)
    base.rows("train").parent.mkdir()
    base.rows("train").write_text("{}\n" * 40, encoding="utf-8")
    tuned = Run("tune-dwakd-paper", {"variant": "full"}, 1e-3)
    ((group, runs),) = methods.few_rows(base, {"dwakd": tuned, "uld": tuned}, 2).items()
    settings = recipe(base, runs[0])
    assert group == "dwakd" and [run.seed for run in runs] == [1, 2]
    assert settings["num_epochs"] == 4 and settings["datasets"][0]["path"].endswith("few.jsonl")
    assert base.rows("few").read_text(encoding="utf-8") == "{}\n" * 10


def test_difference_is_students_interval_over_paired_seeds() -> None:
    mean, low, high = report.difference([1.0, 2.0, 4.0], [0.0, 2.0, 2.0])
    assert mean == pytest.approx(1.0)
    assert (low, high) == (pytest.approx(1 - 2.48414, abs=1e-4), pytest.approx(1 + 2.48414))
    assert report.difference([1.0], [0.5, 0.7]) == (0.5, float("-inf"), float("inf"))


def test_tables_and_picture_come_from_the_groups(tmp_path: Path) -> None:
    def figures(values: list[float]) -> dict[str, dict[str, list[float]]]:
        return {metric: dict.fromkeys((*TEST_SETS, "mean"), values) for metric in report.METRICS}

    groups = {"sft": figures([2.0, 2.1]), "dwakd": figures([1.9, 2.0]), "uld": figures([2.2])}
    text = report.tables({"groups": groups})
    line = next(line for line in text.splitlines() if line.startswith("| dwakd | 2 |"))
    assert "1.9500 ± 0.0707" in line and "-0.1000 (" in line
    report.plot({"groups": groups}, tmp_path / "quality.png")
    assert (tmp_path / "quality.png").read_bytes().startswith(b"\x89PNG")


def test_prompts_name_an_input_only_where_there_is_one() -> None:
    row = {"instruction": "Sum up.", "input": "Long.", "output": ["Short.", "Brief."]}
    assert rendered(row) == ("### Instruction:\nSum up.\nLong.\n\n### Response:\n", "Short.")
    row = {"instruction": "Why?", "input": "", "output": "So."}
    assert rendered(row) == ("### Instruction:\nWhy?\n\n### Response:\n", "So.")
