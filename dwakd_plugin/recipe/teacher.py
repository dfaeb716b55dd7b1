"""The `dwakd.teacher` block: where the teacher comes from, and how it is held."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from dwakd_plugin.errors import UserError
from dwakd_plugin.recipe.adapters import adapter_settings, base_of_adapter
from dwakd_plugin.recipe.blocks import Block, Name
from dwakd_plugin.recipe.messages import about

SERVED_TOP_K = 64  # of a server, where the recipe doesn't say
_OF_A_SERVER = ("model", "server_requests", "server_patience")
_OF_A_LOADED_TEACHER = (
    *("adapter", "load_in_8bit", "load_in_4bit", "int8_threshold", "dtype"),
    *("attn_implementation", "device", "cache_dtype"),
)


def teacher_keys(teacher: Any) -> Any:
    """`dwakd.teacher` as a mapping: a text is its `base_model`. All else is left to the schema."""
    return {"base_model": teacher} if isinstance(teacher, str) else teacher


class TeacherConfig(Block):
    """Where the teacher comes from and how it is held."""

    base_model: Name = Field(
        min_length=1,
        description="Hub id or folder of the teacher; of a served one, `tokenizer` does.",
    )
    tokenizer: Name | None = Field(None, description="Hub id or folder; default: `base_model`.")
    top_k: int | None = Field(
        None,
        ge=1,
        le=2**20,
        description="How many of its likeliest tokens the teacher gives at each position, instead "
        "of its states: for `mapped`, which needs no more, and a `cache` keeps 6 bytes of each. "
        "Default: 64 of a server, else the states.",
    )
    server: str | None = Field(
        None,
        max_length=2000,
        description="Address of an OpenAI-compatible server that holds the teacher, as "
        "http://host:8000/v1; nothing of it is loaded here but its tokenizer. A key that it wants "
        "is in the environment's DWAKD_SERVER_KEY, and nowhere else.",
    )
    model: str | None = Field(
        None,
        min_length=1,
        max_length=500,
        description="What the server calls it; default: `base_model`.",
    )
    server_requests: int = Field(
        16, ge=1, le=1024, description="Rows that each process asks a server for at once."
    )
    server_patience: float = Field(
        600.0,
        ge=1,
        le=86400,
        description="Seconds that a run waits for a server that does not answer, and tries again, "
        "before it ends with a checkpoint.",
    )
    adapter: Name | None = Field(
        None,
        description="A LoRA of the teacher: merged at load, or attached where it is quantised.",
    )
    revision: Name | None = Field(None, description="Revision of the teacher on the hub.")
    trust_remote_code: bool = Field(
        False, description="Let the teacher's repository run code of its own."
    )
    load_in_8bit: bool = Field(
        False, description="Hold the teacher's linear layers in 8 bit, head and embeddings not."
    )
    int8_threshold: float | None = Field(
        None,
        ge=0,
        le=1000,
        description="Columns with a value beyond it are computed in 16 bits for all tokens; "
        "default: bitsandbytes' 6. 0: none is, and no token's states depend on a later one's.",
    )
    load_in_4bit: bool = Field(
        False, description="In 4 bit (nf4, double quantisation), head and embeddings not."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="The teacher's dtype; auto: the checkpoint's, float32 on a CPU."
    )
    attn_implementation: str = Field(
        "auto",
        description="auto: flash attention where it is available (flash_attention_3, "
        "flash_attention_2, or the hub's kernel through `kernels`) and device, dtype and "
        "architecture can, else sdpa or eager; or a name of transformers'.",
    )
    device: str | dict[str, str] | None = Field(
        None,
        description="cuda:1, cpu, ...; default: the student's. offload: half of the GPU's free "
        "memory, then the CPU's, then disk; limits of your own as in {cuda:0: 20GiB, cpu: 60GiB}.",
    )
    sequence_len: int | None = Field(
        None,
        ge=2,
        le=2**31,
        description="Longest teacher sequence in tokens; default: the student's.",
    )
    chat_template: str | None = Field(
        None,
        description="A Jinja chat template, a file of it, or a name of axolotl's (`chatml`); "
        "default: the teacher tokenizer's own.",
    )
    thinking_key: str | None = Field(
        None,
        description="What the teacher's chat template calls a message's reasoning (`thinking`, "
        "`reasoning_content`); default: as the data set's `template_thinking_key`.",
    )
    cache: Name | None = Field(
        None,
        description="Folder for the teacher's hidden states, filled by `dwakd cache`. Rows that it "
        "lacks are computed before training; when it holds every row, only the teacher's head and "
        "embeddings are loaded. With `top_k`, for its likeliest tokens, and nothing is loaded.",
    )
    cache_dtype: Literal["auto", "float16", "bfloat16", "float8_e4m3"] = Field(
        "auto",
        description="How a new cache keeps the states; auto: as computed. float8_e4m3 has a scale "
        "a token. auto takes a cache that is there as it is.",
    )

    @model_validator(mode="before")
    @classmethod
    def _accept_a_bare_name_and_a_lora(cls, values: Any) -> Any:
        """A text is `base_model`; a folder with nothing but a LoRA, that adapter on its base."""
        values = teacher_keys(values)
        if isinstance(values, dict) and values.get("server"):
            if not values.get("base_model") and not values.get("tokenizer"):
                raise about(
                    "tokenizer",
                    "a served teacher's tokenizer is loaded here; give its folder or hub id",
                )
            return {"base_model": values.get("tokenizer"), "top_k": SERVED_TOP_K} | values
        # First of all: who forgot the server has no base_model.
        for key in _OF_A_SERVER if isinstance(values, dict) else ():
            if key in values and values[key] != cls.model_fields[key].default:
                raise about(key, "it is for a teacher on a server; give its address as server")
        folder = values.get("base_model") if isinstance(values, dict) else None
        base = base_of_adapter(folder) if isinstance(folder, str) else None
        if base is None or values.get("adapter"):
            return values
        if base_of_adapter(base) is not None:
            raise about(
                "base_model",
                f"it is a LoRA on {base}, which is a LoRA itself; merge that one into its base "
                "(peft's `merge_and_unload`), and name the merged model in adapter_config.json",
            )
        own = (Path(str(folder)) / "tokenizer_config.json").is_file()
        tokenizer = values.get("tokenizer") or (folder if own else None)
        # What the LoRA learnt on, which the hub may have replaced since.
        revision = values.get("revision") or adapter_settings(folder).get("revision")
        return {
            **values,
            "base_model": base,
            "adapter": folder,
            "tokenizer": tokenizer,
            "revision": revision,
        }

    @model_validator(mode="after")
    def _served_or_loaded(self) -> TeacherConfig:
        if self.server is None:
            return self
        # The value is not shown, as there may be a key in it.
        try:
            address = urlsplit(self.server)
            has_host = bool(address.hostname) and (address.port or 1) > 0
        except ValueError:
            has_host = False
        if not has_host or address.scheme not in ("http", "https"):
            raise about("server", "it isn't an address; write http://host:8000/v1")
        if address.username or address.password or address.query or address.fragment:
            raise about(
                "server",
                "it has more than an address (a user, a password, a `?` or a `#`). Keys are in no "
                "recipe: set the environment's DWAKD_SERVER_KEY",
            )
        for key in filter(self._asks_for, _OF_A_LOADED_TEACHER):
            raise about(
                key,
                "it is for a teacher that is loaded here, and server names one that isn't; remove "
                "one of the two",
            )
        return self

    def _asks_for(self, key: str) -> bool:
        """Whether a key has another value than where it isn't given."""
        return bool(getattr(self, key) != type(self).model_fields[key].default)

    def must_be_loaded(self, what: str) -> None:
        """Raises UserError where the teacher is on a server; `what` needs it here."""
        if self.server is not None:
            raise UserError(
                f"{what} needs the teacher loaded here, and dwakd.teacher.server says that it is "
                f"on {self.server}. Give dwakd.teacher.base_model, a folder or hub id, without "
                "server."
            )

    @property
    def called(self) -> str:
        """The model's name: on the server that holds it, or the hub id or folder."""
        return self.model or self.base_model

    @property
    def precision(self) -> str:
        """How it is held, as far as the recipe says."""
        return "8 bit" if self.load_in_8bit else "4 bit" if self.load_in_4bit else self.dtype

    @model_validator(mode="after")
    def _one_quantisation(self) -> TeacherConfig:
        if self.load_in_8bit and self.load_in_4bit:
            raise about("load_in_4bit", "it is set, and so is load_in_8bit; choose one")
        if self.int8_threshold is not None and not self.load_in_8bit:
            raise about("int8_threshold", "it is for load_in_8bit, which isn't set")
        return self

    @model_validator(mode="after")
    def _states_or_likeliest_tokens(self) -> TeacherConfig:
        if self.top_k is not None and self.cache_dtype != "auto":
            raise about(
                "cache_dtype",
                "it is of hidden states, and top_k keeps the likeliest tokens; remove one",
            )
        return self

    @field_validator("device")
    @classmethod
    def _devices_with_limits(cls, device: str | dict[str, str] | None) -> Any:
        for name, limit in device.items() if isinstance(device, dict) else ():
            if not re.fullmatch(r"cpu|cuda:\d+", name) or not re.fullmatch(
                r"\d+(\.\d+)? ?[KMG]i?B", limit
            ):
                raise ValueError(
                    f"{name}: {limit} isn't a device with a limit; write cpu or cuda:N, and a size "
                    "as in 20GiB"
                )
        if device == {}:
            raise ValueError("names no device; leave it out for the student's device")
        return device
