"""The recipe's schema: the `distillation` switch and the `dwakd:` block.

Every field has its bounds and its description here and nowhere else: `reference` makes the tables
of `docs/configuration.md` from it, and the loss takes `LossConfig` and `SoftDTWConfig` as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from pydantic import (
    BaseModel,
    Field,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)

from dwakd_plugin.errors import UserError
from dwakd_plugin.recipe.blocks import Block, OwnAnswersConfig
from dwakd_plugin.recipe.blocks import Divergence as Divergence
from dwakd_plugin.recipe.blocks import ProjectorConfig as ProjectorConfig
from dwakd_plugin.recipe.blocks import SoftDTWConfig as SoftDTWConfig
from dwakd_plugin.recipe.messages import about, as_found, explain, unknown_key
from dwakd_plugin.recipe.teacher import TeacherConfig as TeacherConfig
from dwakd_plugin.recipe.teachers import NamedTeacher as NamedTeacher
from dwakd_plugin.recipe.teachers import check_names

StudentWeighting = Literal["entropy_gate", "entropy_then_gate", "entropy", "none"]
# The rows of the paper's Table 3, and the baselines of docs/baselines.md, as the settings that they
# stand for. What the loss makes of a `matching`, `dwakd_plugin.loss.variants` says.
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "paper": {},
    "full": {},  # an older name of it
    "dskd": {"loss": {"student_weighting": "none", "teacher_weighting": "none", "dtw_weight": 0.0}},
    "dskd_weights": {"loss": {"dtw_weight": 0.0}},
    "dskd_dtw": {
        "loss": {"student_weighting": "none", "teacher_weighting": "none"},
        "soft_dtw": {"band": False},
    },
    "dskd_banded_dtw": {"loss": {"student_weighting": "none", "teacher_weighting": "none"}},
    "no_gate": {"loss": {"student_weighting": "entropy"}},
    "sft": {"loss": {"ce_weight": 1.0, "kd_weight": 0.0, "dtw_weight": 0.0}},
    "uld": {
        "loss": {
            "matching": "order",
            "ce_weight": 1.0,
            "kd_weight": 1.5,
            "dtw_weight": 0.0,
            "temperature": 1.0,
        }
    },
    "dskdv2": {
        "loss": {
            "matching": "exact",
            "student_weighting": "none",
            "teacher_weighting": "none",
            "dtw_weight": 0.0,
        }
    },
    "dwakdv2": {"loss": {"matching": "exact"}},
    "mapped": {
        "loss": {
            "matching": "mapped",
            "ce_weight": 0.1,
            "kd_weight": 0.9,
            "dtw_weight": 0.0,
            "temperature": 1.0,
            "student_weighting": "none",
            "teacher_weighting": "none",
        }
    },
}

# What a recipe that names no variant means, and why: docs/method.md. It yields to the weights and
# the temperature that the recipe gives.
DEFAULT_VARIANT = "mapped"
_YIELDS = {"mapped": {"ce_weight", "kd_weight", "dtw_weight", "temperature", "student_weighting"}}
# What a recipe says of these, `mapped` has no use for: it means the paper's form.
_OF_THE_PAPERS_FORM = {"matching", "dtw_weight", "teacher_weighting", "attention_value"}

_WAYS = [settings.get("loss", {}) for settings in VARIANTS.values()]
_MATCHINGS = sorted({way.get("matching", "attention") for way in _WAYS})
# Who has terms through projectors: in any case, or by a weight of its own.
_PROJECTING, _UNPROJECTED = {"attention", "exact"}, {"order"}
# Keys of `loss` that a matching has no use for.
UNREAD = {
    "attention": ("inside_tokens",),
    "exact": ("inside_tokens", "attention_value"),
    "mapped": ("attention_value", "teacher_weighting"),
    "order": (
        "attention_value",
        "inside_tokens",
        "divergence",
        "student_weighting",
        "teacher_weighting",
        "kd_warmup_steps",
    ),
}

if TYPE_CHECKING:
    Variant: TypeAlias = str
    Matching: TypeAlias = str
else:  # what the variants have
    Variant = Literal[tuple(VARIANTS)]
    Matching = Literal[tuple(_MATCHINGS)]


class LossConfig(Block):
    """Weights and forms of the terms at token level, and the weight of the sequence level."""

    ce_weight: float = Field(0.5, ge=0, le=1000, description="Weight of the labels' cross-entropy.")
    kd_weight: float = Field(0.5, ge=0, le=1000, description="Weight of the distillation terms.")
    dtw_weight: float = Field(0.2, ge=0, le=1000, description="Weight of the soft-DTW terms.")
    cosine_weight: float = Field(
        0.0,
        ge=0,
        le=1000,
        description="Of `mapped`: weight of 1 − cos between the student's hidden state and the "
        "teacher's, projected, where both have read the same bytes.",
    )
    matching: Matching = Field(
        "attention",
        description="What of the teacher a token learns from. attention: all positions, by "
        "cross-model attention; exact: the position of the same bytes (DSKDv2); mapped: the "
        "position that has read the same bytes, its probabilities by the student's tokens; "
        "order: the position of the same number, by sorted probabilities (ULD).",
    )
    attention_value: Literal["label_and_hidden", "hidden"] = Field(
        "label_and_hidden",
        description="What attention hands from the teacher to the student's space: the embedding "
        "of the token to be predicted and the hidden state, or the hidden state alone.",
    )
    inside_tokens: Literal["condition", "label"] = Field(
        "condition",
        description="What `mapped` makes of a student's token that begins inside one of the "
        "teacher's, or is several of the teacher's, as digits are where one side groups them. "
        "condition: the teacher's probabilities, given what is read of it; label: its label.",
    )
    temperature: float = Field(
        2.0,
        ge=0.01,
        le=100,
        description="Softens both sides of both distillation terms; no τ² factor.",
    )
    divergence: Divergence = Field(
        "forward_kl", description="Divergence in the student's space; the teacher's is forward KL."
    )
    student_weighting: StudentWeighting = Field(
        "entropy_gate",
        description="Token weights in the student's space. entropy_gate: its entropy times the "
        "teacher's confidence there, normalised; entropy_then_gate: normalised before the "
        "confidence comes in, so that an unsure teacher teaches less; entropy: without it.",
    )
    teacher_weighting: Literal["confidence", "none"] = Field(
        "confidence", description="Token weights in the teacher's space: its certainty, or none."
    )
    kd_warmup_steps: int = Field(
        0, ge=0, le=10**9, description="Optimizer steps over which the student-space term ramps up."
    )
    chunk_size: int | Literal["auto"] = Field(
        "auto",
        description="Tokens that go through an output head at once; auto: by the device's memory.",
    )

    @field_validator("chunk_size", mode="before")
    @classmethod
    def _some_tokens(cls, value: Any) -> Any:
        number = isinstance(value, int | float)
        if value != "auto" and not (number and 1 <= value <= 2**31 and value is not True):
            raise ValueError("give `auto` or a number of tokens from 1 to 2147483648")
        return value

    @model_validator(mode="after")
    def _no_projectors_without_need(self) -> LossConfig:
        if self.matching in _UNPROJECTED and self.dtw_weight > 0:
            raise about(
                "dtw_weight",
                f"dwakd.loss.matching `{self.matching}` has no projectors, which soft-DTW needs; "
                f"set it to 0 (found: {self.dtw_weight:g})",
            )
        if self.matching != "mapped" and self.cosine_weight > 0:
            raise about(
                "cosine_weight",
                f"it is for variant `mapped`, which pairs hidden states, and not for dwakd.loss."
                f"matching `{self.matching}`; set `variant: mapped`, or it to 0 (found: "
                f"{self.cosine_weight:g})",
            )
        for key in UNREAD[self.matching]:
            given = getattr(self, key)
            # `none` turns a weighting off, which then has no effect by intent.
            if given not in (type(self).model_fields[key].default, "none"):
                raise about(
                    key,
                    f"it has no effect with dwakd.loss.matching `{self.matching}`; remove it, or "
                    f"take another variant ({as_found(given)})",
                )
        return self

    @property
    def needs_teacher(self) -> bool:
        """Whether any term asks for the teacher's states; else it is not loaded at all."""
        return max(self.kd_weight, self.dtw_weight, self.cosine_weight) > 0

    @property
    def needs_projectors(self) -> bool:
        """Whether any term goes through projectors (which, `loss.trained_projectors` says)."""
        by_weight = self.dtw_weight > 0 or self.cosine_weight > 0
        return self.needs_teacher and (self.matching in _PROJECTING or by_weight)


class DWAKDConfig(Block):
    """The `dwakd:` block of a recipe."""

    teacher: TeacherConfig = Field(
        None,  # type: ignore[assignment]  # there is one: `_first_of_several`
        validate_default=False,
        description="The big model, and how it is held; of `teachers`, the first.",
    )
    teachers: list[NamedTeacher] = Field(
        [], description="Several, instead of `teacher`; each as that one, with these keys too."
    )
    variant: Variant = Field(
        DEFAULT_VARIANT,
        description="The method in one word. mapped: the teacher's own probabilities by the "
        "student's tokens; paper: DWA-KD to the letter, and what is taken of a recipe that names "
        "no variant and sets `soft_dtw`, `projectors` or a key of `loss` that only it has; the "
        "others are ablations and baselines.",
    )
    different_answers: Literal["labels", "drop", "stop"] = Field(
        "labels",
        description="What becomes of a row whose answer is another text on the teacher's side, as "
        "its chat template leaves something out: learnt from its labels alone, at the weight "
        "`loss.ce_weight`, dropped, or an error before training.",
    )
    loss: LossConfig = Field(default_factory=LossConfig, description="Token level, and weights.")
    soft_dtw: SoftDTWConfig = Field(
        default_factory=SoftDTWConfig, description="Sequence level: γ and the band."
    )
    projectors: ProjectorConfig = Field(
        default_factory=ProjectorConfig, description="The maps between the two models."
    )
    own_answers: OwnAnswersConfig | None = Field(
        None, description="Answers that the student samples itself; none where it isn't given."
    )

    @model_validator(mode="before")
    @classmethod
    def _apply_variant(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        values = {"variant": _unnamed_variant(values)} | values
        check_names(values)
        variant = values["variant"]
        presets = VARIANTS.get(variant, {}) if isinstance(variant, str) else {}
        yields = _YIELDS.get(variant, set()) if presets else set()
        for block, settings in presets.items():
            given = values.get(block) or {}
            if not isinstance(given, dict):
                continue
            for key, value in settings.items():
                if key in given and given[key] != value and key not in yields:
                    raise about(
                        f"{block}.{key}",
                        f"variant `{variant}` stands for {value}; drop one of the two "
                        f"({as_found(given[key])})",
                    )
            values[block] = {**settings, **given}
        return values

    @model_validator(mode="after")
    def _first_of_several(self) -> DWAKDConfig:
        if self.teachers:
            self.__dict__["teacher"] = self.teachers[0]
        if len(self.teachers) < 2:
            return self
        if self.loss.needs_projectors:
            loss, remedy = self.loss, "set `variant: mapped`"
            has_them = f"matching `{loss.matching}` has them"
            if loss.matching not in _PROJECTING:
                weights = f"dtw_weight {loss.dtw_weight:g} and cosine_weight {loss.cosine_weight:g}"
                has_them, remedy = f"dwakd.loss.{weights} bring them", "set both to 0"
            raise about(
                "teachers",
                f"several teachers are for variants without projectors (mapped, uld), and "
                f"{has_them}; {remedy}, or give one `teacher`",
            )
        if self.own_answers is not None:
            raise about(
                "own_answers",
                "they are judged by one teacher so far, and `teachers` names "
                f"{len(self.teachers)}; remove own_answers, or give one `teacher`",
            )
        return self

    @model_serializer(mode="wrap")
    def _as_written(self, to_dict: Any) -> dict[str, Any]:
        found: dict[str, Any] = to_dict(self)
        found.pop("teacher" if self.teachers else "teachers", None)
        return found

    @property
    def sampled_answers(self) -> OwnAnswersConfig | None:
        """The settings of the student's own answers, where any are sampled."""
        own = self.own_answers
        return None if own is None or own.share == 0 else own

    @property
    def each_teacher(self) -> tuple[NamedTeacher, ...]:
        """All teachers; the only one is called `teacher` where the recipe has no name for it."""
        only = dict(self.teacher) if self.teacher else {}
        return tuple(self.teachers) or (NamedTeacher.model_construct(name="teacher", **only),)

    @property
    def teachers_called(self) -> str:
        """The teachers' models (`TeacherConfig.called`), of copies one."""
        return ", ".join(dict.fromkeys(teacher.called for teacher in self.each_teacher))

    def of(self, teacher: NamedTeacher) -> DWAKDConfig:
        """The same settings with one of the teachers alone."""
        return self.model_copy(update={"teacher": teacher, "teachers": [teacher]})

    @model_validator(mode="after")
    def _own_answers_have_a_judge(self) -> DWAKDConfig:
        if self.own_answers is None:
            return self
        if not self.loss.needs_teacher:
            raise about(
                "own_answers",
                "they are judged by the teacher, and these loss weights load none; give "
                "dwakd.loss.kd_weight above 0 (variant `mapped`), or remove own_answers",
            )
        if self.teacher.top_k is not None:
            raise about(
                "own_answers",
                "they are judged by all of the teacher's probabilities, and dwakd.teacher.top_k "
                "(64 of a server) keeps some; remove one of the two",
            )
        return self


def _unnamed_variant(block: dict[str, Any]) -> str:
    """What a `dwakd:` block means that names none."""
    loss = block.get("loss")
    given = loss if isinstance(loss, dict) else {}
    own = VARIANTS[DEFAULT_VARIANT]["loss"]["matching"]
    if given.get("matching", own if given.get("cosine_weight") else None) == own:
        return DEFAULT_VARIANT  # by a key of its own: soft-DTW and projectors may stand beside
    of_the_papers_form = block.get("soft_dtw") or block.get("projectors")
    if of_the_papers_form or _OF_THE_PAPERS_FORM & given.keys():
        return "paper"
    return DEFAULT_VARIANT


class DWAKDArgs(BaseModel):
    """What the plugin adds to axolotl's schema; mixed into axolotl's own, it forbids nothing."""

    distillation: Literal["dwakd"] | None = Field(
        None, description="`dwakd` turns distillation on; without it the plugin does nothing."
    )
    dwakd: DWAKDConfig | None = Field(None, description="Settings of the distillation.")


def parse_recipe(recipe: Mapping[str, Any]) -> DWAKDConfig | None:
    """The distillation settings of a recipe (the YAML as a dict), or None where it asks for none.

    Raises UserError with every problem named by its place in the recipe.
    """
    switch = recipe.get("distillation")
    block = recipe.get("dwakd")
    if switch is None:
        if block is not None:
            raise UserError(
                "The recipe has a `dwakd:` block but not the line that turns it on. Add "
                "`distillation: dwakd`, or remove the block to train without a teacher."
            )
        return None
    if switch != "dwakd":
        raise UserError(
            f"`distillation: {switch}` is not known. Write `distillation: dwakd`, or remove the "
            "line to train without a teacher."
        )
    if not isinstance(block, dict) or not (block.get("teacher") or "teachers" in block):
        keys = block if isinstance(block, dict) else {}
        unknown = [str(key) for key in keys if key not in DWAKDConfig.model_fields]
        raise UserError(
            "`distillation: dwakd` needs a teacher, and the recipe names none. Add\n"
            "  dwakd:\n    teacher:\n      base_model: <hub id or folder of the teacher>"
            + "".join(f"\n{unknown_key([key], DWAKDConfig, 'dwakd')}" for key in unknown)
        )
    try:
        return DWAKDConfig.model_validate(block)
    except ValidationError as error:
        problems = "\n".join(f"  {explain(one, DWAKDConfig, 'dwakd')}" for one in error.errors())
        raise UserError(f"The recipe's `dwakd:` block cannot be used:\n{problems}") from None
