"""Both sides of a row learn from one and the same answer, or the run says which don't."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import date
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unicodedata import normalize

import pytest
from axolotl.utils.dict import DictDefault
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import normalizers
from transformers import AutoTokenizer

from dwakd_plugin.data.answers import (
    MESSAGES,
    REASONING,
    SAME,
    SPELLING,
    TEXT,
    TOOLS,
    TORN,
    TURNS,
    Answers,
    compare,
    misplaced,
    order,
    said,
)
from dwakd_plugin.data.fingerprint import fingerprint
from dwakd_plugin.data.row_report import (
    DROPPED_DIFFERENT,
    KEPT,
    LABELS_DIFFERENT,
    RowReport,
)
from dwakd_plugin.data.teacher_side import TeacherSide
from dwakd_plugin.errors import UserError
from dwakd_plugin.recipe.schema import parse_recipe
from dwakd_plugin.tokenizers.alignment import TokenAligner
from dwakd_plugin.tokenizers.same_text import common_runs
from dwakd_plugin.tokenizers.template_date import template_date
from tests.conftest import CHAT_TEMPLATE, write_rows
from tests.data.test_dual_tokenization import prepare

__all__ = ["prepare"]  # a fixture

Prepare = Callable[[dict[str, Any]], tuple[Any, RowReport]]
TOOLS_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
    "{% for call in message.tool_calls or [] %}<call>{{ call.function.name }}</call>{% endfor %}"
    "<|im_end|>\n{% endfor %}"
)


def chat(*turns: str, **more: Any) -> dict[str, Any]:
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)]
    return {"messages": messages, **more}


@pytest.fixture
def chats(
    recipe: Callable[..., dict[str, Any]], tmp_path: Path
) -> Callable[[list[dict[str, Any]], dict[str, Any]], dict[str, Any]]:
    """A recipe on conversations; the student renders ChatML, the `dwakd:` block is given."""

    def build(rows: list[dict[str, Any]], dwakd: dict[str, Any], **more: Any) -> dict[str, Any]:
        data = {"path": str(write_rows(tmp_path / "chats.jsonl", rows)), "type": "chat_template"}
        return recipe(
            dwakd, datasets=[data | {"chat_template": "chatml"}], sequence_len=512, **more
        )

    return build


def answers(*turns: str) -> Answers:
    return Answers(turns, True)


# Comparing ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("student", "teacher", "kind"),
    [
        (("one", "two"), ("one", "two"), SAME),
        (("\none ", "two"), ("one", "two"), SPELLING),
        (("Cafe\u0301", "5 \u2126"), ("Café", "5 Ω"), SPELLING),
        (("a b",), ("a\u2581b",), SPELLING),
        (("four",), ("<think>\n\n</think>\n\nfour",), SPELLING),
        (("<think>two and two</think>four",), ("four",), REASONING),
        (("<think>two and two</think>four",), ("two and two</think>four",), REASONING),
        (("call", "three"), ("three",), TURNS),
        (("call", "three"), ("", "three"), TURNS),
        (("one",), ("another",), TEXT),
        (("a  b",), ("ab",), TEXT),
    ],
)
def test_how_two_answers_differ(
    student: tuple[str, ...], teacher: tuple[str, ...], kind: str
) -> None:
    assert compare(Answers(student, True), Answers(teacher, True)) == kind


@pytest.mark.parametrize(
    ("rendered", "words"),
    [
        ("Be brief. A? a. B? b.", ""),
        ("A? a. B? b.", "leaves out 'Be brief.'"),
        ("A? a. Be brief.\n\nB? b.", "moves 'Be brief.'"),
        ("Be brief. B? A? a. b.", "moves 'B?'"),
    ],
)
def test_messages_that_a_template_leaves_out_or_moves(rendered: str, words: str) -> None:
    """As Mistral's do with a system message, DeepSeek's with a late one."""
    texts = [("system", " Be\u2581brief.\n"), ("user", "A?"), ("assistant", "<think>o</think>a.")]
    texts += [("tool", ""), ("user", "B?"), ("assistant", "b.")]
    messages = said([{"role": role, "content": text} for role, text in texts])
    assert misplaced(messages, order(messages, rendered)) == words


@pytest.mark.parametrize("ascii", [False, True])
def test_what_a_tool_said_may_be_quoted(ascii: bool) -> None:
    text = '{"größe": "3\n"}'
    messages = said([{"role": "tool", "content": text}, {"role": "tool"}])
    assert order(messages, text) == order(messages, json.dumps(text, ensure_ascii=ascii)) == [0]


@given(one=st.text("ab é\u0301\n数", max_size=30), other=st.text("ab é\u0301\n数", max_size=30))
def test_common_runs_are_common(one: str, other: str) -> None:
    a, b = one.encode(), other.encode()
    runs = common_runs(a, b)
    assert all(a[i : i + n] == b[j : j + n] and n > 0 for i, j, n in runs)
    ends = [(i + n, j + n) for i, j, n in runs]
    assert all(x <= i and y <= j for (x, y), (i, j, _) in zip(ends, runs[1:], strict=False))


@given(text=st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=40))
def test_a_text_and_itself_have_all_in_common(text: str) -> None:
    raw = text.encode()
    assert common_runs(raw, raw) == ([(0, 0, len(raw))] if raw else [])
    spaced = b"\n " + raw
    assert sum(n for _, _, n in common_runs(spaced, raw)) == len(raw)


def test_pairing_goes_on_behind_accents_that_are_written_otherwise() -> None:
    composed = "Café Rivière at the corner, or the old crêperie beside it."
    runs = common_runs(normalize("NFD", composed).encode(), composed.encode())
    assert sum(n for _, _, n in runs) == len(composed.encode()) - 3 * 2


# Aligning -----------------------------------------------------------------------------------------


def paired(lab: Path, teacher_tokenizer: Any, student: str, teacher: str) -> list[tuple[str, str]]:
    """The tokens that pair, in words."""
    own = AutoTokenizer.from_pretrained(lab / "student")
    ids = [
        tokenizer(text).input_ids
        for tokenizer, text in ((own, student), (teacher_tokenizer, teacher))
    ]
    rows = [
        [0, *tokens, tokenizer.eos_token_id]
        for tokens, tokenizer in zip(ids, (own, teacher_tokenizer), strict=True)
    ]
    labels = [[-100, *row[1:]] for row in rows]
    pairs = TokenAligner(own, teacher_tokenizer, whole=False).pairs(
        rows[0], labels[0], rows[1], labels[1]
    )
    return [
        (own.decode(rows[0][i + 1]), teacher_tokenizer.decode(rows[1][j + 1])) for i, j in pairs
    ]


def test_a_line_break_that_one_side_strips_costs_one_token(lab: Path) -> None:
    teacher = AutoTokenizer.from_pretrained(lab / "teacher")
    text = "Function 3 returns the median of its arguments."
    whole = paired(lab, teacher, text, text)
    assert len(whole) > 5
    assert paired(lab, teacher, "\n" + text, text) == whole
    assert paired(lab, teacher, text, "<think>\n\n</think>\n\n" + text) == whole


def test_a_normaliser_of_one_side_costs_the_accents(lab: Path) -> None:
    teacher = AutoTokenizer.from_pretrained(lab / "teacher")
    teacher.backend_tokenizer.normalizer = normalizers.NFC()
    text = normalize("NFD", "Function größte returns the median of its arguments.")
    pairs = paired(lab, teacher, text, text)
    assert len(pairs) > 8
    assert pairs[-1] == (AutoTokenizer.from_pretrained(lab / "student").eos_token, "<|im_end|>")
    assert all(own and other.startswith(own) for own, other in pairs[:-1])


# Preparing ----------------------------------------------------------------------------------------


def test_reasoning_that_the_teacher_drops_is_counted_and_not_taught(
    chats: Callable[..., dict[str, Any]], prepare: Prepare
) -> None:
    reasoned = "<think>\nadd two and two\n</think>\n\nIt is four."
    rows = [chat("2+2?", reasoned, "Times three?", "<think>\n4*3\n</think>\n\nTwelve.")]
    rows += [chat("And?", "Nothing.")] * 2
    block = {"teacher": {"chat_template": "qwen3"}}
    datasets, report = prepare(chats(rows, block))
    assert report.counts == {LABELS_DIFFERENT: 1, KEPT: 2}
    assert report.answers[REASONING] == 1
    student, teacher = report.examples[REASONING]
    assert "add two and two" in student
    assert "add two and two" not in teacher
    (different,) = [row for row in datasets.train_dataset if set(row["teacher_labels"]) == {-100}]
    assert different["source_row"] == 0
    assert "add two and two" in report.shown()

    _, report = prepare(chats(rows, block | {"different_answers": "drop"}))
    assert report.counts == {DROPPED_DIFFERENT: 1, KEPT: 2}
    with pytest.raises(UserError, match=r"answer differently[^✗]*add two and two"):
        prepare(chats(rows, block | {"different_answers": "stop"}))


def test_tool_calls_that_the_teacher_does_not_know_are_not_taught(
    chats: Callable[..., dict[str, Any]], prepare: Prepare
) -> None:
    call = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": {"name": "sum", "arguments": {"a": 1}}}],
    }
    messages = [
        {"role": "user", "content": "1 and 2?"},
        call,
        {"role": "tool", "content": "3"},
        {"role": "assistant", "content": "Three."},
    ]
    settings = chats([{"messages": messages}, chat("And?", "Nothing.")], {})
    settings["datasets"][0] |= {"chat_template": "jinja", "chat_template_jinja": TOOLS_TEMPLATE}
    _, report = prepare(settings)
    assert report.counts == {LABELS_DIFFERENT: 1, KEPT: 1}


def test_tools_that_a_side_leaves_out_are_said(
    chats: Callable[..., dict[str, Any]], prepare: Prepare
) -> None:
    """The student answers with a tool's result in mind that the teacher has never heard of."""
    tool = {"type": "function", "function": {"name": "add_up", "parameters": {"type": "object"}}}
    with_tools = (
        "{% for tool in tools or [] %}{{ tool.function.name }} {% endfor %}" + CHAT_TEMPLATE
    )
    rows = [chat("1 add_up 2?", "Three.", tools=[tool]), chat("Two?", "Two.", tools=[])]
    both = chats(rows, {"teacher": {"chat_template": with_tools}})
    both["datasets"][0] |= {"chat_template": "jinja", "chat_template_jinja": with_tools}
    assert prepare(both)[1].counts == {KEPT: 2}

    one = chats(rows, {"teacher": {"chat_template": CHAT_TEMPLATE}})
    one["datasets"][0] |= {"chat_template": "jinja", "chat_template_jinja": with_tools}
    _, report = prepare(one)
    assert report.counts == {KEPT: 1, LABELS_DIFFERENT: 1}
    assert report.examples[TOOLS] == ("", "leaves out add_up")
    assert report.example_rows[TOOLS] == 0


def test_a_message_that_the_teacher_never_reads_is_said(
    chats: Callable[..., dict[str, Any]], prepare: Prepare
) -> None:
    leaves_out = CHAT_TEMPLATE.replace("messages %", "messages if message.role != 'system' %")
    asked = chat("Two and two?", "Quatre.")
    asked["messages"].insert(0, {"role": "system", "content": "Answer in French."})
    rows = [chat("Two?", "Two."), asked]
    _, report = prepare(chats(rows, {"teacher": {"chat_template": leaves_out}}))
    assert report.counts == {KEPT: 1, LABELS_DIFFERENT: 1}
    assert report.examples[MESSAGES] == ("", "leaves out 'Answer in French.'")


def test_what_neither_side_reads_is_said(
    chats: Callable[..., dict[str, Any]], prepare: Prepare, caplog: pytest.LogCaptureFixture
) -> None:
    """Reasoning, calls of tools and a system message that both templates leave out alike."""
    call = {"type": "function", "function": {"name": "add_up", "arguments": "{}"}}
    asked = chat("Use add_up: 1, 2?", "", "And?", "Three.")
    asked["messages"][1]["tool_calls"] = [call]
    asked["messages"][3]["reasoning_content"] = "one and two"
    asked["messages"].insert(0, {"role": "system", "content": "Answer in French."})
    rows = [chat("Two?", "Two."), asked]
    reads = TOOLS_TEMPLATE.replace(
        "{{ message.content }}", "{{ message.reasoning_content }}{{ message.content }}"
    )
    leaves_out = CHAT_TEMPLATE.replace("messages %", "messages if message.role != 'system' %")
    for template, unread in (
        (reads, {}),
        (
            leaves_out,
            {
                "a message": (1, "leaves out 'Answer in French.'"),
                "calls of tools (`tool_calls`)": (1, "add_up"),
                "reasoning (`reasoning_content`)": (1, "one and two"),
            },
        ),
    ):
        settings = chats(rows, {"teacher": {"chat_template": template}})
        settings["datasets"][0] |= {"chat_template": "jinja", "chat_template_jinja": template}
        _, report = prepare(settings)
        assert report.counts == {KEPT: 2}
        assert report.unread_examples == unread
        assert report.unread == dict.fromkeys(unread, 1)
    assert "1 of 2 rows have reasoning (`reasoning_content`) that neither side's" in caplog.text


@pytest.mark.parametrize(
    ("field", "entry", "teacher"),
    [
        ("reasoning_content", {}, {"thinking_key": "thinking"}),
        ("thoughts", {"field_thinking": "thoughts"}, {"thinking_key": "thinking"}),
        ("thoughts", {"field_thinking": "thoughts"}, {}),
        ("reasoning_content", {"template_thinking_key": "thinking"}, {}),
    ],
)
def test_each_side_is_given_the_reasoning_under_its_own_name(
    field: str,
    entry: dict[str, str],
    teacher: dict[str, str],
    chats: Callable[..., dict[str, Any]],
    prepare: Prepare,
) -> None:
    row = chat("Two and two?", "Four.")
    row["messages"][1][field] = "add them"
    own, others = (
        CHAT_TEMPLATE.replace("{{ message.content", f"{{{{ message.{name} }}}}{{{{ message.content")
        for name in (
            entry.get("template_thinking_key", "reasoning_content"),
            teacher.get("thinking_key") or entry.get("template_thinking_key", "reasoning_content"),
        )
    )
    settings = chats([row] * 2, {"teacher": {"chat_template": others, **teacher}})
    settings["datasets"][0] |= {"chat_template": "jinja", "chat_template_jinja": own, **entry}
    datasets, report = prepare(settings)
    assert report.counts == {KEPT: 2} and report.answers == {SAME: 2} and not report.unread
    for side, labels in (("base_model", "labels"), ("teacher", "teacher_labels")):
        name = settings[side] if side == "base_model" else settings["dwakd"][side]["base_model"]
        learnt = [label for label in datasets.train_dataset[0][labels] if label != -100]
        text = AutoTokenizer.from_pretrained(name).decode(learnt)
        assert text.startswith("add themFour.")


@pytest.mark.parametrize("variable", ["message", "m", "turn"])
def test_a_template_is_given_what_it_reads_by_whatever_name_its_loop_has(
    variable: str, chats: Callable[..., dict[str, Any]], prepare: Prepare
) -> None:
    """GLM-4.5's says `for m in messages`; axolotl hands on to a variable called `message` alone."""
    template = CHAT_TEMPLATE.replace(
        "{{ message.content",
        "{{ message.reasoning_content }}{{ message.name }}"
        "{% for call in message.tool_calls or [] %}{{ call.function.name }}{% endfor %}"
        "{{ message.content",
    ).replace("message.", f"{variable}.")
    template = template.replace("for message in messages", f"for {variable} in messages")
    row = chat("Two and two?", "Four.")
    row["messages"][1] |= {
        "reasoning_content": "Hm. ",
        "name": "Ada ",
        "tool_calls": [{"type": "function", "function": {"name": "add ", "arguments": {}}}],
    }
    settings = chats([row] * 2, {"teacher": {"chat_template": template}})
    settings["datasets"][0] |= {"chat_template": "jinja", "chat_template_jinja": template}
    datasets, report = prepare(settings)
    assert report.answers == {SAME: 2} and not report.unread
    ids = datasets.train_dataset[0]["input_ids"]
    text = AutoTokenizer.from_pretrained(settings["base_model"]).decode(ids)
    assert "Hm. Ada add Four." in text


def test_an_answer_that_quotes_the_end_of_a_reasoning_is_not_torn_unnoticed(
    chats: Callable[..., dict[str, Any]], prepare: Prepare
) -> None:
    """Both templates split at it, so that both sides have the same torn answer."""
    splits = CHAT_TEMPLATE.replace(
        "message.content", "message.content.split('</think>')[-1].lstrip()"
    )
    rows = [
        chat("How does it end?", "It writes </think> and goes on."),
        chat("And here?", "<think>a word</think>It writes </think> too."),
        chat("Two?", "<think>one, two</think>Two."),
    ]
    settings = chats(rows, {"teacher": {"chat_template": splits}})
    settings["datasets"][0] |= {"chat_template": "jinja", "chat_template_jinja": splits}
    _, report = prepare(settings)
    assert report.counts == {KEPT: 1, LABELS_DIFFERENT: 2}
    assert report.answers[TORN] == 2
    assert report.examples[TORN][0].strip() == "and goes on."

    whole = chats(rows, {"teacher": {"chat_template": CHAT_TEMPLATE}})
    whole["datasets"][0] |= {"chat_template": "jinja", "chat_template_jinja": CHAT_TEMPLATE}
    assert prepare(whole)[1].counts == {KEPT: 3}


# Rows ---------------------------------------------------------------------------------------------


def test_rows_that_were_added_are_read(
    recipe: Callable[..., dict[str, Any]], prepare: Prepare, tmp_path: Path
) -> None:
    rows = [
        {"instruction": f"What is {i}?", "input": "", "output": f"A number, {i}."}
        for i in range(30)
    ]
    file = write_rows(tmp_path / "growing.jsonl", rows[:10])
    settings = recipe({}, datasets=[{"path": str(file), "type": "alpaca"}])
    assert len(prepare(settings)[0].train_dataset) == 10
    write_rows(file, rows)
    assert len(prepare(settings)[0].train_dataset) == 30


def test_all_that_rows_are_made_of_is_in_their_name(lab: Path, tmp_path: Path) -> None:
    """axolotl knows files by name alone, and nothing of the day that a template prints."""
    student, data = tmp_path / "student", tmp_path / "data" / "deep"
    student.mkdir()
    data.mkdir(parents=True)
    teacher = AutoTokenizer.from_pretrained(lab / "teacher")
    config = parse_recipe({"distillation": "dwakd", "dwakd": {"teacher": "big"}})
    assert config is not None
    keys = {
        "base_model": str(student),
        "output_dir": str(tmp_path / "data" / "out"),
        "chat_template_jinja": str(tmp_path / "own.jinja"),
        "datasets": [{"path": "json", "data_files": {"train": str(tmp_path / "*.jsonl")}}],
        "test_datasets": [{"path": str(tmp_path / "data")}],
    }

    def name(day: int = 1, **own: Any) -> str:
        with template_date(date(2030, 1, day)):
            side = SimpleNamespace(config=config, recipe=DictDefault(own), tokenizer=teacher)
            return fingerprint(DictDefault(keys), [cast(TeacherSide, side)])

    names = [name()]
    for file in ("more.jsonl", "own.jinja", "data/deep/a.csv", "student/tokenizer_config.json"):
        (tmp_path / file).write_text("x")
        names.append(name())
    assert len(set(names)) == 5
    for ignored in ("data/out/log", "data/.cache/a", "student/model.safetensors"):
        (tmp_path / ignored).parent.mkdir(exist_ok=True)
        (tmp_path / ignored).write_text("x")
        assert name() == names[-1] == name(day=2)
    dated = "{{ strftime_now('%d') }}"
    assert name(chat_template_jinja=dated) != name(chat_template_jinja=dated, day=2)
    (student / "chat_template.jinja").write_text(dated)
    assert name() != name(day=2)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"messages": []}, "`messages` is empty"),
        (
            {"messages": [{"content": "?"}, {"role": "assistant", "content": "x"}]},
            "message 1 of `messages` has no role",
        ),
        (
            chat("Name a river.", "x")
            | {
                "messages": [
                    {"role": "user", "content": "?"},
                    {"role": "assistant", "content": None},
                ]
            },
            r"message 2 of `messages` \(assistant\) has no content",
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": "?"},
                    {"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]},
                ]
            },
            r"2 of `messages` \(assistant\) has calls of tools and no content, which the student's",
        ),
        ({"messages": [{"role": "assistant", "content": 4}]}, "has the int 4 as content"),
        (
            {"messages": [{"from": "human", "value": "?"}]},
            "neither `role` nor `content`, but from, value; [^✗]*message_property_mappings",
        ),
        ({"conversations": [{"role": "user", "content": "?"}]}, "name its conversation field_mess"),
    ],
)
def test_a_conversation_that_lacks_something_says_what(
    row: dict[str, Any], words: str, chats: Callable[..., dict[str, Any]], prepare: Prepare
) -> None:
    with pytest.raises(UserError, match=words):
        prepare(chats([row], {}))


def test_a_system_message_that_the_teacher_refuses_names_the_teacher(
    chats: Callable[..., dict[str, Any]], prepare: Prepare
) -> None:
    refuses = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('No system') }}{% endif %}"
        + CHAT_TEMPLATE
    )
    row = chat("And?", "Nothing.")
    row["messages"].insert(0, {"role": "system", "content": "Be brief."})
    with pytest.raises(
        UserError, match=r"The teacher \(.*teacher\) cannot render[^✗]*dwakd.teacher.chat_template"
    ):
        prepare(chats([row], {"teacher": {"chat_template": refuses}}))


def test_a_row_that_is_too_long_stops_the_run_where_the_recipe_says_so(
    recipe: Callable[..., dict[str, Any]], prepare: Prepare, tmp_path: Path
) -> None:
    rows = [{"instruction": "x", "input": "", "output": "word " * count} for count in (3, 4000)]
    data = {"path": str(write_rows(tmp_path / "long.jsonl", rows)), "type": "alpaca"}
    settings = recipe({}, datasets=[data], excess_length_strategy="raise")
    with pytest.raises(UserError, match=r"tokens on the student's side, and sequence_len is 256"):
        prepare(settings)


def test_the_report_is_read_back_with_the_rows(
    chats: Callable[..., dict[str, Any]], prepare: Prepare
) -> None:
    rows = [chat("2+2?", "<think>two</think>four", "x?", "<think>y</think>z"), chat("And?", "No.")]
    settings = chats(rows, {"teacher": {"chat_template": "qwen3"}})
    _, first = prepare(settings)
    _, again = prepare(settings)
    assert json.loads(json.dumps(again.__dict__)) == json.loads(json.dumps(first.__dict__))
