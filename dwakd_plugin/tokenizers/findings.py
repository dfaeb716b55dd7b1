"""Whether a pair of tokenizers is fit for distillation: findings with what to do, and a verdict."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from statistics import median
from typing import Any, Literal, NamedTuple

from dwakd_plugin.tokenizers.pair import ByteCutter, Changed, TextFigures, cut_both

# Thresholds: docs/checking_a_pair.md says why.
GOOD = {"length_ratio": 1.5, "boundary_agreement": 0.8, "identical_span_share": 0.7}
WORKABLE = {"length_ratio": 2.5, "boundary_agreement": 0.4, "identical_span_share": 0.25}
# Below this many shared tokens the projectors' least squares have little to go by, and
# `projectors.init: auto` starts them at random.
ENOUGH_SHARED_TOKENS = 300
LONG = 2.0  # times the other side's tokens for one language or format
OFTEN = 0.05  # share of the characters from which on digits or white space weigh
PRESENT = 0.01  # share of the letters from which on a script is in the data


Severity = Literal["info", "warning", "problem"]
Verdict = Literal["good", "workable", "poor"]


class Finding(NamedTuple):
    """Something to know about a pair: a stable code, how much it matters, and what to do."""

    code: str
    severity: Severity
    message: str


class Side(NamedTuple):
    """One of the two tokenizers. `head_rows`: the model's `vocab_size`, where it is known."""

    role: Literal["teacher", "student"]
    tokenizer: Any
    cutter: ByteCutter
    head_rows: int | None


def findings_of(
    teacher: Side,
    student: Side,
    vocabulary: Mapping[str, Any],
    figures: TextFigures,
    groups: Mapping[str, TextFigures],
    *,
    own_texts: bool,
) -> list[Finding]:
    """Everything worth saying about a pair, the gravest first.

    groups: figures by language or format of the built-in sample; own_texts: whether `figures` are
    of the user's data rather than of that sample.
    """
    sides = (teacher, student)
    findings = [
        *(finding for side in sides for finding in _head_findings(side)),
        *(finding for side in sides for finding in _end_findings(side)),
        *_added_token_findings(teacher, student),
        *_template_findings(teacher, student),
        *_changed_text_findings(teacher, student),
        *_left_out_findings(figures),
        *_length_findings(figures),
        *_group_findings(figures, groups, own_texts=own_texts),
        *_split_findings(teacher, student, figures, own_texts=own_texts),
        *_vocabulary_findings(teacher, student, vocabulary, figures),
    ]
    order = ("problem", "warning", "info")
    return sorted(findings, key=lambda finding: order.index(finding.severity))


def _head_findings(side: Side) -> list[Finding]:
    rows, tokens = side.head_rows, len(side.tokenizer)
    if rows is None or rows == tokens:
        return []
    if rows < tokens:
        return [
            Finding(
                f"{side.role}_head_too_small",
                "problem",
                f"The {side.role}'s tokenizer has {tokens:,} tokens, its model's head only "
                f"{rows:,} rows: ids from {rows} on will fail. Take the tokenizer that belongs to "
                "the model, or resize the model's embeddings and train the new rows first.",
            )
        ]
    return [
        Finding(
            f"{side.role}_head_padded",
            "info",
            f"The {side.role}'s head has {rows:,} rows for {tokens:,} tokens: {rows - tokens:,} "
            "rows that no id reaches. Nothing to do: they stay in the softmax, as the model itself "
            "computes it. Size nothing by the tokenizer.",
        )
    ]


def _end_findings(side: Side) -> list[Finding]:
    tokenizer, role = side.tokenizer, side.role
    if tokenizer.eos_token_id is None:
        return [
            Finding(
                f"{role}_no_eos",
                "problem",
                f"The {role}'s tokenizer has no end-of-sequence token, so its responses have no "
                "end. Set `eos_token` in its tokenizer_config.json"
                + (", or special_tokens.eos_token in the recipe." if role == "student" else "."),
            )
        ]
    if tokenizer.pad_token_id is None:
        message = (
            f"The {role}'s tokenizer has no padding token. axolotl pads with the end-of-sequence "
            "token then; labels and attention mask keep the two apart. To have one of its own, set "
            "special_tokens.pad_token to a token that the vocabulary has."
            if role == "student"
            else "The teacher's tokenizer has no padding token. Nothing to do: its rows are "
            "padded by their lengths."
        )
        return [Finding(f"{role}_no_pad", "info", message)]
    if tokenizer.pad_token_id == tokenizer.eos_token_id:
        return [
            Finding(
                f"{role}_pad_is_eos",
                "info",
                f"The {role} pads with its end-of-sequence token `{tokenizer.eos_token}`. Own code "
                "that masks padding by its id would mask the real ends of responses too, and the "
                "model would never learn to stop: mask by the attention mask, as dwakd does.",
            )
        ]
    return []


def _added_around(tokenizer: Any) -> tuple[str, str]:
    """What the tokenizer puts before and after a text on its own."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    begin = next(
        (i for i in range(len(full) - len(bare) + 1) if full[i : i + len(bare)] == bare), 0
    )
    names = tokenizer.convert_ids_to_tokens(full)
    return "".join(names[:begin]), "".join(names[begin + len(bare) :])


def _added_token_findings(teacher: Side, student: Side) -> list[Finding]:
    findings = []
    around = [_added_around(side.tokenizer) for side in (teacher, student)]
    for index, (name, where) in enumerate((("bos", "before"), ("eos", "after"))):
        ours, theirs = (bool(each[index]) for each in around)
        if ours != theirs:
            side, other = (teacher, student) if ours else (student, teacher)
            token = around[0 if ours else 1][index]
            findings.append(
                Finding(
                    f"{name}_on_one_side",
                    "info",
                    f"Only the {side.role} puts `{token}` {where} every text, the {other.role} "
                    "puts nothing. Nothing to do: rows are tokenised for each side by its own "
                    "rules, and these figures count no special tokens.",
                )
            )
    return findings


def _template_findings(teacher: Side, student: Side) -> list[Finding]:
    findings = []
    have = [bool(side.tokenizer.chat_template) for side in (teacher, student)]
    if have == [False, False]:
        findings.append(
            Finding(
                "no_chat_template",
                "info",
                "Neither side has a chat template. Train on alpaca or another prompt format; for "
                "conversations set chat_template and dwakd.teacher.chat_template.",
            )
        )
    elif have == [False, True]:
        findings.append(
            Finding(
                "teacher_no_chat_template",
                "warning",
                "The teacher has no chat template, the student has one. The teacher may be a base "
                "model: its instruct version teaches conversations better. Otherwise set "
                "dwakd.teacher.chat_template, for conversations.",
            )
        )
    elif have == [True, False]:
        findings.append(
            Finding(
                "student_no_chat_template",
                "info",
                "The student has no chat template, the teacher has one. For conversations set "
                "chat_template in the recipe; its markers should be tokens that the student has.",
            )
        )
    for side in (teacher, student):
        if side.tokenizer.chat_template and side.tokenizer.eos_token is not None:
            findings += _turn_end_findings(side)
    return findings


def _turn_end_findings(side: Side) -> list[Finding]:
    """Whether the chat template ends the assistant's turn with the end-of-sequence token."""
    answer = "The answer is forty-two."
    chat = [
        {"role": "user", "content": "What is the answer?"},
        {"role": "assistant", "content": answer},
    ]
    try:
        text = side.tokenizer.apply_chat_template(chat, tokenize=False)
    except (
        Exception
    ) as error:  # a template is code of the tokenizer's author: it may raise anything
        return [
            Finding(
                f"{side.role}_chat_template_fails",
                "warning",
                f"The {side.role}'s chat template cannot render a question and its answer "
                f"({error}). Set another one in the recipe if you train on conversations.",
            )
        ]
    end = text.rpartition(answer)[2]
    if side.tokenizer.eos_token in end:
        return []
    key = "special_tokens.eos_token" if side.role == "student" else "its tokenizer's eos_token"
    return [
        Finding(
            f"{side.role}_eos_not_in_template",
            "warning",
            f"The {side.role}'s chat template ends an answer with {end!r}, not with its "
            f"end-of-sequence token `{side.tokenizer.eos_token}`. Prompt formats that append that "
            f"token (alpaca) then end answers otherwise than conversations do: set {key} to the "
            "template's own end, and stop generation on it.",
        )
    ]


# What a tokenizer may change before it cuts: a short text that shows it, and whether it is lost.
_PROBES: dict[str, tuple[str, bool]] = {
    "composed accents (NFC)": ("e\u0301", False),
    "compatibility forms (NFKC)": ("Ａ", False),
    "capitals": ("aB Cd", True),
    "line breaks": ("a\nb", True),
    "tabs": ("a\tb", True),
    "repeated spaces": ("a  b", True),
}


def _changed_text_findings(teacher: Side, student: Side) -> list[Finding]:
    findings = []
    probes = [probe for probe, _ in _PROBES.values()]
    changed: dict[str, set[str]] = {}
    for side in (teacher, student):
        changed[side.role] = {
            name
            for name, cut in zip(_PROBES, side.cutter.cut(probes), strict=True)
            # A form without a token (text None) says nothing of normalisation.
            if isinstance(cut, Changed) and (cut.text is not None or _PROBES[name][1])
        }
        lost = [name for name in _PROBES if _PROBES[name][1] and name in changed[side.role]]
        if lost:
            findings.append(
                Finding(
                    f"{side.role}_loses_text",
                    "problem" if side.role == "student" else "warning",
                    f"The {side.role}'s tokenizer does not keep {', '.join(lost)}. "
                    + (
                        "The student can never write them: choose another student."
                        if side.role == "student"
                        else "The teacher's states then know nothing of them; code, tables and "
                        "lists suffer most. Choose another teacher for such data."
                    ),
                )
            )
    if changed["teacher"] != changed["student"]:
        only = [
            f"only the {role} changes {', '.join(sorted(names))}"
            for role, other in (("teacher", "student"), ("student", "teacher"))
            if (names := changed[role] - changed[other])
        ]
        findings.append(
            Finding(
                "normalisers_differ",
                "info",
                f"The two normalise differently: {' and '.join(only)}. Normalise the data once "
                "(unicodedata.normalize) so that both sides read the same text. Texts with a "
                "difference were compared as normalised.",
            )
        )
    return findings


def _left_out_findings(figures: TextFigures) -> list[Finding]:
    if not figures.left_out:
        return []
    share = figures.left_out / figures.texts
    return [
        Finding(
            "unknown_characters",
            "problem" if not figures.teacher_tokens else "warning",
            f"{figures.left_out:,} of {figures.texts:,} texts have characters that a tokenizer has "
            f"no token for, not even bytes ({share:.0%}); they were left out of the figures. Drop "
            "such rows from the data, or choose a tokenizer with byte fallback.",
        )
    ]


def _length_findings(figures: TextFigures) -> list[Finding]:
    if not figures.teacher_tokens:
        return []
    teacher_per_student = 1 / figures.as_dict()["length_ratio"]["p5"]
    if teacher_per_student < 1.1:
        return []
    return [
        Finding(
            "teacher_needs_more_tokens",
            "info",
            f"In one of twenty texts the teacher needs {teacher_per_student:.2f} times the "
            "student's tokens or more. Its longest sequence is the student's by default: set "
            f"dwakd.teacher.sequence_len to {teacher_per_student:.2f} times sequence_len, so that "
            "long rows keep their ends on the teacher's side.",
        )
    ]


def _script(characters: Counter[str]) -> Counter[str]:
    """Letters by script, as the first word of their Unicode names: LATIN, CYRILLIC, CJK."""
    scripts: Counter[str] = Counter()
    for character, count in characters.items():
        if character.isalpha():
            scripts[unicodedata.name(character, "?").split()[0]] += count
    return scripts


def _group_findings(
    figures: TextFigures, groups: Mapping[str, TextFigures], *, own_texts: bool
) -> list[Finding]:
    """Languages and formats that take one side far more tokens than the other."""
    letters = _script(figures.characters)
    ratios = {
        name: sum(group.student_tokens) / sum(group.teacher_tokens)
        for name, group in groups.items()
        if group.teacher_tokens
    }
    # A side that is long everywhere has a small vocabulary: the verdict says so.
    everywhere = median(ratios.values()) if ratios else 1.0
    long: dict[str, list[str]] = {"student": [], "teacher": []}
    concerned: set[str] = set()
    for name, ratio in ratios.items():
        role = "student" if ratio > 1 else "teacher"
        usual = everywhere if role == "student" else 1 / everywhere
        times = max(ratio, 1 / ratio)
        if times < LONG or usual >= LONG:
            continue
        long[role].append(f"{name} ({times:.1f} times)")
        # Latin letters are in all data, whatever the language: they say nothing.
        scripts = set(_script(groups[name].characters)) - {"LATIN"}
        if not own_texts or any(letters[each] >= PRESENT * letters.total() for each in scripts):
            concerned.add(role)
    findings = []
    for role, other, consequence in (
        ("student", "teacher", "the student learns bytes rather than words"),
        ("teacher", "student", "the teacher knows little of the language's words"),
    ):
        if not long[role]:
            continue
        if role not in concerned:
            place = "Where your data have them, "
        else:
            place = "Their script is in your texts: " if own_texts else "There "
        findings.append(
            Finding(
                f"{role}_long_in_some_languages",
                "warning" if role in concerned else "info",
                f"The {role} needs far more tokens than the {other} for {', '.join(long[role])}. "
                f"{place}one token of the {other} faces many of the {role}, sequences grow, and "
                f"{consequence}: leave them out of the data, or choose a {role} whose vocabulary "
                "has them.",
            )
        )
    return findings


_NUMBERS = "In 2024 and 1987 there were 1234567 of 65536, or 3.14159265 times 100."
_INDENTED = "if x:\n    if y:\n        return 1\n\n\n\tend\n\n  last    words"


def _split_findings(
    teacher: Side, student: Side, figures: TextFigures, *, own_texts: bool
) -> list[Finding]:
    """Runs of digits and of white space that the two cut at different places."""
    total = max(1, figures.characters.total())
    digits = sum(n for character, n in figures.characters.items() if character.isdigit()) / total
    white = figures.white_run_characters / total
    findings = []
    for code, text, kind, share, what in (
        ("digits_split_differently", _NUMBERS, r"\d", digits, "digits"),
        ("white_space_split_differently", _INDENTED, r"\s", white, "runs of white space"),
    ):
        (pair,) = cut_both(teacher.cutter, student.cutter, [text])
        if pair is None or pair.text != text:
            continue
        # The test texts are ASCII: a byte is a character.
        inside = {
            place
            for place in range(1, len(text))
            if re.fullmatch(kind * 2, text[place - 1 : place + 1])
        }
        cuts = (pair.teacher, pair.student)
        if inside & set(cuts[0].ends) == inside & set(cuts[1].ends):
            continue
        longest = [
            max(
                len(run)
                for begin, end in pairwise([0, *cut.ends])
                for run in re.findall(f"{kind}+", text[begin:end])
            )
            for cut in cuts
        ]
        often = own_texts and share >= OFTEN
        findings.append(
            Finding(
                code,
                "warning" if often else "info",
                f"The two cut {what} at different places: in a test text the teacher has up to "
                f"{longest[0]} of them in a token, the student up to {longest[1]}. "
                + (
                    f"They are {share:.0%} of your texts' characters: expect less from the teacher "
                    "there than elsewhere, and look at such answers apart."
                    if often
                    else "It matters for data full of them; nothing to do otherwise."
                ),
            )
        )
    return findings


def _vocabulary_findings(
    teacher: Side, student: Side, vocabulary: Mapping[str, Any], figures: TextFigures
) -> list[Finding]:
    if vocabulary["shared_tokens_bytes"] < ENOUGH_SHARED_TOKENS:
        return [
            Finding(
                "few_shared_tokens",
                "warning",
                f"Only {vocabulary['shared_tokens_bytes']:,} tokens are the same bytes on both "
                f"sides; below {ENOUGH_SHARED_TOKENS} the projectors start at random. Warm them up "
                "for longer (dwakd.projectors.warmup_steps).",
            )
        ]
    same = teacher.tokenizer.get_vocab() == student.tokenizer.get_vocab()
    if same and figures.student_spans_shared == figures.student_tokens:
        return [
            Finding(
                "same_tokenizer",
                "info",
                "The two tokenizers are the same. Cross-tokenizer distillation works here, but "
                "distilling logits directly (axolotl's kd plugin) is cheaper.",
            )
        ]
    return []


def verdict_of(
    figures: Mapping[str, Any], findings: Sequence[Finding]
) -> tuple[Verdict, list[str]]:
    """`good`, `workable` or `poor`, and why it is not better; thresholds: GOOD and WORKABLE.

    figures: TextFigures.as_dict(). A finding of severity `problem` makes the verdict poor.
    """
    problems = [finding.code for finding in findings if finding.severity == "problem"]
    if figures["length_ratio"] is None:
        return "poor", ["no text could be compared", *problems]
    ratio = figures["length_ratio"]["mean"]
    agreement = min(figures["boundary_agreement_student"], figures["boundary_agreement_teacher"])
    identical = figures["identical_span_share"]

    def short_of(bar: Mapping[str, float]) -> list[str]:
        reasons = []
        if not 1 / bar["length_ratio"] <= ratio <= bar["length_ratio"]:
            reasons.append(
                f"the student has {ratio:.2f} times the teacher's tokens (between "
                f"{1 / bar['length_ratio']:.2f} and {bar['length_ratio']:.2f} wanted)"
            )
        if agreement < bar["boundary_agreement"]:
            reasons.append(
                f"{agreement:.0%} of one side's tokens end where one of the other ends "
                f"({bar['boundary_agreement']:.0%} wanted)"
            )
        if identical < bar["identical_span_share"]:
            reasons.append(
                f"{identical:.0%} of the student's tokens are also tokens of the teacher in place "
                f"({bar['identical_span_share']:.0%} wanted)"
            )
        return reasons

    if reasons := [*problems, *short_of(WORKABLE)]:
        return "poor", reasons
    if reasons := short_of(GOOD):
        return "workable", reasons
    return "good", []
