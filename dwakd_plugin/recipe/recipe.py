"""A recipe: what axolotl gets, and in one place what we look at in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from dwakd_plugin.errors import UserError
from dwakd_plugin.recipe.reading import read_recipe, with_distillation
from dwakd_plugin.recipe.schema import DWAKDConfig, parse_recipe
from dwakd_plugin.recipe.teacher import teacher_keys

# What shards the student over several processes.
ENGINE_KEYS = ("fsdp", "fsdp_config", "fsdp_version", "deepspeed")


@dataclass(frozen=True)
class Recipe:
    """A recipe as axolotl gets it, with the plugin's switch and block; changed by making another.

    `keys` is all of it as it was written, axolotl's own keys and ours; `changes` says, a line each,
    what was changed to make it fit. Nothing is checked here: what the properties of axolotl's keys
    read, `checks.check_kinds` has seen in every recipe that `preflight.check_all` lets through.
    """

    keys: Mapping[str, Any]
    changes: tuple[str, ...] = ()

    @classmethod
    def read(cls, file: Path, teacher: Mapping[str, Any]) -> Recipe:
        """A recipe's file, completed as by `completed`. Raises UserError where it isn't one."""
        return cls.completed(read_recipe(file), teacher)

    @classmethod
    def completed(cls, keys: dict[str, Any], teacher: Mapping[str, Any]) -> Recipe:
        """The keys with all that distillation needs; `teacher` overrides `dwakd.teacher`.

        Raises UserError where neither names a teacher.
        """
        keys, changes = with_distillation(keys, dict(teacher))
        return cls(keys, tuple(changes))

    @property
    def config(self) -> DWAKDConfig:
        """The `dwakd:` block, parsed. Raises UserError where there is none to use."""
        if self._parsed is None:
            raise UserError("The recipe does not say `distillation: dwakd`.")
        return self._parsed

    @property
    def distils(self) -> bool:
        """Whether it asks for distillation. Raises UserError where the block cannot be used."""
        return self._parsed is not None

    @cached_property
    def _parsed(self) -> DWAKDConfig | None:
        return parse_recipe(self.keys)

    def written(self, *path: str) -> Any:
        """What the `dwakd:` block says at a place, whether or not the block can be used as a whole.

        None where it says nothing. A bare name of the teacher is its `base_model`.
        """
        value = self.keys.get("dwakd")
        for key in path:
            value = value.get(key) if isinstance(value, dict) else None
            if key == "teacher":
                value = teacher_keys(value)
        return value

    @property
    def written_teachers(self) -> dict[str, Any]:
        """What the `dwakd:` block says of each teacher, as `written`, by its place."""
        teachers = self.written("teachers")
        if isinstance(teachers, list):
            return {f"dwakd.teachers[{place}]": one for place, one in enumerate(teachers)}
        return {"dwakd.teacher": self.written("teacher")}

    def check_one_teacher(self, command: str, option: str = "--teacher ") -> None:
        """Raises UserError where a command that is about one teacher has several."""
        if len(self.config.teachers) > 1:
            names = [one.name for one in self.config.teachers]
            raise UserError(
                f"The recipe has several teachers ({', '.join(names)}), and `{command}` is about "
                f"one: name it (`{option}{names[0]}`)."
            )

    # Changed ones --------------------------------------------------------------------------------

    def but(self, *without: str, **keys: Any) -> Recipe:
        """With these keys, and without others."""
        kept = {key: value for key, value in self.keys.items() if key not in without}
        return Recipe(kept | keys, self.changes)

    def with_block(self, name: str, **settings: Any) -> Recipe:
        """With settings of `dwakd.NAME`; unchanged where it isn't a mapping: the schema says so."""
        block, own = self.keys.get("dwakd"), self.written(name)
        if not isinstance(block, dict) or not isinstance(own, dict | None):
            return self
        return self.but(dwakd=block | {name: (own or {}) | settings})

    def with_teacher(self, number: int = 0, **settings: Any) -> Recipe:
        """With settings of a teacher, by its place among several; as `with_block` of the only."""
        teachers = self.written("teachers")
        if teachers is None:
            return self.with_block("teacher", **settings)
        changed = list(teachers)
        changed[number] = changed[number] | settings
        return self.but(dwakd=self.keys["dwakd"] | {"teachers": changed})

    # axolotl's keys ------------------------------------------------------------------------------

    @property
    def base_model(self) -> str:
        return str(self.keys.get("base_model") or "")

    @property
    def tokenizer(self) -> str:
        """Where the student's tokenizer comes from."""
        return self.keys.get("tokenizer_config") or self.base_model

    @property
    def output_dir(self) -> Path:
        """Where axolotl writes the run."""
        return Path(self.keys.get("output_dir") or "./model-out")  # axolotl's own default

    @property
    def datasets(self) -> list[dict[str, Any]]:
        return self.keys.get("datasets") or []

    @property
    def adapter(self) -> str | None:
        """`lora` or `qlora`; None for full fine-tuning."""
        return self.keys.get("adapter") or None

    @property
    def resumes(self) -> bool:
        asked = ("resume_from_checkpoint", "auto_resume_from_checkpoints")
        return any(self.keys.get(key) for key in asked)

    @property
    def packs(self) -> bool:
        return bool(self.keys.get("sample_packing"))

    @property
    def micro_batch_size(self) -> int:
        return int(self.keys.get("micro_batch_size") or 1)

    @property
    def accumulation_steps(self) -> int:
        return int(self.keys.get("gradient_accumulation_steps") or 1)

    @property
    def has_engine(self) -> bool:
        """Whether FSDP or DeepSpeed runs it."""
        return any(self.keys.get(key) for key in ENGINE_KEYS)
