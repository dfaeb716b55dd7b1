"""The one kind of error that a user can put right; it is shown as its message alone."""

from __future__ import annotations

import re
import unicodedata

LONGEST = 8000  # characters of a message
_BIDI = {*map(chr, range(0x202A, 0x202F)), *map(chr, range(0x2066, 0x206A))}


# In an address: user and password before the host, and parameters that grant access.
_LOGIN = re.compile(r"(?<=://)[^/@\s]+@")
_GRANT = re.compile(
    r"(?i)([?&][^=&\s]*(?:token|key|sig|secret|password|credential)[^=&\s]*=)[^&\s]+"
)


class UserError(Exception):
    """A mistake in the recipe or its surroundings: what is wrong, and what to do about it.

    The message may quote whatever was found: it is made printable, without the credentials of an
    address, and cut in its middle where it would be endless.
    """

    def __init__(self, message: str) -> None:
        message = without_credentials(message)
        if len(message) > LONGEST:
            left_out = len(message) - LONGEST
            begin, end = message[: LONGEST - 2000], message[-2000:]
            message = f"{begin} [{left_out:,} characters left out] {end}"
        super().__init__(printable(message))


def first_line(error: BaseException) -> str:
    """What an error says, in one line; its kind where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def printable(text: str) -> str:
    """The text without what a terminal would obey: controls, lone surrogates, changes of direction.

    They are written as in Python; line breaks and tabs stay.

    >>> printable("a\\x1b[2J\\n\\ud800")
    'a\\\\x1b[2J\\n\\\\ud800'
    """
    if text.isprintable():
        return text
    return "".join(
        each.encode("unicode_escape").decode()
        if each in _BIDI or (unicodedata.category(each) in ("Cc", "Cs") and each not in "\n\t")
        else each
        for each in text
    )


def without_credentials(text: str) -> str:
    """The text with what grants access to an address replaced.

    >>> without_credentials("https://me:secret@host/rows.jsonl?page=2&token=abc")
    'https://***@host/rows.jsonl?page=2&token=***'
    """
    return _GRANT.sub(r"\1***", _LOGIN.sub("***@", text))
