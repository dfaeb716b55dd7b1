"""The `dwakd.teacher` block: where the teacher comes from, and how it is held."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from dwakd_plugin.recipe.adapters import base_of_adapter
from dwakd_plugin.recipe.blocks import Block, Name


def teacher_keys(teacher: Any) -> Any:
    """`dwakd.teacher` as a mapping: a text is its `base_model`. All else is left to the schema."""
    return {"base_model": teacher} if isinstance(teacher, str) else teacher


class TeacherConfig(Block):
    """Where the teacher comes from and how it is held."""

    base_model: Name = Field(min_length=1, description="Hub id or folder of the teacher.")
    tokenizer: Name | None = Field(None, description="Hub id or folder; default: `base_model`.")
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
        "embeddings are loaded.",
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
        folder = values.get("base_model") if isinstance(values, dict) else None
        base = base_of_adapter(folder) if isinstance(folder, str) else None
        if base is None or values.get("adapter"):
            return values
        own = (Path(str(folder)) / "tokenizer_config.json").is_file()
        tokenizer = values.get("tokenizer") or (folder if own else None)
        return {**values, "base_model": base, "adapter": folder, "tokenizer": tokenizer}

    @model_validator(mode="after")
    def _one_quantisation(self) -> TeacherConfig:
        if self.load_in_8bit and self.load_in_4bit:
            raise ValueError("load_in_8bit and load_in_4bit are both set; choose one")
        if self.int8_threshold is not None and not self.load_in_8bit:
            raise ValueError("int8_threshold is for load_in_8bit, which is not set")
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
