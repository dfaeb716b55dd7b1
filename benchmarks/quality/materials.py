"""What every run of the quality benchmark starts from: rows, the teacher, a student to teach.

The teacher is SmolLM2-135M-Instruct with its vocabulary trimmed to what the training rows use: on
them its tokens and hidden states are the untrimmed model's, its probabilities are renormalised, and
its output head, which is most of a teacher's cost here, is several times smaller. `tuned` has then
learnt the rows of the trainings itself, as the paper's teachers have; `untuned` has not.

A student is one that was pretrained here, or `cutN`: N layers of the same model, as `dwakd cut`
chooses them, with the tokenizer of those that were pretrained here under them.
"""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import say
from benchmarks.small_student import create_student
from dwakd_plugin.io.files import replace_file
from dwakd_plugin.io.folders import new_folder
from dwakd_plugin.models.smollm2 import prepare_teacher
from dwakd_plugin.tokenizers.training import train_tokenizer

Row = dict[str, Any]

TRAIN_ROWS, LONGEST = 2000, 64  # the latter: tokens of the teacher in instruction, input, output
# The students that are made here, of one architecture and tokenizer: how many of the other rows
# each has read before (None: all), and how often.
PRETRAINING: dict[str, tuple[int | None, int]] = {"small": (5000, 1), "longer": (None, 2)}
VOCABULARY = 4096
CUT = "cut"  # and a number: the name of a student with so many layers of a real model
TEACHERS = ("tuned", "untuned")
STUDENT = {"hidden_size": 256, "layers": 5, "heads": 4, "intermediate_size": 704, "seed": 7}
FORMAT = "### Instruction:\n{instruction}\n{input}\n\n### Response:\n"
NO_INPUT_FORMAT = "### Instruction:\n{instruction}\n\n### Response:\n"
TEST_SETS = ("dolly", "self_instruct", "vicuna")
_FILES = {
    "dev": "dolly_dev.jsonl",
    "dolly": "dolly_test.jsonl",
    "self_instruct": "selfinst_252.jsonl",
    "vicuna": "vicuna_80.jsonl",
}


@dataclass(frozen=True)
class Materials:
    """Folders and files that all runs share."""

    folder: Path
    student: Path
    teacher: Path
    train_rows: int = TRAIN_ROWS  # the first ones
    batch: int = 8
    epochs: int = 1  # of the student's trainings
    longest: int = LONGEST  # row, in the teacher's tokens
    held_out_bytes: float = math.inf  # of responses, of each set that is measured on

    @property
    def pair(self) -> str:
        """The name of both models, and of what is made of them."""
        read = "" if self.epochs == 1 else f"-{self.epochs}epochs"
        return f"{self.student.name}-{self.teacher.name}{read}"

    @property
    def runs(self) -> Path:
        """The student's trainings under this teacher."""
        return self.folder / "runs" / self.pair

    def rows(self, name: str) -> Path:
        """The JSONL of `train`, `dev` or a test set."""
        return self.folder / "data" / f"{name}.jsonl"

    def first_rows(self, count: int) -> Path:
        """The JSONL of so many training rows."""
        whole, part = self.rows("train"), self.rows(f"train-{count}")
        if not part.is_file():
            lines = whole.read_text(encoding="utf-8").splitlines(keepends=True)
            if count > len(lines):
                raise ValueError(f"{count} training rows are wanted, of {len(lines)}")
            replace_file(part, "".join(lines[:count]))
        return part


def prepare(folder: Path, instructions: Path, student: str, teacher: str, **run: Any) -> Materials:
    """Makes what is missing below `folder`; what is there is complete, and is kept.

    `student` is a key of PRETRAINING, `cutN`, or a folder with a model of any other size and
    tokenizer; `teacher` is one of TEACHERS; `run` what else Materials has.
    """
    made_here = student in PRETRAINING or student.startswith(CUT)
    own = folder / student if made_here else Path(student).resolve()
    materials = Materials(folder, own, folder / teacher, **run)
    if teacher == "tuned" and materials.train_rows != TRAIN_ROWS:
        materials = replace(materials, teacher=folder / f"tuned{materials.train_rows}")
    if not (folder / "untrimmed").is_dir():
        prepare_teacher(folder / "untrimmed")
    if not materials.rows("train").is_file():
        _write_rows(materials, instructions)
    found = json.loads(_longest(materials).read_text(encoding="utf-8"))
    if found != materials.longest:
        raise SystemExit(
            f"{folder} has rows of at most {found} tokens, and what was made of them; for rows of "
            f"{materials.longest}, give another --folder."
        )
    if made_here and not own.is_dir():
        _make_student(materials, student)
    if not (folder / "untuned").is_dir():
        texts = _texts(_read(materials.rows("train")))
        trim_vocabulary(folder / "untrimmed", texts, folder / "untuned")
    if not materials.teacher.is_dir():
        rows = _read(materials.first_rows(materials.train_rows))
        fine_tune(folder / "untuned", rows, materials.teacher, batch=materials.batch)
    return materials


def _longest(materials: Materials) -> Path:
    """Says how long the folder's rows are."""
    return materials.folder / "data" / "longest.json"


def _make_student(materials: Materials, name: str) -> None:
    folder = materials.folder
    texts = ["".join(rendered(row)) for row in _read(materials.rows("pretraining"))]
    few, _ = PRETRAINING["small"]
    if not (folder / "tokenizer").is_dir():
        with new_folder(folder / "tokenizer") as tokenizer:
            train_tokenizer(texts[:few], VOCABULARY).save_pretrained(tokenizer)
    if name.startswith(CUT):
        command = [sys.executable, "-m", "dwakd_cli", "cut", str(folder / "untrimmed")]
        command += [str(materials.student), "--layers", name.removeprefix(CUT)]
        command += ["--tokenizer", str(folder / "tokenizer")]
        command += ["--texts", str(materials.rows("train"))]
        subprocess.run(command, check=True)
        return
    if not (folder / "untrained").is_dir():
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
        create_student(folder / "untrained", tokenizer, **STUDENT)
    count, epochs = PRETRAINING[name]
    pretrain(folder / "untrained", texts[:count], materials.student, epochs=epochs)


def rendered(row: Row) -> tuple[str, str]:
    """Prompt and first reference of a row, as the recipes write them."""
    form = FORMAT if row.get("input") else NO_INPUT_FORMAT
    output = row["output"] if isinstance(row["output"], str) else row["output"][0]
    return form.format(instruction=row["instruction"], input=row.get("input") or ""), output


def _texts(rows: Iterable[Row]) -> list[str]:
    """Every text that a tokenizer will see alone: prompts and responses are tokenised apart."""
    return [text for row in rows for text in rendered(row)]


def _write_rows(materials: Materials, instructions: Path) -> None:
    """Short rows to train and test on, as chosen by the teacher's tokenizer; the rest to pretrain.

    Vicuna is taken whole: its references are long, and no row of it would be left.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(materials.folder / "untrimmed")

    def short(row: Row) -> bool:
        _, output = rendered(row)
        text = row["instruction"] + (row.get("input") or "") + output
        return len(tokenizer(text)["input_ids"]) <= materials.longest

    rows = _read(instructions / "dolly_train.jsonl")
    candidates = [index for index, row in enumerate(rows) if short(row)]
    chosen = set(random.Random(0).sample(candidates, TRAIN_ROWS))
    parts = {"train": [rows[index] for index in sorted(chosen)]}
    others = [row for index, row in enumerate(rows) if index not in chosen]
    parts["pretraining"] = random.Random(0).sample(others, len(others))
    for name, file in _FILES.items():
        found = _read(instructions / file)
        parts[name] = found if name == "vicuna" else [row for row in found if short(row)]
    (materials.folder / "data").mkdir(parents=True, exist_ok=True)
    replace_file(_longest(materials), json.dumps(materials.longest))
    for name in sorted(parts, key=lambda name: name == "train"):  # which says that all are there
        lines = (json.dumps(row) + "\n" for row in parts[name])
        replace_file(materials.rows(name), "".join(lines))
        say(f"{name}: {len(parts[name])} rows")


def _read(file: Path) -> list[Row]:
    with file.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def trim_vocabulary(source: Path, texts: Sequence[str], dest: Path) -> None:
    """Saves the model of `source` with the tokens that `texts` need, and the 256 bytes, alone.

    A token's parts are kept with it, down to the bytes. A merge that is left out joins parts whose
    product occurs nowhere in `texts`: it never applied there, and they are tokenised as before.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

    tokenizer = AutoTokenizer.from_pretrained(source)
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary, merges = rules["model"]["vocab"], [tuple(pair) for pair in rules["model"]["merges"]]
    names = {index: token for token, index in vocabulary.items()}
    special = {token["content"] for token in rules["added_tokens"]}
    before = tokenizer(list(texts))["input_ids"]
    used = {names[index] for ids in before for index in ids}
    made_of = {left + right: (left, right) for left, right in reversed(merges)}
    kept: set[str] = special | {token for token in vocabulary if len(token) == 1}
    waiting = list(used)
    while waiting:
        token = waiting.pop()
        if token not in kept:
            kept.add(token)
            waiting += made_of[token]
    order = sorted(kept, key=lambda token: vocabulary[token])
    rules["model"]["vocab"] = {token: index for index, token in enumerate(order)}
    rules["model"]["merges"] = [
        [left, right]
        for left, right in merges
        if left in kept and right in kept and left + right in kept
    ]
    for token in rules["added_tokens"]:
        token["id"] = rules["model"]["vocab"][token["content"]]
    with new_folder(dest) as folder:
        tokenizer.save_pretrained(folder)
        (folder / "tokenizer.json").write_text(json.dumps(rules), encoding="utf-8")
        trimmed = PreTrainedTokenizerFast.from_pretrained(folder)
        new_id = {vocabulary[token]: index for index, token in enumerate(order)}
        after = [[new_id[index] for index in ids] for ids in before]
        if trimmed(list(texts))["input_ids"] != after:
            raise RuntimeError("the trimmed tokenizer cuts these texts in another way")
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        rows = model.get_input_embeddings().weight.detach()[[vocabulary[token] for token in order]]
        model.resize_token_embeddings(len(order), mean_resizing=False)
        with torch.no_grad():
            model.get_input_embeddings().weight.copy_(rows)
        for config in (model.config, model.generation_config):
            for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
                old = getattr(config, key, None)
                if old is not None:
                    setattr(config, key, new_id[old])
        model.save_pretrained(folder)
    say(f"teacher: {len(order):,} of {len(vocabulary):,} tokens kept")


def pretrain(
    untrained: Path,
    texts: Sequence[str],
    dest: Path,
    *,
    epochs: int = 1,
    length: int = 512,
    batch: int = 2,
    learning_rate: float = 1.5e-3,
) -> None:
    """Reads `texts`, shuffled anew each time, joined, and cut into pieces of `length` tokens."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(untrained)
    model = AutoModelForCausalLM.from_pretrained(untrained, dtype=torch.float32)
    ids = [
        index
        for epoch in range(1, epochs + 1)
        for text in random.Random(epoch).sample(list(texts), len(texts))
        for index in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    ]
    steps = len(ids) // (length * batch)
    blocks = torch.tensor(ids[: steps * length * batch]).view(steps, batch, length)
    _train(model, [{"input_ids": block, "labels": block} for block in blocks], learning_rate)
    with new_folder(dest) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def fine_tune(
    source: Path,
    rows: Sequence[Row],
    dest: Path,
    *,
    batch: int = 8,
    learning_rate: float = 4e-4,
    rank: int = 16,
) -> None:
    """One epoch of LoRA on the responses of `rows`, merged: a teacher that knows the task.

    A teacher that does not is sure of what no row says: for the end of these short answers SmolLM2
    pays 6.4 nats as it is, and 1.3 after this (`tokens` in the record, docs/results_record.md).
    """
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq

    tokenizer = AutoTokenizer.from_pretrained(source)
    examples = [example(tokenizer, row) for row in rows]
    lengths = sorted(range(len(examples)), key=lambda index: len(examples[index]["input_ids"]))
    groups = [lengths[begin : begin + batch] for begin in range(0, len(lengths), batch)]
    random.Random(0).shuffle(groups)
    collate = DataCollatorForSeq2Seq(tokenizer)
    torch.manual_seed(0)  # of the adapter's first weights
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32),
        LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear"),
    )
    batches = [collate([examples[index] for index in group]) for group in groups]
    _train(model, batches, learning_rate, weight_decay=0.0)
    with new_folder(dest) as folder:
        model.merge_and_unload().save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def example(tokenizer: Any, row: Row) -> dict[str, list[int]]:
    """`input_ids` and `labels` of prompt and response, tokenised apart as in the recipes."""
    prompt, output = (tokenizer(text)["input_ids"] for text in rendered(row))
    output = [*output, tokenizer.eos_token_id]
    return {"input_ids": prompt + output, "labels": [-100] * len(prompt) + output}


def _train(
    model: Any,
    batches: Sequence[Mapping[str, torch.Tensor]],
    learning_rate: float,
    *,
    weight_decay: float = 0.01,
) -> None:
    """One pass over the batches: AdamW, a warm-up of a twentieth, a cosine down to a twentieth."""
    steps = len(batches)
    warm = steps // 20
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=weight_decay)

    def rate(step: int) -> float:
        part = max(0.0, (step - warm) / (steps - warm))
        return min(1.0, (step + 1) / warm) * (0.05 + 0.95 * (1 + math.cos(math.pi * part)) / 2)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    model.train()
    for step, batch in enumerate(batches, start=1):
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 50 == 0 or step == steps:
            say(f"step {step} of {steps}, {loss.item():.3f} nats a token")
