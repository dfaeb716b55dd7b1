"""The quality benchmark's parts: what it trims, what it trains with, and how it compares."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import data_efficiency
from benchmarks.gain import at_their_best
from benchmarks.quality import answers, by_token, methods, report
from benchmarks.quality.gold import gold_loss, use_gold
from benchmarks.quality.gold_trainer import train_with_gold
from benchmarks.quality.materials import (
    TEST_SETS,
    Materials,
    fine_tune,
    pretrain,
    rendered,
    trim_vocabulary,
)
from benchmarks.quality.runs import Run, recipe
from benchmarks.small_student import create_student
from dwakd_plugin.data.row_report import RowReport
from dwakd_plugin.evaluate.held_out import held_out_bits_per_byte
from dwakd_plugin.recipe.schema import DWAKDConfig, parse_recipe
from dwakd_plugin.tokenizers.training import train_tokenizer
from dwakd_plugin.train import trainer
from dwakd_plugin.train.distillation import PROJECTORS, Distillation, Facts
from dwakd_plugin.train.parts import parts_of

TEXTS = ["the cat sat on the mat", "the dog sat on a log", "<|endoftext|>", "12 cats, 12 mats"]


def test_a_trimmed_teacher_is_the_same_model_on_these_texts(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = train_tokenizer([*TEXTS, "a quite different sentence, quite"] * 3, 400)
    sizes = {"hidden_size": 16, "layers": 1, "heads": 2, "intermediate_size": 32, "seed": 1}
    whole = create_student(tmp_path / "whole", tokenizer, **sizes)
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


def test_a_tuned_teacher_has_learnt_the_responses(tmp_path: Path) -> None:
    """And where they end; the prompts are not learnt, and the file holds a whole model."""
    from transformers import AutoModelForCausalLM

    tokenizer = train_tokenizer([*TEXTS, "### Instruction: Response"] * 3, 300)
    sizes = {"hidden_size": 32, "layers": 2, "heads": 2, "intermediate_size": 64, "seed": 1}
    create_student(tmp_path / "untrained", tokenizer, **sizes)
    whole = tmp_path / "whole"
    pretrain(tmp_path / "untrained", TEXTS * 4, whole, epochs=40, length=16, learning_rate=1e-2)
    rows = [{"instruction": "Who sat?", "input": "", "output": "the cat sat"}] * 320
    fine_tune(whole, rows, tmp_path / "tuned", learning_rate=1e-2)
    prompt, output = (tokenizer(text)["input_ids"] for text in rendered(rows[0]))
    ids = torch.tensor([[*prompt, *output, tokenizer.eos_token_id]])
    losses = []
    for folder in (whole, tmp_path / "tuned"):
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        with torch.no_grad():
            log_probs = model(ids).logits.log_softmax(-1)[0, :-1]
        own = -log_probs.gather(1, ids[0, 1:, None]).squeeze(1)
        losses.append([own[: len(prompt) - 1].mean(), own[len(prompt) - 1 :].mean(), own[-1]])
    (prompt_before, before, _), (prompt_after, after, end) = losses
    assert after < 0.5 * before and end < 0.5 * before
    assert prompt_after > 0.8 * prompt_before


@pytest.mark.parametrize("method", methods.METHODS)
def test_every_trial_is_a_valid_recipe(method: str, tmp_path: Path) -> None:
    """And each method has as many as the others."""
    seen: list[Run] = []

    def train(runs: list[Run]) -> list[float]:
        seen.extend(runs)
        return [float(index) for index, _ in enumerate(runs)]

    base = rows_of(materials_of(tmp_path))
    if method == "sft":
        best = methods.tune_sft(train, methods.LEARNING_RATES)
    else:
        best = methods.tune([method], 1e-3, train)[method]
    assert len({run.name for run in seen}) == (4 if method == "sft" else 3)
    assert best.name == seen[0].name
    assert [run.seed for run in methods.with_seeds(method, best, 3)] == [1, 2, 3]
    for run in seen:
        settings = parse_recipe(recipe(base, run))
        assert settings is not None
        assert settings.loss.needs_teacher == (method != "sft")


def materials_of(folder: Path) -> Materials:
    tokenizer = train_tokenizer(TEXTS, 300)
    tokenizer.save_pretrained(folder / "student")
    return Materials(folder, folder / "student", folder / "tuned")


def test_ablations_are_valid_and_share_the_runs_of_the_methods(tmp_path: Path) -> None:
    base = rows_of(materials_of(tmp_path))
    tuned = {"sft": methods.tune_sft(lambda runs: [float(run.learning_rate) for run in runs], [1])}
    tuned |= methods.tune(
        ["dskd", "dwakd"], 1.0, lambda runs: [float("teacher" not in run.name) for run in runs]
    )
    groups = methods.ablations(tuned, 2)
    names = {group: [run.name for run in runs] for group, runs in groups.items()}
    assert names["paper"] == ["tune-dwakd-teacher_space", "dwakd-seed2"]
    assert names["dskd"] == ["tune-dskd-teacher_space", "dskd-seed2"]
    assert names["no_gate"] == ["ablation-no_gate-seed1", "ablation-no_gate-seed2"]
    assert names["sft"] == ["tune-sft-1", "sft-seed2"]
    runs = [run for found in groups.values() for run in found]
    recipes = {run.name: parse_recipe(recipe(base, run)) for run in runs}
    assert len(recipes) == len({(str(recipes[run.name]), run.seed) for run in runs})


def test_switches_change_one_setting_of_the_loss(tmp_path: Path) -> None:
    base = rows_of(materials_of(tmp_path))
    tuned = {"sft": methods.tune_sft(lambda runs: [0.0 for _ in runs], [1])}
    tuned |= methods.tune(["dwakd", "mapped"], 1.0, lambda runs: [0.0 for _ in runs])
    groups = methods.switches(tuned, 2)
    found = {
        group: parse_recipe(recipe(base, runs[1])).loss.model_dump()
        for group, runs in groups.items()
    }
    for group in groups.keys() - {"sft", *methods.SWITCHES}:
        method, name = group.split(", ", 1)
        changed = {key for key, value in found[group].items() if value != found[method][key]}
        assert changed == methods.SWITCHES[method][name].keys()
    folders = [run.name for runs in groups.values() for run in runs]
    assert len(folders) == len(set(folders))


def rows_of(base: Materials, count: int = 3000) -> Materials:
    base.rows("train").parent.mkdir()
    base.rows("train").write_text("{}\n" * count, encoding="utf-8")
    return base


def test_losses_by_token_add_up(tmp_path: Path) -> None:
    base = materials_of(tmp_path)
    small = train_tokenizer(TEXTS, 300)
    large = train_tokenizer([*TEXTS, "a quite different sentence, quite"] * 3, 400)
    sizes = {"hidden_size": 16, "layers": 1, "heads": 2, "intermediate_size": 32, "seed": 1}
    student = create_student(tmp_path / "model", small, **sizes)
    teacher = create_student(base.teacher, large, **sizes)
    base.rows("dev").parent.mkdir()
    row = {"instruction": "Who?", "input": "", "output": "the cat sat on a different log"}
    base.rows("dev").write_text(json.dumps(row) + "\n", encoding="utf-8")
    found = by_token.figures(base, {"student": student}, {"teacher": teacher})
    assert found["teacher"].keys() == {"first", "end", "all"}
    own = found["student"]
    text = len(small(row["output"])["input_ids"])
    pairs = len({*small.tokenize(row["output"])} & {*large.tokenize(row["output"])})
    assert 0 < pairs < text
    summed = own["paired"] * pairs + own["others"] * (text - pairs) + own["end"]
    assert summed == pytest.approx(own["all"] * (text + 1), rel=1e-5)
    bits = held_out_bits_per_byte(student, [row], lambda row: rendered(row)[0])
    nats = bits * len(row["output"]) * math.log(2)
    assert own["all"] * (text + 1) == pytest.approx(nats, rel=1e-5)


def test_more_rows_are_for_fine_tuning_alone(tmp_path: Path) -> None:
    base = rows_of(replace(materials_of(tmp_path), train_rows=20, batch=4), 40)
    tuned = Run("tune-sft-1", {"variant": "sft"}, 1e-3)
    groups = methods.more_rows(base, tuned, [1.5, 2], 2)
    assert list(groups) == ["sft, 30 rows", "sft, 40 rows"]
    for count, runs in zip((20, 30, 40), ([tuned], *groups.values()), strict=True):
        settings = recipe(base, runs[-1])
        assert settings["micro_batch_size"] == 4 and settings["num_epochs"] == 1
        rows = Path(settings["datasets"][0]["path"]).read_text(encoding="utf-8")
        assert rows == "{}\n" * count
    with pytest.raises(ValueError, match="41 training rows are wanted, of 40"):
        base.first_rows(41)


def test_more_epochs_are_read_by_all_and_kept_apart(tmp_path: Path) -> None:
    """But for the teacher, which is the same one, and its states."""
    base = rows_of(materials_of(tmp_path))
    again = replace(base, epochs=3)
    settings = [recipe(one, Run("tune-sft-1", {"variant": "sft"}, 1e-3)) for one in (base, again)]
    assert [one["num_epochs"] for one in settings] == [1, 3]
    assert settings[0]["dwakd"] == settings[1]["dwakd"]
    assert (base.pair, again.pair) == ("student-tuned", "student-tuned-3epochs")
    assert again.runs.parent == base.runs.parent and again.runs != base.runs


def test_golds_loss_reads_what_its_own_trainer_would_give_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole sequences with their prompts, beside what is made of the response's states alone."""
    from transformers import AutoModelForCausalLM
    from trl.experimental.gold.gold_config import GOLDConfig
    from trl.experimental.gold.gold_trainer import ULDLoss

    from dwakd_plugin.loss import Head, ResponseStates

    tokenizers = train_tokenizer(TEXTS, 300), train_tokenizer([*TEXTS, "a quite long log"] * 3, 400)
    texts, width = [("the dog", " sat on a log"), ("12 cats", " sat")], 64
    sides, whole = [], []
    for seed, tokenizer in enumerate(tokenizers):
        sizes = {"hidden_size": 16, "layers": 1, "heads": 2, "intermediate_size": 32, "seed": seed}
        folder = create_student(tmp_path / f"model{seed}", tokenizer, **sizes)
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        ids, labels = torch.zeros(2, width, dtype=torch.long), torch.full((2, width), -100)
        offsets = torch.zeros(2, width, 2, dtype=torch.long)
        hidden, responses = torch.full((2, width, 16), torch.nan), torch.full((2, width), -100)
        lengths = []
        for row, (prompt, output) in enumerate(texts):
            before, answer = (tokenizer(text)["input_ids"] for text in (prompt, output))
            answer = [*answer, tokenizer.eos_token_id]
            end = len(before) + len(answer)
            ids[row, :end] = torch.tensor([*before, *answer])
            labels[row, len(before) : end] = torch.tensor(answer)
            read = 0
            for position, token in enumerate(answer[:-1], start=len(before)):
                begun, read = read, read + len(tokenizer.decode([token]).encode())
                offsets[row, position] = torch.tensor([begun, read])
            with torch.no_grad():
                states = model.model(ids[row : row + 1]).last_hidden_state[0]
            hidden[row, : len(answer)] = states[len(before) - 1 : end - 1]
            responses[row, : len(answer)] = torch.tensor(answer)
            lengths.append(len(answer))
        with torch.no_grad():
            whole.append((model(ids).logits, labels, ids, offsets))
        head = Head(model.get_output_embeddings().weight.detach())
        blank = torch.zeros_like(hidden)
        sides.append(ResponseStates(blank, blank, hidden, torch.tensor(lengths), head, responses))
    for strategy in ("observed", "bayesian"):
        config = GOLDConfig(
            str(tmp_path),
            use_uld_loss=True,
            uld_token_merge_strategy=strategy,
            uld_use_hybrid_loss=True,
            uld_crossentropy_weight=1.0,
            bf16=False,
            report_to="none",
        )
        loss = ULDLoss(config, *tokenizers, device=torch.device("cpu"))
        expected = loss(*(side for both in zip(*whole, strict=True) for side in both))
        torch.testing.assert_close(gold_loss(loss, *sides), expected)

    # As a training has it: in the place of the only term that its recipe has.
    settings = {"uld_use_hybrid_loss": True, "uld_crossentropy_weight": 1.0}
    monkeypatch.setattr(trainer, "dwakd_loss", trainer.dwakd_loss)  # and back, behind the test
    use_gold(settings | {"uld_token_merge_strategy": strategy}, *tokenizers)
    config = DWAKDConfig.model_validate({"teacher": "big"} | methods.GOLD)
    run = SimpleNamespace(
        distillation=Distillation(config, RowReport(), Facts(1, 1, 0, "one")),
        state=SimpleNamespace(global_step=0, max_steps=1),
        model=SimpleNamespace(**{PROJECTORS: None}),
    )
    (part,) = parts_of(
        config, [sides], None, config.loss, partial(trainer.DWAKDTrainer._terms, run)
    )
    count = sides[0].lengths.sum()
    torch.testing.assert_close(part.terms.total(config.loss), expected * count)


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
    assert "| dwakd | 2 | -0.1000 (-0.1000 to -0.1000) |" in text
    assert "| dwakd | 2 | 1.9500 ± 0.0707 |" in text and "| uld | 1 | +0.2000 (one seed) |" in text
    report.plot({"groups": groups}, tmp_path / "quality.png")
    assert (tmp_path / "quality.png").read_bytes().startswith(b"\x89PNG")


def test_rows_that_fine_tuning_needs_lie_on_its_own_curve() -> None:
    alone = {100: [3.0, 3.2], 400: [2.0, 2.2]}
    assert data_efficiency.equal_rows(alone, 2.6) == pytest.approx(200)
    rows = data_efficiency.table((alone, {100: [3.5, 3.7], 400: [1.0, 1.2]})).splitlines()[2:]
    assert rows[0].endswith("| +0.500 (+0.500 to +0.500) | fewer than 100 |")
    assert rows[1].endswith("| −1.000 (−1.000 to −1.000) | more than 400 |")


def test_a_curve_without_records_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_efficiency, "RESULTS", tmp_path)
    with pytest.raises(SystemExit, match="has no quality_128_cut8_rows"):
        data_efficiency.main()
    assert not list(tmp_path.iterdir())


def test_prompts_name_an_input_only_where_there_is_one() -> None:
    row = {"instruction": "Sum up.", "input": "Long.", "output": ["Short.", "Brief."]}
    assert rendered(row) == ("### Instruction:\nSum up.\nLong.\n\n### Response:\n", "Short.")
    row = {"instruction": "Why?", "input": "", "output": "So."}
    assert rendered(row) == ("### Instruction:\nWhy?\n\n### Response:\n", "So.")


def test_arms_of_answers_are_valid_and_only_given_ones_are_cached(tmp_path: Path) -> None:
    base = rows_of(replace(materials_of(tmp_path), train_rows=240, batch=3))
    (tmp_path / "written.jsonl").write_text("{}\n", encoding="utf-8")
    arms = answers.arms(base, tmp_path / "written.jsonl", 1e-4, 80)
    for name, run in arms.items():
        settings = recipe(base, run)
        parsed = parse_recipe(settings)
        assert parsed is not None and settings["max_steps"] == 80
        assert (parsed.own_answers is not None) == ("own" in name)
        assert (parsed.teacher.cache is None) == ("own" in name)
        path = settings["datasets"][0]["path"]
        assert path.endswith("written.jsonl") == name.startswith("teacher's")
    assert parse_recipe(recipe(base, arms[answers.OWN])).own_answers.start_after == 40


def test_given_answers_get_the_time_that_own_ones_take(tmp_path: Path) -> None:
    base = rows_of(replace(materials_of(tmp_path), train_rows=240, batch=3))
    arms = answers.arms(base, tmp_path / "written.jsonl", 1e-4, 80)
    for name, seconds in ((answers.GIVEN, 100.0), (answers.OWN, 260.0)):
        folder = base.runs / arms[name].name
        folder.mkdir(parents=True)
        (folder / "run.json").write_text(
            json.dumps(asdict(arms[name]) | {"loop_seconds": seconds}), encoding="utf-8"
        )
    longer = answers.as_long(base, [arms[answers.GIVEN]], [arms[answers.OWN]])
    assert longer.recipe == {"max_steps": 208, "num_epochs": 6}
    assert longer.dwakd == arms[answers.GIVEN].dwakd


@pytest.mark.slow
def test_golds_own_trainer_learns_with_its_own_answers(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    rows = [("Who sat?\n", "the cat sat on the mat"), ("Where?\n", "on a log")] * 4
    texts = [text for row in rows for text in row]
    sizes = {"hidden_size": 16, "layers": 1, "heads": 2, "intermediate_size": 32}
    for number, side in enumerate(("student", "teacher")):
        tokenizer = train_tokenizer(texts, 290 + 10 * number)
        create_student(tmp_path / side, tokenizer, seed=number, **sizes)
    base = Materials(tmp_path, tmp_path / "student", tmp_path / "teacher", len(rows), 2)
    rows_of(base)
    settings = recipe(base, Run("gold", {"variant": "mapped"}, 1e-2, recipe={"max_steps": 6}))
    settings["output_dir"] = str(tmp_path / "out")
    found = train_with_gold(settings, answers.GOLD | {"max_completion_length": 8}, rows)
    before, after = (
        AutoModelForCausalLM.from_pretrained(folder).state_dict()
        for folder in (tmp_path / "student", tmp_path / "out")
    )
    assert found["sampling_seconds"] > 0
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert all(weights.isfinite().all() for weights in after.values())


def test_each_method_reads_rows_as_often_as_is_best_for_it() -> None:
    def record(epochs: int, dev: dict[str, float]) -> dict[str, Any]:
        trials = [
            {"name": f"tune-{method}-{trial}", "dev_bits_per_byte": bits + trial}
            for method, bits in dev.items()
            for trial in range(2)
        ]
        groups = {method: {"bits_per_byte": {"dolly": [bits]}} for method, bits in dev.items()}
        return {
            "epochs": epochs,
            "trials": trials,
            "compared": {"methods": {"groups": groups}},
        }

    once = record(1, {"sft": 1.4, "mapped": 1.36, "dwakd": 1.41, "dwakdv2": 1.0})
    again = record(3, {"sft": 1.43, "mapped": 1.3})
    found, readings = at_their_best([once, again])
    assert readings == {"sft": 1, "mapped": 3, "dwakd": 1, "dwakdv2": 1}
    bits = {method: group["bits_per_byte"]["dolly"] for method, group in found.items()}
    assert bits == {"sft": [1.4], "mapped": [1.3], "dwakd": [1.41], "dwakdv2": [1.0]}
