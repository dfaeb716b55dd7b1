"""Findings on a pair of tokenizers, each with what to do: those of texts, and all together."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Mapping
from itertools import pairwise
from statistics import median
from typing import Any

from dwakd_plugin.tokenizers.figures import TextFigures
from dwakd_plugin.tokenizers.model_findings import (
    added_token_findings,
    class_findings,
    end_findings,
    head_findings,
    template_findings,
)
from dwakd_plugin.tokenizers.pair import Changed, cut_both
from dwakd_plugin.tokenizers.verdict import Finding, Side

# Below this many shared tokens the projectors' least squares have little to go by, and
# `projectors.init: auto` starts them at random.
ENOUGH_SHARED_TOKENS = 300
LONG = 2.0  # times the other side's tokens for one language or format
OFTEN = 0.05  # share of the characters from which on digits or white space weigh
PRESENT = 0.01  # share of the letters from which on a script is in the data


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
        *(finding for side in sides for finding in class_findings(side)),
        *(finding for side in sides for finding in head_findings(side)),
        *(finding for side in sides for finding in end_findings(side)),
        *added_token_findings(teacher, student),
        *template_findings(teacher, student),
        *_changed_text_findings(teacher, student),
        *_left_out_findings(figures),
        *_length_findings(figures),
        *_group_findings(figures, groups, own_texts=own_texts),
        *_split_findings(teacher, student, figures, own_texts=own_texts),
        *_vocabulary_findings(teacher, student, vocabulary, figures),
    ]
    order = ("problem", "warning", "info")
    return sorted(findings, key=lambda finding: order.index(finding.severity))


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
    same = figures.student_spans_shared == figures.student_tokens
    if same and teacher.cutter.vocabulary == student.cutter.vocabulary:
        return [
            Finding(
                "same_tokenizer",
                "info",
                "The two tokenizers are the same. Cross-tokenizer distillation works here, but "
                "distilling logits directly (axolotl's kd plugin) is cheaper.",
            )
        ]
    return []
