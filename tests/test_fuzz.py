"""Arbitrary input, by hypothesis: recipes, rows, texts and logits that nobody would write.

Few cases a target here, the same ones in every run; `make fuzz` makes many, from a seed, and writes
down how many (`benchmarks/fuzz.py`). What was found once stays as an example.
"""

from __future__ import annotations

import copy
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, wraps
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import yaml
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from dwakd_cli.train import read_recipe, with_distillation
from dwakd_plugin.errors import UserError
from dwakd_plugin.loss import Head, LossTerms, ResponseStates, dwakd_loss
from dwakd_plugin.models.projectors import Projectors
from dwakd_plugin.recipe.schema import VARIANTS, Divergence, DWAKDConfig, parse_recipe
from dwakd_plugin.tokenizers.alignment import TokenAligner
from dwakd_plugin.tokenizers.pair import ByteCutter, Changed, Cut, cut_both
from dwakd_plugin.train.preflight import check_all

# Cases that ran to their end, by target.
CASES: Counter[str] = Counter()
LONGEST_MESSAGE = 10_000  # characters


def cases(few: int, many: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """So many cases of a target: few, always the same, or many with the profile `fuzz`."""
    fuzzing = settings.get_current_profile_name() == "fuzz"

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        @wraps(test)
        def counted(*args: Any, **kwargs: Any) -> None:
            test(*args, **kwargs)
            CASES[test.__name__.removeprefix("test_")] += 1

        return settings(
            max_examples=many if fuzzing else few,
            derandomize=not fuzzing,
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        )(counted)

    return decorate


# Recipes ----------------------------------------------------------------------------------------

# Whatever PyYAML's safe loader can make of a text.
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([0, -1, 1, 2**31, 2**63, 2**64, 10**40, 10**400]),
    st.floats(),
    st.sampled_from([0.0, -0.0, 5e-324, 1e-300, 1e-30, 1e30, 1e300, math.inf, -math.inf, math.nan]),
    st.text(max_size=20),
    st.sampled_from(["", " ", "\0", "a\0b", "../../x", "~", "~nobody/x", "/", ".", "x" * 5000]),
    st.sampled_from(["\ud800", "[red]", "\x1b[2J", "1e3", "yes", "auto", "${HOME}", "{{ x }}"]),
    st.binary(max_size=5),
    st.dates(),
    st.datetimes(),
)
KEYS = st.one_of(
    st.text(max_size=10),
    st.integers(),
    st.none(),
    st.booleans(),
    st.floats(),
    st.binary(max_size=3),
    st.dates(),
    st.tuples(st.integers(), st.text(max_size=3)),
)
JUNK = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(KEYS, inner, max_size=3),
        st.sets(st.text(max_size=3), max_size=2),
    ),
    max_leaves=6,
)


def _paths(block: type[Any], prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name, field in block.model_fields.items():
        yield (*prefix, name)
        if hasattr(field.annotation, "model_fields"):
            yield from _paths(field.annotation, (*prefix, name))


PATHS = list(_paths(DWAKDConfig))


def _put(block: dict[str, Any], path: tuple[str, ...], value: Any) -> dict[str, Any]:
    block = copy.deepcopy(block)
    inner = block
    for key in path[:-1]:
        inner = inner.setdefault(key, {})
    inner[path[-1]] = value
    return block


def _located(message: str, *places: str) -> None:
    """A message for a person: not empty, not endless, printable, and it names the place."""
    assert message.strip()
    assert len(message) <= LONGEST_MESSAGE
    message.encode()
    for place in places:
        assert place in message


@given(st.sampled_from(PATHS), JUNK)
@cases(150, 4000)
@example(("loss", "temperature"), math.inf)
@example(("loss", "temperature"), 1e-300)
@example(("soft_dtw", "gamma_end"), 1e300)
@example(("variant",), ["dskd"])
@example(("teacher", "chat_template"), 3)
@example(("loss", "chunk_size"), False)
@example(("loss", "chunk_size"), 1.5)
@example(("teacher", "sequence_len"), 16**5000)
def test_one_wrong_value_is_located(path: tuple[str, ...], value: Any) -> None:
    block = _put({"teacher": {"base_model": "big"}}, path, value)
    try:
        config = parse_recipe({"distillation": "dwakd", "dwakd": block})
    except UserError as error:
        if path == ("teacher",) and not value:
            _located(str(error), "needs a teacher")
        else:
            _located(str(error), ".".join(("dwakd", *path)))
        return
    assert config is not None
    _usable(config)


def _usable(config: DWAKDConfig) -> None:
    """A valid configuration is the same after a round trip, and holds no number that is none."""
    dumped = config.model_dump()
    assert parse_recipe({"distillation": "dwakd", "dwakd": dumped}) == config
    json.loads(json.dumps(dumped, allow_nan=False))


@given(st.lists(st.tuples(st.sampled_from([(), *PATHS]), KEYS, JUNK), min_size=1, max_size=4))
@cases(100, 3000)
@example([((), 3, None)])
@example([(("loss",), None, 1)])
@example([(("teacher",), "base_model ", "x")])
@example([(("loss",), "\ud800", 1)])
@example([(("teacher", "device"), "x" * 100_000, 1)])
def test_further_keys_are_refused_by_name(
    further: list[tuple[tuple[str, ...], Any, Any]],
) -> None:
    block: dict[str, Any] = {"teacher": {"base_model": "big"}}
    for path, key, value in further:
        inner = block
        for part in path:
            following = inner.get(part)
            inner[part] = inner = dict(following) if isinstance(following, dict) else {}
        inner[key] = value
    try:
        config = parse_recipe({"distillation": "dwakd", "dwakd": block})
    except UserError as error:
        _located(str(error))
        return
    assert config is not None
    _usable(config)


TOP_KEYS = [
    "base_model",
    "datasets",
    "output_dir",
    "dwakd",
    "distillation",
    "plugins",
    "fsdp_config",
    "fsdp_version",
    "deepspeed",
    "context_parallel_size",
    "sequence_parallel_degree",
    "test_datasets",
    "adapter",
    "lora_model_dir",
    "tokenizer_config",
    "resume_from_checkpoint",
    "auto_resume_from_checkpoints",
    "loss_watchdog_threshold",
    "batch_flattening",
    "sample_packing",
    "rl",
]


@given(
    st.dictionaries(st.one_of(st.sampled_from(TOP_KEYS), KEYS), JUNK, min_size=1, max_size=4),
    st.booleans(),
)
@cases(100, 3000)
@example({"context_parallel_size": "two"}, True)
@example({"datasets": {"path": "x"}}, True)
@example({"output_dir": "a\0b"}, True)
@example({"output_dir": 3}, True)
@example({"base_model": "x" * 5000}, True)
@example({"fsdp_config": "full_shard"}, True)
@example({"deepspeed": 3}, True)
@example({"plugins": "dwakd_plugin.DWAKDPlugin"}, False)
def test_a_recipe_is_checked_whatever_it_holds(changed: dict[Any, Any], whole: bool) -> None:
    recipe = {
        "base_model": "small",
        "datasets": [{"path": "rows/of/some/folder.jsonl", "type": "alpaca"}],
        "distillation": "dwakd",
        "dwakd": {"teacher": "big"},
    }
    recipe = recipe | changed if whole else changed
    try:
        effective, changes = with_distillation(recipe, {"base_model": "big"})
        check_all(effective)
    except UserError as error:
        _located(str(error))
        return
    assert all(map(str.strip, changes))


YAML = st.one_of(
    st.text(max_size=60),
    st.binary(max_size=60),
    st.lists(
        st.sampled_from(
            [
                *("dwakd:", "teacher:", "&a ", "*a", "!!int x", "!!float y", "!!bool z", "!!str"),
                *("!!timestamp t", "!!binary =", "!!set {a}", "!!omap [a: 1]", "!!map a"),
                *("!!python/object:os.system {}", "!<tag:yaml.org,2002:null> x", "? [1]: 2"),
                *("2024-99-99", "0x", "0b2", "1:99", "<<: 3", "[", "]", "{", "}", "- ", "\n"),
                *("\n  ", ": ", "'", '"', "\t", "|", ">", "%YAML 9.9", "---", "...", "\0", "#"),
                *("\ud800", ",", "base_model: x", "1" * 5000),
            ]
        ),
        max_size=8,
    ).map("".join),
    st.dictionaries(st.sampled_from(TOP_KEYS), JUNK, max_size=4).map(
        lambda recipe: _dumped(recipe)
    ),
)


def _dumped(recipe: Any) -> str:
    try:
        return yaml.safe_dump(recipe, allow_unicode=True)
    except (ValueError, yaml.YAMLError, UnicodeError):
        return repr(recipe)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scratch")


@given(content=YAML)
@cases(150, 4000)
@example(content="a: 2024-99-99")
@example(content="a: !!int x")
@example(content="a: !!bool maybe")
@example(content="a: !!timestamp later")
@example(content="a: " + "[" * 5000)
@example(content="a: " + "1" * 5000)
@example(content="dwakd: &a {teacher: *a}\ndistillation: dwakd")
@example(content="a: &a [x,x]\nb: &b [*a,*a]\nc: &c [*b,*b]")
@example(content=b"\xff\xfe\x00")
@example(content="!!python/object/apply:os.system [id]")
def test_a_file_is_a_recipe_or_a_message(content: str | bytes, scratch: Path) -> None:
    file = scratch / "recipe.yml"
    file.write_bytes(
        content.encode(errors="surrogatepass") if isinstance(content, str) else content
    )
    try:
        recipe, _ = with_distillation(read_recipe(file), {"base_model": "big"})
        check_all(recipe)
    except UserError as error:
        _located(str(error))


# The loss ---------------------------------------------------------------------------------------


def _states(
    generator: torch.Generator, kind: str, lengths: list[int], width: int, vocabulary: int
) -> ResponseStates:
    """A batch of one side. `kind` says what is extreme about it."""
    size = (3, len(lengths), max(lengths), width)
    values = torch.randn(size, generator=generator)
    weight = torch.randn(vocabulary, width, generator=generator)
    if kind == "large":  # logits of ±1e4 and more
        values, weight = values * 1e3, weight * 1e2
    elif kind == "tiny":
        values = values * 1e-20
    elif kind == "zero":
        values = torch.zeros_like(values)
    elif kind == "same":  # one token over and over
        values = values[:, :, :1].expand(size).clone()
    elif kind == "holes":  # zero vectors here and there
        values = values * (torch.rand(size[1:3], generator=generator) < 0.5)[None, ..., None]
    elif kind == "flat":  # a head that tells no tokens apart
        weight = torch.zeros_like(weight)
    elif kind == "outlier":  # one dimension far above the rest, as large models have
        values[..., 0] = 1e4
    labels = torch.randint(vocabulary, (len(lengths), max(lengths)), generator=generator)
    for sample, length in enumerate(lengths):
        labels[sample, length:] = -100
    return ResponseStates(*values, torch.tensor(lengths), Head(weight), labels)


def _paired(
    generator: torch.Generator, student: ResponseStates, teacher: ResponseStates
) -> tuple[ResponseStates, ResponseStates]:
    """With pairs in order, as exact matching needs them, and a map between the vocabularies."""
    pairs: tuple[list[int], list[int]] = ([], [])
    for sample, (s, t) in enumerate(zip(student.lengths, teacher.lengths, strict=True)):
        count = int(torch.randint(int(min(s, t)) + 1, (1,), generator=generator))
        for side, length, states in ((0, s, student), (1, t, teacher)):
            chosen = torch.randperm(int(length), generator=generator)[:count].sort().values
            pairs[side].extend((chosen + sample * states.hidden.shape[1]).tolist())
    rows, mine = teacher.head.weight.shape[0], student.head.weight.shape[0]
    token_map = torch.randint(-1, mine, (rows,), generator=generator)
    return (
        replace(student, pairs=torch.tensor(pairs[0], dtype=torch.long)),
        replace(teacher, pairs=torch.tensor(pairs[1], dtype=torch.long), token_map=token_map),
    )


def _batch(samples: list[ResponseStates], padding: float, further: int) -> ResponseStates:
    """Single samples as one batch; `padding` fills what is no position."""
    longest = max(one.hidden.shape[1] for one in samples) + further

    def joined(tensors: list[torch.Tensor], value: float) -> torch.Tensor:
        whole = tensors[0].new_full((len(tensors), longest, *tensors[0].shape[2:]), value)
        for row, tensor in zip(whole, tensors, strict=True):
            row[: tensor.shape[1]] = tensor[0]
        return whole

    pairs = None
    if all(one.pairs is not None for one in samples):
        pairs = torch.cat([one.pairs + i * longest for i, one in enumerate(samples)])
    return replace(
        samples[0],
        input_embeds=joined([one.input_embeds for one in samples], padding),
        target_embeds=joined([one.target_embeds for one in samples], padding),
        hidden=joined([one.hidden for one in samples], padding),
        lengths=torch.cat([one.lengths for one in samples]),
        labels=joined([one.labels for one in samples], -100),
        pairs=pairs,
    )


def _cast(states: ResponseStates, dtype: torch.dtype) -> ResponseStates:
    return replace(
        states,
        input_embeds=states.input_embeds.to(dtype),
        target_embeds=states.target_embeds.to(dtype),
        hidden=states.hidden.to(dtype),
        head=Head(states.head.weight.to(dtype)),
    )


def _loss_and_gradients(
    student: ResponseStates,
    teacher: ResponseStates,
    projectors: Projectors,
    config: DWAKDConfig,
    gamma: float,
) -> tuple[LossTerms, float, list[torch.Tensor]]:
    leaves = [student.hidden, student.target_embeds, student.head.weight]
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    student = replace(student, hidden=leaves[0], target_embeds=leaves[1], head=Head(leaves[2]))
    projectors.zero_grad(set_to_none=True)
    terms = dwakd_loss(
        student, teacher, projectors, loss=config.loss, soft_dtw=config.soft_dtw, gamma=gamma
    )
    total = terms.total(config.loss)
    total.backward()
    gradients = [leaf.grad for leaf in [*leaves, *projectors.parameters()]]
    return terms, float(total.detach()), [each for each in gradients if each is not None]


KINDS = ["usual", "large", "tiny", "zero", "same", "holes", "flat", "outlier"]
GAMMAS = [1e-3, 0.01, 0.8, 2.0, 100.0, 1000.0]
LOSSES = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.sampled_from([0.01, 0.1, 1.0, 2.0, 100.0]),
        "divergence": st.sampled_from(get_args(Divergence)),
        "chunk_size": st.sampled_from([1, 2, 3, "auto"]),
        "teacher_weighting": st.sampled_from(["confidence", "none"]),
    },
)
BANDS = st.fixed_dictionaries(
    {},
    optional={
        "band_width": st.sampled_from([0.0, 1e-3, 5.0, 1e4]),
        "band_entropy_coef": st.sampled_from([0.0, 2.0, 1e4]),
        "band_center_blend": st.sampled_from([0.0, 0.7, 1.0]),
        "band_penalty": st.sampled_from([0.0, 1.0, 1e3]),
    },
)


@given(
    seed=st.integers(0, 2**31),
    kinds=st.tuples(st.sampled_from(KINDS), st.sampled_from(KINDS)),
    lengths=st.lists(
        st.tuples(st.sampled_from([0, 1, 1, 2, 3, 30]), st.sampled_from([0, 1, 2, 5, 30])),
        min_size=1,
        max_size=3,
    ),
    variant=st.sampled_from(sorted(VARIANTS)),
    loss=LOSSES,
    soft_dtw=BANDS,
    gamma=st.sampled_from(GAMMAS),
)
@cases(40, 1500)
def test_the_loss_is_finite_and_of_each_sample_alone(
    seed: int,
    kinds: tuple[str, str],
    lengths: list[tuple[int, int]],
    variant: str,
    loss: dict[str, Any],
    soft_dtw: dict[str, Any],
    gamma: float,
) -> None:
    preset = VARIANTS[variant]
    block = {"teacher": "t", "variant": variant}
    block["loss"] = {k: v for k, v in loss.items() if k not in preset.get("loss", {})}
    block["soft_dtw"] = {k: v for k, v in soft_dtw.items() if k not in preset.get("soft_dtw", {})}
    config = DWAKDConfig.model_validate(block)
    generator = torch.Generator().manual_seed(seed)
    singles = []
    for s, t in lengths:
        student = _states(generator, kinds[0], [max(s, 1)], 4, 7)
        teacher = _states(generator, kinds[1], [max(t, 1)], 6, 11)
        student = replace(student, lengths=torch.tensor([s]))
        teacher = replace(teacher, lengths=torch.tensor([t]))
        if s == 0:
            student = replace(student, labels=torch.full_like(student.labels, -100))
        singles.append(_paired(generator, student, teacher))
    # One model has one head, and one map.
    first = singles[0]
    singles = [
        (
            replace(student, head=first[0].head),
            replace(teacher, head=first[1].head, token_map=first[1].token_map),
        )
        for student, teacher in singles
    ]
    with torch.random.fork_rng():
        torch.manual_seed(seed % 1000)
        projectors = Projectors(4, 6)

    def run(
        order: list[int], padding: float = 0.0, further: int = 0, dtype: torch.dtype = torch.float64
    ) -> tuple[float, list[torch.Tensor]]:
        student = _batch([_cast(singles[i][0], dtype) for i in order], padding, further)
        teacher = _batch([_cast(singles[i][1], dtype) for i in order], padding, further)
        terms, total, gradients = _loss_and_gradients(
            student, teacher, projectors.to(dtype), config, gamma
        )
        for name, value in vars(terms).items():
            assert value.isfinite().all(), name
        for gradient in gradients:
            assert gradient.isfinite().all()
        for name in ("ce", "t2s_ce", "uld", "student_kd", "teacher_kd"):
            assert getattr(terms, name) >= -1e-4 * (1 + abs(total))
        return total, gradients[3:]

    order = list(range(len(singles)))
    run(order, dtype=torch.float32)
    # What must hold exactly is compared in float64, relative to what was added up.
    total, gradients = run(order)
    padded, padded_gradients = run(order[::-1], math.nan, 3)
    alone = [run([i]) for i in order]
    scale = 1e-7 * (1 + sum(abs(one) for one, _ in alone))
    assert padded == pytest.approx(total, abs=scale)
    assert sum(one for one, _ in alone) == pytest.approx(total, abs=scale)
    for whole, other in zip(gradients, padded_gradients, strict=True):
        assert (whole - other).abs().max() <= 1e-6 * (1 + whole.abs().max())


# Texts ------------------------------------------------------------------------------------------

# What tokenizers, terminals and encodings trip over.
PIECES = [
    *("\0", "\x1b[2J", "\r", "\r\n", "\n\n\n", "\t", " ", "   ", "\u00a0", "\u2028", "\ufeff"),
    *("👩‍👩‍👧‍👦", "🏳️‍🌈", "👍🏽", "🇫🇷🇩🇪", "\u200d", "\u200b", "\ufe0f"),
    *("e\u0301", "\u0301\u0302", "ﬃ"),
    *("שלום", "مرحبا", "\u202eabc\u202c", "각", "각", "数学", "ฺกำ", "𝒳", "\U0010ffff", "ﷺ"),
    *("▁", "▁▁", "Ġ", "Ċ", "<0x0A>", "<0xFF>", "<unk>", "##ing", "</w>", "\\u0041", "\\"),
    *("</s>", "<s>", "<|im_end|>", "<|im_start|>assistant\n", "<|endoftext|>", "<eos>", "<pad>"),
    *("### Response:\n", "[INST]", "{{ x }}", "{% raw %}", "[red]", "<script>", "$x_1$"),
    *("3.14159", "1234567890", "def f(x):\n    return x", "The function returns", "größte"),
]
TEXTS = st.one_of(
    st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=60),
    st.lists(st.sampled_from(PIECES), max_size=8).map("".join),
    st.lists(
        st.one_of(st.sampled_from(PIECES), st.text(max_size=5, alphabet="ab é数\n ")), max_size=10
    ).map("".join),
    st.sampled_from(["", " ", "x", "word " * 3000, "a" * 20_000, "数" * 3000, " " * 5000]),
)
FAMILY_NAMES = ["gpt2", "opt", "llama", "llama3", "smollm2", "gemma", "qwen2"]
REAL = Path(__file__).parents[2] / "shared" / "data" / "tokenizers"


@cache
def _tokenizer(name: str) -> Any:
    from tests.families import FAMILIES

    if name in FAMILIES:
        return FAMILIES[name][0]()
    return AutoTokenizer.from_pretrained(REAL / name)


@cache
def _trained(kind: str, size: int, texts: tuple[str, ...]) -> Any:
    """A tokenizer that learned from these texts alone."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    settings_ = {"vocab_size": size, "show_progress": False}
    if kind == "byte-level":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            special_tokens=["</s>"],
            **settings_,
        )
    else:
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
        trainer = trainers.UnigramTrainer(
            unk_token="<unk>", special_tokens=["<unk>", "</s>"], **settings_
        )
    tokenizer.train_from_iterator(["the end of the line", *texts], trainer)
    unknown = {} if kind == "byte-level" else {"unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", **unknown)


@cache
def _cutter(name: str) -> ByteCutter:
    return ByteCutter(_tokenizer(name), name)


@cache
def _aligner(student: str, teacher: str) -> TokenAligner:
    return TokenAligner(_tokenizer(student), _tokenizer(teacher))


def _check_cut(cutter: ByteCutter, text: str) -> Cut | None:
    """Each byte of the text belongs to one token, and the tokens are its bytes."""
    (cut,) = cutter.cut([text])
    if isinstance(cut, Changed):
        assert cut.text != text
        return None
    data = text.encode()
    assert len(cut.ids) == len(cut.ends)
    assert all(a <= b for a, b in pairwise([0, *cut.ends]))
    assert (cut.ends[-1] if cut.ends else 0) == len(data)
    # Without ▁, which is a space to SentencePiece, every token's bytes stand where it says.
    special = cutter.tokenizer.added_tokens_decoder
    if "▁" not in text:
        for (begin, end), token in zip(pairwise([0, *cut.ends]), cut.ids, strict=True):
            piece = data[begin:end]
            spelt = cutter.pieces[token]
            if token in special:
                assert piece.strip() == spelt.strip()
            else:
                assert spelt in (piece, b" " + piece)
    return cut


def _check_pairs(
    aligner: TokenAligner, student: ByteCutter, teacher: ByteCutter, text: str
) -> None:
    """Pairs are the same bytes, in order, and all of them where no special token is in between."""
    cuts = [_check_cut(cutter, text) for cutter in (student, teacher)]
    ids = [
        cutter.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        for cutter in (student, teacher)
    ]
    rows = [([0, *side], [-100, *side]) for side in ids]
    pairs = aligner.pairs(*rows[0], *rows[1])
    for (i, j), (k, m) in pairwise(pairs):
        assert i < k and j < m
    if cuts[0] is None or cuts[1] is None:
        return
    special = [
        any(each in cutter.tokenizer.added_tokens_decoder for each in side)
        for cutter, side in zip((student, teacher), ids, strict=True)
    ]
    if any(special):
        return
    spans = [
        [(end - len(cutter.pieces[token]), end) for token, end in zip(side, cut.ends, strict=True)]
        for cutter, side, cut in zip((student, teacher), ids, cuts, strict=True)
    ]
    if "▁" not in text:
        both = {span: j for j, span in enumerate(spans[1])}
        assert pairs == [(i, both[span]) for i, span in enumerate(spans[0]) if span in both]


@given(text=TEXTS, student=st.sampled_from(FAMILY_NAMES), teacher=st.sampled_from(FAMILY_NAMES))
@cases(40, 5000)
@example(text="▁a ▁", student="llama", teacher="gpt2")
@example(text="</s> x </s>", student="llama", teacher="opt")
@example(text=" </s>", student="gemma", teacher="llama")
@example(text="\0", student="gemma", teacher="gpt2")
def test_tokens_of_each_family_share_out_the_bytes(text: str, student: str, teacher: str) -> None:
    _check_pairs(_aligner(student, teacher), _cutter(student), _cutter(teacher), text)
    (pair,) = cut_both(_cutter(teacher), _cutter(student), [text])
    if pair is not None:
        for cut in (pair.teacher, pair.student):
            assert (cut.ends[-1] if cut.ends else 0) == len(pair.text.encode())


@given(
    texts=st.lists(TEXTS.filter(bool), min_size=1, max_size=3),
    kinds=st.tuples(*[st.sampled_from(["byte-level", "unigram"])] * 2),
    sizes=st.tuples(st.integers(270, 400), st.integers(270, 400)),
)
@cases(10, 600)
def test_tokens_of_any_training_share_out_the_bytes(
    texts: list[str], kinds: tuple[str, str], sizes: tuple[int, int]
) -> None:
    """Two tokenizers, each trained on other texts of the case, on all of them."""
    half = len(texts) // 2
    try:
        student = _trained(kinds[0], sizes[0], tuple(texts[: half + 1]))
        teacher = _trained(kinds[1], sizes[1], tuple(texts[half:]))
    except Exception as error:  # tokenizers raises nothing else where a training has too little
        assume("vocab" not in str(error).lower() and "train" not in str(error).lower())
        raise
    cutters = ByteCutter(student, "student"), ByteCutter(teacher, "teacher")
    aligner = TokenAligner(student, teacher)
    for text in [*texts, "the end of the line"]:
        _check_pairs(aligner, *cutters, text)


@pytest.mark.slow
@pytest.mark.skipif(not REAL.is_dir(), reason="needs the tokenizers of published models")
@pytest.mark.parametrize(
    ("student", "teacher"),
    [("gpt2", "qwen1.5"), ("tinyllama", "mistral-v0.1"), ("gpt2", "mistral-v0.1")],
)
def test_tokens_of_published_models_share_out_the_bytes(student: str, teacher: str) -> None:
    aligner, cutters = _aligner(student, teacher), (_cutter(student), _cutter(teacher))

    @given(text=TEXTS)
    @cases(50, 1000)
    def published_tokenizers(text: str) -> None:
        _check_pairs(aligner, *cutters, text)

    published_tokenizers()


# Rows -------------------------------------------------------------------------------------------

ANY_TEXT = st.one_of(TEXTS, st.text(max_size=20), st.sampled_from(["\ud800", "a\udfff\ud83d", "é"]))
VALUES = st.one_of(
    ANY_TEXT,
    st.none(),
    st.integers(),
    st.floats(),
    st.booleans(),
    st.lists(ANY_TEXT, max_size=2),
    st.dictionaries(st.text(max_size=5), ANY_TEXT, max_size=2),
)
MESSAGES = st.lists(
    st.one_of(
        st.fixed_dictionaries(
            {
                "role": st.one_of(st.sampled_from(["system", "user", "assistant", "tool"]), VALUES),
                "content": VALUES,
            }
        ),
        VALUES,
    ),
    max_size=4,
)
SEGMENTS = st.lists(
    st.one_of(st.fixed_dictionaries({"label": st.booleans(), "text": VALUES}), VALUES), max_size=4
)
ROW = st.one_of(
    st.fixed_dictionaries(
        {"instruction": ANY_TEXT, "output": ANY_TEXT}, optional={"input": VALUES}
    ),
    st.fixed_dictionaries({}, optional={"instruction": VALUES, "input": VALUES, "output": VALUES}),
    st.fixed_dictionaries({"messages": MESSAGES}),
    st.fixed_dictionaries({"segments": SEGMENTS}),
    st.dictionaries(st.text(max_size=8), VALUES, max_size=3),
)
TYPES: dict[str, dict[str, Any]] = {
    "alpaca": {"type": "alpaca"},
    "chat_template": {"type": "chat_template", "chat_template": "chatml"},
    "llama3": {"type": "chat_template", "chat_template": "llama3"},
    "gemma": {"type": "chat_template", "chat_template": "gemma"},
    "input_output": {"type": "input_output"},
}


class _Captured(Exception):
    """Carries the strategy out of axolotl's way."""


@pytest.fixture(scope="module")
def strategies(lab: Path) -> dict[str, Any]:
    """What each type of data set tokenises a row with, for both models."""
    from axolotl.utils.dict import DictDefault
    from datasets import Dataset

    from dwakd_plugin.data import dual_tokenization as dual
    from dwakd_plugin.recipe.schema import TeacherConfig

    teacher = TeacherConfig.model_validate(str(lab / "teacher"))
    student_tokenizer = AutoTokenizer.from_pretrained(lab / "student")
    teacher_tokenizer = dual.load_teacher_tokenizer(teacher)

    def capture(strategy: Any, *_: Any, **__: Any) -> Any:
        raise _Captured(strategy)

    found = {}
    for name, entry in TYPES.items():
        dataset_config = DictDefault({"path": "rows.jsonl", **entry})
        cfg = DictDefault({"sequence_len": 200, "train_on_inputs": False, "datasets": [entry]})
        teacher_cfg = dual.teacher_recipe(cfg, teacher, teacher_tokenizer)
        kwargs = {
            "dataset": Dataset.from_list([{"x": "y"}]),
            "dataset_base_type": entry["type"],
            "dataset_prompt_style": None,
        }
        with pytest.MonkeyPatch.context() as patch, pytest.raises(_Captured) as captured:
            patch.setattr(dual.axolotl_wrappers, "wrap_dataset_for_tokenized_prompt", capture)
            dual._wrap_both_sides(
                dual.axolotl_sft.get_dataset_wrapper,
                dataset_config,
                student_tokenizer,
                cfg,
                teacher_tokenizer,
                teacher_cfg,
                dual.RowReport(),
                kwargs,
            )
        found[name] = captured.value.args[0]
    return found


@given(row=ROW, name=st.sampled_from(sorted(TYPES)))
@cases(120, 5000)
@example(row={"instruction": "\ud800", "output": "x"}, name="alpaca")
@example(row={"instruction": "a", "output": "\0"}, name="alpaca")
@example(row={"messages": [{"role": "assistant", "content": "x"}]}, name="gemma")
@example(row={"messages": [{"role": "user", "content": None}]}, name="chat_template")
@example(row={"segments": [{"label": True, "text": "x"}, 3]}, name="input_output")
@example(row={"instruction": "x", "output": "a" * 1_000_000}, name="alpaca")
@example(row={"instruction": "", "output": [""]}, name="alpaca")
def test_a_row_is_tokenised_twice_or_left_out(
    row: dict[str, Any], name: str, strategies: dict[str, Any]
) -> None:
    from dwakd_plugin.data.dual_tokenization import (
        KEPT,
        LABELS_ONLY,
        NO_RESPONSE,
        STATUS_COLUMN,
        STUDENT_TOO_LONG,
        STUDENT_TRUNCATED,
        TEACHER_TOO_LONG,
    )

    strategy = strategies[name]
    before = copy.deepcopy(row)
    try:
        tokens = strategy.tokenize_prompt(row)
    except UserError as error:
        _located(str(error), "rows.jsonl")
        return
    assert repr(row) == repr(before)
    status = tokens[STATUS_COLUMN]
    dropped = (NO_RESPONSE, STUDENT_TOO_LONG, STUDENT_TRUNCATED, TEACHER_TOO_LONG)
    assert status in (KEPT, LABELS_ONLY, *dropped)
    sides = (("input_ids", "labels"), ("teacher_input_ids", "teacher_labels"))
    responses = []
    for ids, labels in sides:
        assert len(tokens[ids]) == len(tokens[labels])
        assert all(b in (-100, a) for a, b in zip(tokens[ids], tokens[labels], strict=True))
        responses.append([label for label in tokens[labels][1:] if label != -100])
    assert bool(responses[0]) or status == NO_RESPONSE
    if status != KEPT:
        return
    assert responses[1]
    student, teacher = (
        side.tokenizer.decode(
            response, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        for side, response in zip((strategy.student, strategy.teacher), responses, strict=True)
    )
    wild = any(mark in repr(row) for mark in ("<|", "</s>", "<s>", "<unk>", "<pad>", "<eos>"))
    if not wild:  # a special token in the text is one to the tokenizer that has it
        assert student.strip() == teacher.strip()


LINES = st.one_of(
    ROW.map(lambda row: json.dumps(row)),
    ROW.map(lambda row: json.dumps(row, ensure_ascii=False)),
    VALUES.map(lambda value: json.dumps(value)),
    st.text(max_size=30),
    st.sampled_from(
        ["", " ", "[", "{}", "[]", "null", "NaN", '{"a":', "[" * 3000, "1" * 5000, "\ufeff"]
    ),
    st.sampled_from(["[1, 2]", '[{"instruction": "a", "output": "b"}]', '{"messages": []}']),
)


@given(lines=st.lists(LINES, max_size=5), ending=st.sampled_from([b"", b"\xff", b"\n", b"\0"]))
@cases(120, 5000)
@example(lines=['{"instruction": "a", "output": "\\ud800"}'], ending=b"")
@example(lines=['{"instruction": "a", "output": "b"}', "[" * 100_000], ending=b"")
@example(lines=["[" * 100_000], ending=b"")
@example(lines=['{"instruction": "a", "output": ' + "1" * 5000 + "}"], ending=b"")
@example(lines=["\ufeff", '{"instruction": "a", "output": "b"}'], ending=b"\n")
def test_evaluation_rows_are_read_or_located(
    lines: list[str], ending: bytes, scratch: Path, lab: Path
) -> None:
    from dwakd_plugin.evaluate.rows import Format, encode, read_rows

    file = scratch / "rows.jsonl"
    file.write_bytes("\n".join(lines).encode(errors="surrogatepass") + ending)
    try:
        rows = read_rows(file)
    except UserError as error:
        _located(str(error), "rows.jsonl")
        return
    assert rows
    tokenizer = _lab_tokenizer(lab)
    for row in rows:
        assert row.references and all(each.strip() for each in row.references)
        kinds = ["chat"] if row.instruction is None else ["chat", "alpaca", "text"]
        for kind in kinds:
            form = Format(kind, "as asked", "{instruction}\n{input}\n")
            try:
                encoded = encode(row, form, tokenizer, [tokenizer.eos_token_id])
            except UserError as error:
                _located(str(error))
                continue
            assert encoded.prompt and encoded.response
            assert encoded.response[-1] in tokenizer.added_tokens_decoder


@cache
def _lab_tokenizer(lab: Path) -> Any:
    return AutoTokenizer.from_pretrained(lab / "teacher")
