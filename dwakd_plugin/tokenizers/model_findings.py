"""Findings that need no text: heads, special tokens, chat templates."""

from __future__ import annotations

from typing import Any

from dwakd_plugin.tokenizers.verdict import Finding, Side


def class_findings(side: Side) -> list[Finding]:
    """A class in the config that makes another tokenizer than the file beside it."""
    if side.refused is None:
        return []
    remedy = (
        "Distillation takes that file as it is; whatever else loads the teacher by its config "
        "reads another text than it was trained on."
        if side.role == "teacher"
        else "Set `tokenizer_type: PreTrainedTokenizerFast` in the recipe, which takes that file "
        "as it is; without it training stops."
    )
    return [
        Finding(
            f"{side.role}_class_misreads",
            "problem",
            f"The {side.role}'s tokenizer_config.json names {side.refused}, which cuts texts "
            f"differently from the tokenizer.json beside it. {remedy}",
        )
    ]


def head_findings(side: Side) -> list[Finding]:
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


def end_findings(side: Side) -> list[Finding]:
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


def added_token_findings(teacher: Side, student: Side) -> list[Finding]:
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


def template_findings(teacher: Side, student: Side) -> list[Finding]:
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
            f"token (alpaca) then end answers differently from conversations: set {key} to the "
            "template's own end, and stop generation on it.",
        )
    ]
