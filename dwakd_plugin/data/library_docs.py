"""Rows from the Python standard library's own documentation, with held-out ones that nothing leaks.

Read in a Python of its own, so nothing here imports torch, transformers or axolotl.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import Any, NamedTuple

from dwakd_plugin.errors import UserError

Row = dict[str, str]
"""One example in axolotl's alpaca format: `instruction`, `input` and `output`."""

# Modules that are safe to import anywhere: no windows, no connections, nothing printed. Those of
# which a Python was built without are passed over.
DOCUMENTED_MODULES = """
    abc argparse array ast asyncio base64 bdb binascii bisect builtins bz2 calendar cmath cmd code
    codecs codeop collections collections.abc colorsys compileall concurrent.futures configparser
    contextlib contextvars copy copyreg csv ctypes dataclasses datetime decimal difflib dis
    doctest email email.charset email.generator email.header email.headerregistry email.message
    email.parser email.policy email.utils enum errno faulthandler filecmp fileinput fnmatch
    fractions ftplib functools gc getopt getpass gettext glob graphlib gzip hashlib heapq hmac
    html html.parser http http.client http.cookiejar http.cookies http.server imaplib importlib
    importlib.abc importlib.machinery importlib.metadata importlib.resources importlib.util
    inspect io ipaddress itertools json keyword linecache locale logging logging.config
    logging.handlers lzma mailbox marshal math mimetypes mmap modulefinder multiprocessing
    multiprocessing.managers multiprocessing.pool multiprocessing.shared_memory netrc numbers
    opcode operator optparse os os.path pathlib pdb pickle pickletools pkgutil platform plistlib
    poplib pprint profile pstats pty py_compile pyclbr pydoc queue quopri random re reprlib
    resource runpy sched secrets select selectors shelve shlex shutil signal site smtplib socket
    socketserver sqlite3 ssl stat statistics string stringprep struct subprocess symtable sys
    sysconfig syslog tabnanny tarfile tempfile textwrap threading time timeit token tokenize trace
    traceback tracemalloc types typing unicodedata unittest unittest.mock urllib.error
    urllib.parse urllib.request urllib.robotparser uuid venv warnings wave weakref webbrowser
    wsgiref.handlers wsgiref.headers wsgiref.simple_server wsgiref.util xml.dom.minidom
    xml.dom.pulldom xml.etree.ElementTree xml.sax.handler xml.sax.saxutils xml.sax.xmlreader
    xmlrpc.client zipapp zipfile zipimport zlib zoneinfo
"""

PHRASINGS = {
    "class": (
        "What is {name} in Python?",
        "What is the class {name} for?",
        "Explain the Python class {name}.",
        "Describe {name} from the Python standard library.",
    ),
    "routine": (
        "What does {name} do?",
        "What does {name} do in Python?",
        "Explain the Python function {name}.",
        "Describe what {name} does.",
        "What is {name} used for in Python?",
    ),
}

MIN_OUTPUT_CHARS, MAX_OUTPUT_CHARS = 25, 400
SHARED_SENTENCE_CHARS = 40  # a longer sentence in common is a leak
SHINGLE_WORDS, MAX_SHINGLE_OVERLAP = 4, 0.5  # so is half of the held-out text's word windows


class Documentation(NamedTuple):
    """Rows about Python's standard library, in a fixed order that is as good as random."""

    train: list[Row]
    held_out: list[Row]
    pretraining_texts: list[str]


def documentation_rows(held_out: int = 120) -> Documentation:
    """Questions about the standard library, answered by its own documentation.

    The `held_out` objects whose names hash lowest are held out. No train row and no pretraining
    text has a held-out answer, a long sentence of one, or half of its wording (see
    `_leak_detector`). Rows differ between Python versions as the documentation does; for one
    version they are always the same.
    """
    if sys.flags.optimize >= 2:
        raise UserError(
            "Python was started with -OO, which removes the documentation that the embedded data "
            "is made of. Start it without."
        )
    from pydoc_data.topics import topics

    module_texts, documented = _read_standard_library()
    rows: list[Row] = []
    full_texts: list[str] = []
    seen: set[str] = set()
    for kind, name, doc in sorted(documented, key=lambda item: _hash(item[1])):
        output = clean_output(doc)
        opening = _sentences(output)[0] if output else ""
        if not opening or opening in seen:
            continue
        seen.add(opening)
        phrasings = PHRASINGS[kind]
        instruction = phrasings[_hash("phrasing " + name) % len(phrasings)].format(name=name)
        rows.append({"instruction": instruction, "input": "", "output": output})
        full_texts.append(doc)

    leaks = _leak_detector(row["output"] for row in rows[:held_out])
    train = [row for row in rows[held_out:] if not leaks(row["output"])]
    long_texts = [doc for doc in full_texts[held_out:] if len(doc) > MAX_OUTPUT_CHARS]
    sources = [*(topics[key] for key in sorted(topics)), *module_texts, *long_texts]
    pretraining = ["\n\n".join(p for p in _prose(text) if not leaks(p)) for text in sources]
    return Documentation(train, rows[:held_out], [text for text in pretraining if text])


def _hash(text: str) -> int:
    """A hash that is the same in every process, unlike Python's own."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def _read_standard_library() -> tuple[list[str], list[tuple[str, str, str]]]:
    """Docstrings of modules; kind, name and docstring of their objects.

    Read in a Python of its own, as torch, transformers, axolotl and pytest each replace functions
    of the standard library.
    """
    script = f"from {__name__} import _print_standard_library as run; run()"
    command = [sys.executable, "-P", "-W", "ignore", "-c", script]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    module_texts, objects = json.loads(output)
    return module_texts, [(kind, name, doc) for kind, name, doc in objects]


def _print_standard_library() -> None:
    modules = {}
    for name in DOCUMENTED_MODULES.split():
        with suppress(ImportError):
            modules[name] = importlib.import_module(name)
    module_texts = [module.__doc__ or "" for module in modules.values()]
    print(json.dumps([module_texts, list(_documented_objects(modules))]))


def _documented_objects(modules: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Kind, name and docstring of public classes, functions and methods with their own text."""
    for module_name, module in modules.items():
        prefix = "" if module_name == "builtins" else f"{module_name}."
        own = (module_name, f"_{module_name}")
        for name in sorted(getattr(module, "__all__", None) or dir(module)):
            item = getattr(module, name, None)
            if name.startswith("_") or not (inspect.isclass(item) or inspect.isroutine(item)):
                continue
            if not hasattr(module, "__all__") and getattr(item, "__module__", None) not in own:
                continue
            kind = "class" if inspect.isclass(item) else "routine"
            yield from _with_doc(kind, prefix + name, item)
            if kind == "class":
                for member_name, member in sorted(vars(item).items()):
                    member = getattr(member, "__func__", member)  # static and class methods
                    if inspect.isroutine(member) and not member_name.startswith("_"):
                        yield from _with_doc("routine", f"{prefix}{name}.{member_name}", member)


def _with_doc(kind: str, name: str, item: Any) -> Iterator[tuple[str, str, str]]:
    doc = vars(item).get("__doc__") if kind == "class" else getattr(item, "__doc__", None)
    if isinstance(doc, str):
        yield kind, name, inspect.cleandoc(doc)


_SIGNATURE_LINE = re.compile(r"^[\w.]+ ?\(.*\)(\s*->\s*\S.*|:)?$")
_INLINE_SIGNATURE = re.compile(r"^[\w.]+ ?\([^()]*\)\s*(->\s*[^-:]+?)?\s*(--?|:)\s+")
_ROLE = re.compile(r":[a-z:]+:`[~!.]*([^`]+)`")
_NOT_PROSE = re.compile(r">>>|::=|^\s*([:|+]|\.\. |[*-] )", re.MULTILINE)
_SENTENCE_END = re.compile(r"(?<!e\.g\.)(?<!i\.e\.)(?<=[.!?])\s+(?=[A-Z`'\"(])")


def clean_output(doc: str) -> str | None:
    """The opening prose of a docstring, at most `MAX_OUTPUT_CHARS`, or None if there is none.

    >>> clean_output("f(x) -> int\\n\\nCount the things\\nin :class:`x`, all.\\n\\n>>> f(1)")
    'Count the things in x, all.'
    """
    kept: list[str] = []
    for paragraph in _prose(_without_signature(doc), opening_only=True):
        room = MAX_OUTPUT_CHARS - sum(len(text) + 2 for text in kept)
        if len(paragraph) > room:
            if not kept:
                kept.append(_cut_at_sentence(paragraph, room))
            break
        kept.append(paragraph)
    while kept and kept[-1].endswith(":"):  # it announces a list that is not here
        kept.pop()
    output = "\n\n".join(kept)
    if not output.endswith((".", "!", "?")):
        output += "."
    words = output.split()
    enough = len(output) >= MIN_OUTPUT_CHARS and len(words) >= 4
    return output if enough and output.isascii() and output[0].isupper() else None


def _without_signature(doc: str) -> str:
    lines = doc.strip().splitlines()
    while lines and (not lines[0].strip() or _SIGNATURE_LINE.match(lines[0].strip())):
        lines.pop(0)
    return _INLINE_SIGNATURE.sub("", "\n".join(lines), count=1)


def _cut_at_sentence(paragraph: str, room: int) -> str:
    ends = [m.start() for m in _SENTENCE_END.finditer(paragraph) if m.start() <= room]
    return paragraph[: ends[-1]] if ends else ""


def _prose(doc: str, opening_only: bool = False) -> Iterator[str]:
    """The paragraphs that are English sentences, each on one line; no code, grammar or heading."""
    for index, block in enumerate(re.split(r"\n\s*\n", doc.strip("\n"))):
        lines = block.splitlines()
        text = " ".join(_ROLE.sub(r"\1", block).replace("``", "`").split())
        letters = sum(char.isalpha() or char == " " for char in text)
        prose = (
            len(text) >= MIN_OUTPUT_CHARS
            and letters >= 0.85 * len(text)
            and not _NOT_PROSE.search(block)
            and len({len(line) - len(line.lstrip()) for line in lines}) == 1
            and (text.endswith((".", ":", "!", "?", ")")) or (opening_only and index == 0))
        )
        if prose:
            yield text
        elif opening_only:
            return


def _normalised(text: str) -> str:
    return " ".join(re.findall(r"[a-z0-9]+", text.lower()))


def _sentences(text: str) -> list[str]:
    """Normalised sentences.

    >>> _sentences("Return `x`.  See  also y.")
    ['return x', 'see also y']
    """
    return [_normalised(s) for part in text.split("\n\n") for s in _SENTENCE_END.split(part)]


def _shingles(text: str) -> set[tuple[str, ...]]:
    words = _normalised(text).split()
    size = min(SHINGLE_WORDS, len(words))
    return {tuple(words[i : i + size]) for i in range(len(words) - size + 1)}


def _leak_detector(held_out: Iterable[str]) -> Callable[[str], bool]:
    """A test whether a text gives away one of the held-out ones.

    It does if it contains the first sentence or a long one of it, or more than half of its
    windows of four words.
    """
    texts = list(held_out)
    sentences = [_sentences(text) for text in texts]
    forbidden = {s for all_ in sentences for s in all_ if len(s) > SHARED_SENTENCE_CHARS}
    forbidden |= {all_[0] for all_ in sentences}
    shingles = [_shingles(text) for text in texts]
    holders: dict[tuple[str, ...], list[int]] = {}
    for index, windows in enumerate(shingles):
        for window in windows:
            holders.setdefault(window, []).append(index)

    def leaks(text: str) -> bool:
        if not forbidden.isdisjoint(_sentences(text)):
            return True
        shared = Counter(i for window in _shingles(text) for i in holders.get(window, ()))
        return any(n > MAX_SHINGLE_OVERLAP * len(shingles[i]) for i, n in shared.items())

    return leaks
