"""A tokenizer from a folder or the hub: the one place where one is loaded."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from dwakd_plugin.errors import UserError, first_line

# Words, runs of white space, digits, marks, and letters beyond ASCII: what a tokenizer that was
# rebuilt as another kind cuts otherwise, or loses.
PROBE = "Hello, world!  How are you\n\tx = 12345 + 'größte' 数学 ..."


def without_torch() -> None:
    """Lets transformers take torch for not installed, in a process that needs tokenizers alone.

    It imports torch, and generation with it, wherever it finds one; its tokenizers need neither.
    Does nothing in a process that has imported either already.
    """
    if not {"torch", "transformers"} & sys.modules.keys():
        sys.modules["torch"] = None  # type: ignore[assignment]


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

    As `load_and_name`, whose second value is left out.
    """
    tokenizer, _ = load_and_name(
        name,
        title,
        remedy,
        end_remedy=end_remedy,
        revision=revision,
        trust_remote_code=trust_remote_code,
    )
    return tokenizer


def load_and_name(
    name: str | Path,
    title: str,
    remedy: str = "",
    *,
    end_remedy: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[Any, str | None]:
    """The tokenizer of a folder or hub id, and the class that its config names, if it was refused.

    It cuts texts as its own tokenizer.json does: where the class that its config names rebuilds it
    otherwise, the file is taken as it is. Raises UserError, which ends with `remedy`, where there
    is none to load, or none that follows its file; and, with `end_remedy`, where it has no
    end-of-sequence token.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    refused = None
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            name, revision=revision, trust_remote_code=trust_remote_code
        )
        if not follows_its_file(tokenizer, name, revision):
            refused = type(tokenizer).__name__
            tokenizer = PreTrainedTokenizerFast.from_pretrained(name, revision=revision or "main")
            if not follows_its_file(tokenizer, name, revision):
                raise ValueError(
                    f"neither {refused}, which its config names, nor the plain class cuts texts as "
                    "its own tokenizer.json does"
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
    return tokenizer, refused


def follows_its_file(tokenizer: Any, name: str | Path, revision: str | None = None) -> bool:
    """Whether a loaded tokenizer cuts a text as the tokenizer.json that it was loaded from.

    transformers rebuilds a tokenizer by the class that its config names: a byte-level one whose
    config says Llama comes out as SentencePiece and loses every space (transformers #45488). True
    where there is no such file, or it isn't on this machine.
    """
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError
    from tokenizers import Tokenizer

    file: Any = Path(name) / "tokenizer.json"
    if not file.is_file():
        try:
            file = try_to_load_from_cache(str(name), "tokenizer.json", revision=revision)
        except HFValidationError:  # a path, and no hub id
            return True
        if not isinstance(file, str):
            return True
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        return False
    own = Tokenizer.from_file(str(file))
    own.no_padding()  # which a file may keep from its training; transformers asks for neither
    own.no_truncation()
    expected = own.encode(PROBE, add_special_tokens=False).ids
    return bool(tokenizer(PROBE, add_special_tokens=False)["input_ids"] == expected)
