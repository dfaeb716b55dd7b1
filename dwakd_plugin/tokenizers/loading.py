"""A tokenizer from a folder or the hub: the one place where one is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dwakd_plugin.errors import UserError, first_line


def load_tokenizer(
    name: str | Path,
    title: str,
    remedy: str = "",
    *,
    end_remedy: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Any:
    """The tokenizer of a folder or hub id; `title` names it in messages, and begins them.

    Raises UserError, which ends with `remedy`, where there is none to load; and, with `end_remedy`,
    where it has no end-of-sequence token.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            name, revision=revision, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # a damaged tokenizer.json raises a bare Exception
        if "trust_remote_code" in str(error):
            remedy = (
                "--trust-remote-code (dwakd.teacher.trust_remote_code) lets its repository run "
                "code of its own on this machine."
            )
        raise UserError(f"{title} cannot be loaded: {first_line(error)}\n{remedy}") from error
    if end_remedy is not None and tokenizer.eos_token_id is None:
        raise UserError(
            f"{title} has no end-of-sequence token, so a response has no end. {end_remedy}"
        )
    return tokenizer
