"""`dwakd check`: token ends in bytes, figures against independent ones, findings, the command."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from typer.testing import CliRunner, Result

from dwakd_cli.main import app
from dwakd_cli.sample_texts import SAMPLE
from dwakd_cli.token_picture import terminal_rows
from dwakd_plugin.errors import UserError
from dwakd_plugin.tokenizers.figures import TextFigures, measure, vocabulary_figures
from dwakd_plugin.tokenizers.findings import findings_of
from dwakd_plugin.tokenizers.pair import (
    ByteCutter,
    Changed,
    Cut,
    PairCut,
    cut_both,
)
from dwakd_plugin.tokenizers.verdict import Finding, Side, verdict_of

SHARED = Path(__file__).parents[2] / "shared" / "data"
CORPUS = [text for group in SAMPLE.values() for text in group]
TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"


def byte_level(size: int = 600, *, prefix: bool = False, normalizer: Any = None) -> Any:
    tokenizer = Tokenizer(models.BPE())
    if normalizer:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS[:8], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


def sentencepiece(prepend: str = "always", *, legacy: bool = False, own_tokens: bool = True) -> Any:
    """BPE with byte fallback: Llama 2's way (`legacy`: as a normaliser), or Gemma's (`never`)."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=800, special_tokens=["<unk>", "</s>", *byte_tokens], show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS[:8], trainer)
    description = json.loads(tokenizer.to_str())
    description["model"] |= {"byte_fallback": True, "fuse_unk": True}
    description["added_tokens"] = description["added_tokens"][:2]
    tokenizer = Tokenizer.from_str(json.dumps(description))
    if legacy:
        tokenizer.pre_tokenizer = None
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend, split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")
    if own_tokens:  # as Gemma's runs of spaces and Phi-3's turn marks
        fast.add_tokens(
            [
                AddedToken("▁▁▁", normalized=False),
                AddedToken("<turn>", normalized=False, rstrip=True),
                AddedToken("<mask>", normalized=False, lstrip=True),
            ]
        )
    return fast


def unigram() -> Any:
    """T5's way: NFKC, white space is one space, no token for unseen characters."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
    )
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=400,
        special_tokens=["<unk>", "</s>"],
        unk_token="<unk>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS[:8], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")


LOSSLESS: dict[str, Callable[[], Any]] = {
    "byte-level": byte_level,
    "byte-level, space before": lambda: byte_level(prefix=True),
    "SentencePiece, space before every run": sentencepiece,
    "SentencePiece, space before the text": lambda: sentencepiece("first"),
    "SentencePiece, no space before": lambda: sentencepiece("never"),
    "SentencePiece, as a normaliser": lambda: sentencepiece(legacy=True, own_tokens=False),
}
# Whatever Unicode has but surrogates, and what is awkward: markers, special tokens, white space.
AWKWARD = ["</s>", "<|end|>", "<turn>", "<mask>", "<0x0A>", "▁", "Ġ", " ", "  ", "\n", "\t", "1"]
TEXT = st.lists(
    st.one_of(st.sampled_from(AWKWARD), st.text(max_size=4), st.sampled_from(["the", "🎉", "é"])),
    max_size=8,
).map("".join)


@pytest.fixture(scope="module")
def cutters() -> dict[str, ByteCutter]:
    return {name: ByteCutter(build(), "student") for name, build in LOSSLESS.items()}


@settings(max_examples=250, deadline=None)
@given(text=TEXT)
@example(text="1 a")
@example(text=" ▁a</s> b</s></s>▁ c ")
@example(text="a <mask><turn> \u2003 b🎉")
@example(text="<turn>\x1f")
def test_every_byte_is_in_exactly_one_token(cutters: dict[str, ByteCutter], text: str) -> None:
    for name, cutter in cutters.items():
        (cut,) = cutter.cut([text])
        if isinstance(cut, Changed):
            # A token that takes the white space after it may be followed by a ▁, which is none.
            assert "<turn>" in text and "▁" in text, (name, text)
            continue
        assert len(cut.ids) == len(cut.ends)
        spans = list(pairwise([0, *cut.ends]))
        assert all(begin <= end for begin, end in spans), (name, text)
        assert (cut.ends or [0])[-1] == len(text.encode()), (name, text)
        # A token without a byte is the space before a run, and so begins one.
        for index, (begin, end) in enumerate(spans):
            if begin == end:
                assert cutter.tokenizer.convert_ids_to_tokens(cut.ids[index]) in ("▁", "Ġ")
                assert index == 0 or cut.ids[index - 1] in cutter.tokenizer.added_tokens_decoder


@settings(max_examples=150, deadline=None)
@given(text=TEXT)
def test_ends_are_where_the_decoded_prefix_ends(cutters: dict[str, ByteCutter], text: str) -> None:
    """The library's decoder, given a prefix of the tokens, writes the text up to the last's end."""
    for name in ("byte-level", "SentencePiece, no space before"):
        if "▁" in text or "<" in text:
            continue  # the decoder writes ▁ as a space, and drops white space at added tokens
        cutter = cutters[name]
        (cut,) = cutter.cut([text])
        assert isinstance(cut, Cut)
        data = text.encode()
        for count, end in enumerate(cut.ends, 1):
            try:
                prefix = data[:end].decode()
            except UnicodeDecodeError:
                continue  # the token ends within a character
            decoded = cutter.tokenizer.backend_tokenizer.decode(cut.ids[:count])
            assert decoded == prefix, (name, text)


@settings(max_examples=150, deadline=None)
@given(text=TEXT)
def test_normalised_texts_are_compared_on_the_same_bytes(text: str) -> None:
    teacher, student = NORMALISING
    (pair,) = cut_both(teacher, student, [text])
    assert pair is not None
    for cut in (pair.teacher, pair.student):
        assert (cut.ends or [0])[-1] == len(pair.text.encode())
    normalised = teacher.tokenizer.backend_tokenizer.normalizer.normalize_str(text)
    if not any(token in text for token in AWKWARD[:4]):  # added tokens are not normalised
        assert pair.text == normalised


NORMALISING = (
    ByteCutter(byte_level(normalizer=normalizers.NFC()), "teacher"),
    ByteCutter(sentencepiece(own_tokens=False), "student"),
)


def test_a_text_that_loses_something_is_normalised_or_left_out() -> None:
    t5, gpt = ByteCutter(unigram(), "teacher"), ByteCutter(byte_level(), "student")
    texts = ["the\n first  ﬁrst ", "the bakery", "♞"]
    spaces, same, unknown = cut_both(t5, gpt, texts)
    assert spaces is not None and spaces.text == "the first first"
    assert same is not None and same.text == "the bakery"
    assert unknown is None
    figures = measure(t5, gpt, texts)
    assert (figures.texts, figures.normalised, figures.left_out) == (3, 1, 1)
    assert len(figures.teacher_tokens) == 2


def test_figures_of_a_case_by_hand() -> None:
    figures = TextFigures()
    cut = PairCut("abcd", Cut([1, 2], [2, 4]), Cut([5, 6, 7], [1, 2, 4]))
    figures.add("abcd", cut)
    figures.add("", PairCut("", Cut([], []), Cut([], [])))
    totals = figures.as_dict()
    assert totals["length_ratio"]["mean"] == 1.5
    assert totals["boundary_agreement_student"] == 0.666667
    assert totals["boundary_agreement_teacher"] == 1
    assert totals["identical_span_share"] == 0.333333
    assert (totals["texts"], totals["texts_compared"]) == (2, 1)
    assert TextFigures().as_dict()["length_ratio"] is None


@pytest.mark.parametrize(
    "model",
    [models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"), models.WordLevel({"a": 0}, "a")],
    ids=["WordPiece", "WordLevel"],
)
def test_other_kinds_are_refused_by_name(model: Any) -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model))
    with pytest.raises(UserError, match=f"The teacher's .* {type(model).__name__} kind"):
        ByteCutter(tokenizer, "teacher")


def test_bpe_that_drops_spaces_is_refused() -> None:
    for suffix in ("", "</w>"):
        model = models.BPE({"a": 0, "a</w>": 1}, [], end_of_word_suffix=suffix)
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model))
        with pytest.raises(UserError, match="</w>" if suffix else "marks spaces neither"):
            ByteCutter(tokenizer, "student")


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs real tokenizers, which are not part of this")
def test_figures_of_real_pairs() -> None:
    truth = json.loads((SHARED / "pairs_truth.json").read_text())["pairs"]
    lines = (SHARED / "texts_500.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    names = {pair[side] for pair in truth for side in ("teacher", "student")}
    tokenizers = {
        name: AutoTokenizer.from_pretrained(
            SHARED / ("stories260K" if name == "stories260k" else f"tokenizers/{name}")
        )
        for name in sorted(names)
    }
    cutters = {name: ByteCutter(each, "teacher") for name, each in tokenizers.items()}
    for pair in truth:
        teacher, student = pair["teacher"], pair["student"]
        ours = (
            vocabulary_figures(tokenizers[teacher], tokenizers[student])
            | measure(cutters[teacher], cutters[student], texts).as_dict()
        )
        theirs: dict[str, Any] = {
            "teacher_vocab_size": pair["teacher_len_tokenizer"],
            "student_vocab_size": pair["student_len_tokenizer"],
            "shared_tokens_exact": pair["exact_string_overlap"],
            "shared_tokens_exact_share_of_student": pair["exact_share_of_student"],
            "shared_tokens_exact_share_of_teacher": pair["exact_share_of_teacher"],
            "shared_tokens_bytes": pair["byte_overlap"],
            "shared_tokens_bytes_share_of_student": pair["byte_share_of_student"],
            "shared_tokens_bytes_share_of_teacher": pair["byte_share_of_teacher"],
            "texts": pair["texts"],
            "texts_left_out": pair["texts_not_byte_aligned"],
            "texts_normalised": 0,
            "common_segments_per_text": pair["common_segments_per_text"],
            "teacher_tokens": pair["teacher_tokens"],
            "student_tokens": pair["student_tokens"],
        }
        for name, value in theirs.items():
            digits = len(str(value).partition(".")[2])
            assert round(ours[name], digits) == value, (teacher, student, name)
        nested = {"length_ratio": pair["ratio_student_over_teacher"]}
        for side in ("student", "teacher"):
            nested[f"boundary_agreement_{side}"] = pair[f"boundary_agreement_{side}"]
        nested["identical_span_share"] = pair["identical_span_share_student"]
        for name, values in nested.items():
            for part, value in values.items():
                if part == "micro":
                    figure = ours[name]
                else:
                    figure = (ours[name] if name == "length_ratio" else ours["per_text"][name])[
                        part
                    ]
                # The truth's last digit: the ratio's percentiles have three, the rest four.
                digits = 4 if part in ("mean", "micro", "corpus") else 3
                assert round(figure, digits) == value, (teacher, student, name, part)


# --- Findings ---------------------------------------------------------------------------------


def codes(teacher: Any, student: Any, heads: tuple[Any, Any] = (None, None)) -> dict[str, str]:
    """Code to severity of all findings over the built-in sample."""
    sides = [
        Side(role, tokenizer, ByteCutter(tokenizer, role), rows)
        for role, tokenizer, rows in zip(
            ("teacher", "student"), (teacher, student), heads, strict=True
        )
    ]
    cutters = sides[0].cutter, sides[1].cutter
    groups = {name: measure(*cutters, group) for name, group in SAMPLE.items()}
    findings = findings_of(
        *sides,
        vocabulary_figures(teacher, student),
        measure(*cutters, CORPUS),
        groups,
        own_texts=False,
    )
    assert all(finding.message.endswith(".") for finding in findings)
    assert len({finding.code for finding in findings}) == len(findings)
    return {finding.code: finding.severity for finding in findings}


def test_findings_on_heads_and_special_tokens() -> None:
    teacher, student = byte_level(), sentencepiece(own_tokens=False)
    found = codes(teacher, student, (len(teacher) + 10, len(student) - 1))
    assert found["teacher_head_padded"] == "info"
    assert found["student_head_too_small"] == "problem"
    assert found["student_no_pad"] == found["no_chat_template"] == "info"
    teacher.pad_token = teacher.eos_token
    student.eos_token = None
    found = codes(teacher, student, (len(teacher), None))
    assert found["teacher_pad_is_eos"] == "info"
    assert found["student_no_eos"] == "problem"
    assert not any("head" in code for code in found)


def test_findings_on_chat_templates() -> None:
    teacher, student = byte_level(), byte_level(500)
    student.chat_template = TEMPLATE
    found = codes(teacher, student)
    assert found["teacher_no_chat_template"] == "warning"
    assert "student_eos_not_in_template" not in found
    # What begins a turn does not end it.
    teacher.chat_template = TEMPLATE.replace("<|end|>", "<|done|>").replace("<|{{", "<|end|>{{")
    student.chat_template = "{{ raise_exception('no such roles') }}"
    found = codes(teacher, student)
    assert found["teacher_eos_not_in_template"] == "warning"
    assert found["student_chat_template_fails"] == "warning"


def test_findings_on_bos_text_and_vocabulary() -> None:
    from tokenizers import processors

    teacher = byte_level()
    teacher.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|end|> $A", special_tokens=[("<|end|>", teacher.eos_token_id)]
    )
    lower = byte_level(normalizer=normalizers.Lowercase())
    found = codes(teacher, lower)
    assert found["bos_on_one_side"] == found["normalisers_differ"] == "info"
    assert found["student_loses_text"] == "problem"
    assert codes(lower, byte_level())["teacher_loses_text"] == "warning"
    assert codes(unigram(), byte_level())["unknown_characters"] == "warning"
    assert codes(teacher, byte_level(280))["few_shared_tokens"] == "warning"
    found = codes(byte_level(), byte_level())
    assert found["same_tokenizer"] == "info"
    assert not any("differ" in code for code in found)


def test_verdicts() -> None:
    figures = {
        "length_ratio": {"mean": 1.0},
        "boundary_agreement_student": 0.9,
        "boundary_agreement_teacher": 0.9,
        "identical_span_share": 0.8,
    }
    assert verdict_of(figures, []) == ("good", [])
    verdict, reasons = verdict_of(figures | {"identical_span_share": 0.5}, [])
    assert verdict == "workable" and len(reasons) == 1
    assert verdict_of(figures | {"length_ratio": {"mean": 0.3}}, [])[0] == "poor"
    assert verdict_of(figures | {"boundary_agreement_teacher": 0.2}, [])[0] == "poor"
    assert verdict_of(figures, [Finding("x", "problem", "")]) == ("poor", ["x"])
    assert verdict_of(TextFigures().as_dict(), [])[0] == "poor"


# --- The command ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("pair")
    teacher, student = byte_level(), sentencepiece(own_tokens=False)
    teacher.save_pretrained(folder / "teacher")
    student.save_pretrained(folder / "student")
    (folder / "teacher" / "config.json").write_text(json.dumps({"vocab_size": len(teacher) + 8}))
    return str(folder / "teacher"), str(folder / "student")


def check(*arguments: str | Path, **environment: str) -> Result:
    # Rich asks for these when it is asked to print.
    return CliRunner().invoke(app, ["check", *map(str, arguments)], env=environment)


def test_json_has_the_keys_that_scripts_rely_on(folders: tuple[str, str], tmp_path: Path) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("The bakery opens at 6.\n\nThe first loaves: größte 🎉\r\n", encoding="utf-8")
    result = check(*folders, "--texts", texts, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    teacher, student = map(AutoTokenizer.from_pretrained, folders)
    assert report["teacher_vocab_size"] == len(teacher)
    assert report["student_vocab_size"] == len(student)
    assert report["teacher_head_rows"] == len(teacher) + 8
    assert report["student_head_rows"] is None
    assert report["shared_tokens_exact"] == len(teacher.get_vocab().keys() & student.get_vocab())
    assert report["shared_tokens_bytes"] > 0
    assert report["texts"] == report["texts_compared"] == 2
    assert report["length_ratio"].keys() >= {"mean", "p5", "p95"}
    for share in ("boundary_agreement_student", "boundary_agreement_teacher"):
        assert 0 < report[share] <= 1
    assert 0 < report["identical_span_share"] <= report["boundary_agreement_student"]
    assert report["verdict"] in ("good", "workable", "poor")
    assert {"code", "severity", "message"} == report["findings"][0].keys()
    assert "teacher_head_padded" in {finding["code"] for finding in report["findings"]}


@pytest.mark.parametrize(
    "row",
    [
        {"text": "a bakery"},
        {"instruction": "a", "input": None, "output": "bakery"},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    ],
    ids=["text", "instruction", "messages"],
)
def test_rows_of_several_forms(folders: tuple[str, str], tmp_path: Path, row: Any) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(f"{json.dumps(row)}\n\n{json.dumps(row)}", encoding="utf-8")
    assert json.loads(check(*folders, "--texts", file, "--json").stdout)["texts"] == 2


def test_a_plain_file_may_hold_json(folders: tuple[str, str], tmp_path: Path) -> None:
    file = tmp_path / "code.txt"
    file.write_text('{"loaves": 120}\nfor x in y:\n', encoding="utf-8")
    assert json.loads(check(*folders, "--texts", file, "--json").stdout)["texts"] == 2


def test_terminal_png_and_html(folders: tuple[str, str], tmp_path: Path) -> None:
    png, html = tmp_path / "pair.png", tmp_path / "pair.html"
    shown = "<b>&größte 🎉 数学</b> $x_1$\n  1234\x00\u200d"
    # A process of its own: a training within this one changes what the terminal is taken for.
    command = [sys.executable, "-c", "from dwakd_cli.main import main; main()", "check", *folders]
    options = ["--png", str(png), "--html", str(html), "--show", shown.replace("\x00", "")]
    result = subprocess.run(
        [*command, *options],
        env={**os.environ, "COLUMNS": "50", "NO_COLOR": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert "\x1b[3" not in result.stdout and "\x1b[4" not in result.stdout  # no colour
    assert [line for line in result.stdout.splitlines() if len(line) > 50] == []
    assert "Verdict: " in result.stdout and "teacher_head_padded" in result.stdout
    assert png.read_bytes().startswith(b"\x89PNG")
    page = html.read_text(encoding="utf-8")
    assert "<b>&größte" not in page and "&lt;</span>" in page and "&amp;</span>" in page
    assert "http" not in page and "<script" not in page
    assert sorted(file.name for file in tmp_path.iterdir()) == ["pair.html", "pair.png"]


def test_terminal_rows_mark_every_token() -> None:
    teacher, student = byte_level(), sentencepiece()
    (pair,) = cut_both(
        ByteCutter(teacher, "teacher"), ByteCutter(student, "student"), ["1 größte 🎉数\u0301 end"]
    )
    assert pair is not None
    for width in (20, 40, 200):
        lines = [line for line in terminal_rows(pair, width) if line.plain]
        assert all(line.cell_len <= width for line in lines)
        for side, cut in (("teacher", pair.teacher), ("student", pair.student)):
            row = "".join(line.plain for line in lines if line.plain.startswith(side))
            assert row.count("│") + row.count("┆") == len(cut.ends)


def test_exit_codes(folders: tuple[str, str], tmp_path: Path) -> None:
    teacher, _ = folders
    byte_level(normalizer=normalizers.Lowercase()).save_pretrained(tmp_path)
    result = check(teacher, tmp_path, "--json")
    assert result.exit_code == 0
    report = json.loads(result.stdout)
    assert (report["verdict"], report["verdict_reasons"]) == ("poor", ["student_loses_text"])
    assert check(teacher, tmp_path, "--strict", "--json").exit_code == 3
    assert check(teacher, teacher, "--strict").exit_code == 0


def fails(*arguments: str | Path) -> str:
    result = check(*arguments)
    assert isinstance(result.exception, UserError), result.output
    return str(result.exception)


def test_tokenizers_that_cannot_be_loaded(folders: tuple[str, str], tmp_path: Path) -> None:
    teacher, student = folders
    assert "student's folder ./nope does not exist" in fails(teacher, "./nope")
    assert "no tokenizer" in fails(tmp_path, student)
    file = tmp_path / "tokenizer.json"
    file.write_text("{")
    assert "is a file" in fails(teacher, file)
    assert "cannot be loaded" in fails(tmp_path, student)
    file.unlink()
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "CanineTokenizer"}')
    assert "CanineTokenizer) is a slow one" in fails(tmp_path, student)
    message = fails("no-such-organisation/no-such-model", student)
    assert "cannot be loaded" in message and "\n" in message
    (tmp_path / "tokenizer_config.json").write_text(
        '{"auto_map": {"AutoTokenizer": ["code.Tokenizer", null]}}'
    )
    assert "--trust-remote-code" in fails(tmp_path, student)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\n  \n", "is empty"),
        (b"one\ncaf\xe9\n", "not UTF-8: byte 0xe9 in line 2"),
        (b'{"text": "a"}\n{"label": 1}\n', "Line 2 .* has no text"),
        (b'{"text": "a"}\n\n{"text": 3}\n', "Line 3 .* has no text"),
        (b'{"text": "a"}\n{"text"\n', "Line 2 .* is not JSON"),
        (b'{"text": "\\ud800"}\n', "Line 1 .* surrogate"),
        (b'{"text": ""}\n', "all of its rows are empty"),
    ],
)
def test_texts_that_cannot_be_read(
    folders: tuple[str, str], tmp_path: Path, content: bytes, message: str
) -> None:
    file = tmp_path / "texts.jsonl"
    file.write_bytes(content)
    assert re.search(message, fails(*folders, "--texts", file))


def test_files_that_cannot_be_read_or_written(folders: tuple[str, str], tmp_path: Path) -> None:
    assert "cannot be read" in fails(*folders, "--texts", tmp_path / "none.txt")
    assert "cannot be read" in fails(*folders, "--texts", tmp_path)
    assert "cannot be written" in fails(*folders, "--html", tmp_path / "none" / "pair.html")
    assert "surrogate" in fails(*folders, "--show", "caf\udce9")  # an argument that was not UTF-8
    assert "no text to draw" in fails(*folders, "--show", "", "--png", tmp_path / "pair.png")
