"""What is found about a pair before a run, and the verdict on it."""

from __future__ import annotations

from typing import Any

from tokenizers import normalizers

from dwakd_cli.sample_texts import SAMPLE
from dwakd_plugin.tokenizers.figures import TextFigures, measure, vocabulary_figures
from dwakd_plugin.tokenizers.findings import findings_of
from dwakd_plugin.tokenizers.pair import ByteCutter
from dwakd_plugin.tokenizers.verdict import Finding, Side, verdict_of
from tests.tokenizers.small_tokenizers import CORPUS, TEMPLATE, byte_level, sentencepiece, unigram


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
        vocabulary_figures(*cutters),
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
