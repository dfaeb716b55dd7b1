"""Blocks of the recipe that stand by themselves; `schema` puts them together."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, Field, field_validator, model_validator

from dwakd_plugin.recipe.messages import about, as_found, check_name

Divergence = Literal[
    "forward_kl", "reverse_kl", "skewed_forward_kl", "skewed_reverse_kl", "adaptive_kl", "js"
]


class Block(BaseModel, extra="forbid", validate_default=True, frozen=True, allow_inf_nan=False):
    """A block of the recipe. Unknown keys are refused; `parse_recipe` names the nearest known."""


Name = Annotated[str, AfterValidator(check_name)]


class SoftDTWConfig(Block):
    """The sequence level: soft-DTW's smoothing and the attention-entropy band."""

    gamma_start: float = Field(2.0, ge=0.001, le=1000, description="Smoothing γ at the first step.")
    gamma_end: float = Field(
        0.8, ge=0.001, le=1000, description="Smoothing γ at the last step; linear between."
    )
    band: bool = Field(True, description="Penalise cells far from where the attention looks.")
    band_width: float = Field(
        5.0, ge=0, le=10**6, description="Half width b of the band, in tokens."
    )
    band_entropy_coef: float = Field(
        2.0, ge=0, le=10**6, description="β: tokens of half width per nat of attention entropy."
    )
    band_center_blend: float = Field(
        0.7, ge=0, le=1, description="α: 1 centres on the attention's mean, 0 on the diagonal."
    )
    band_penalty: float = Field(
        1.0, ge=0, le=1000, description="Added to the cost of cells outside."
    )


class ProjectorConfig(Block):
    """The trainable maps between the two models' spaces."""

    learning_rate: float = Field(
        1.0e-3, gt=0, le=10, description="Learning rate of the projectors."
    )
    init: Literal["auto", "shared_vocab", "random"] = Field(
        "auto",
        description="shared_vocab: least squares on the head rows of the tokens that both "
        "vocabularies share; auto: that, where enough are shared.",
    )
    warmup_steps: int = Field(
        0, ge=0, le=10**9, description="Steps before training in which the projectors learn alone."
    )
    warmup_learning_rate: float = Field(
        3.0e-3, gt=0, le=10, description="Learning rate of the projectors while they warm up."
    )
    path: Name | None = Field(None, description="A projector file of an earlier run to start from.")


class OwnAnswersConfig(Block):
    """Answers that the student samples while it trains, for the teacher to judge."""

    share: float = Field(
        0.5, ge=0, le=1, description="Share of a step's rows whose answer the student samples."
    )
    max_new_tokens: int = Field(
        128, ge=1, le=2**20, description="Longest sampled answer in the student's tokens."
    )
    temperature: float = Field(
        1.0, ge=0, le=100, description="Of the sampling; 0 takes the most likely token."
    )
    top_p: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Samples from the fewest tokens that have this much probability together.",
    )
    start_after: int = Field(
        100, ge=0, le=10**9, description="Optimizer steps with given answers alone, before."
    )
    backend: Literal["auto", "transformers", "vllm"] = Field(
        "auto",
        description="What samples. auto: vLLM where it is installed and the student is on a GPU in "
        "16 or 32 bits, with or without a plain LoRA; else transformers.",
    )
    refresh_every: int = Field(
        1,
        ge=1,
        le=10**9,
        description="Optimizer steps between two hand-overs of the student's weights to vLLM.",
    )
    vllm_memory: float = Field(
        0.3,
        gt=0,
        le=1,
        description="Share of the device's memory that vLLM takes throughout, for its copy of the "
        "student, keys and values.",
    )
    matching: Literal["mapped", "order"] = Field(
        "mapped", description="What compares the two sides, as in `dwakd.loss.matching`."
    )
    divergence: Divergence = Field("reverse_kl", description="Divergence of the mapped teacher.")

    @model_validator(mode="after")
    def _nothing_without_effect(self) -> OwnAnswersConfig:
        if self.backend == "transformers" and self.refresh_every > 1:
            raise about(
                "refresh_every",
                "transformers samples from the student as it is, and so always from fresh weights; "
                f"set it to 1, or leave the backend to auto or vllm (found: {self.refresh_every})",
            )
        unread = {
            "divergence": self.matching == "order" and "it compares sorted probabilities",
            "vllm_memory": self.backend == "transformers" and "vLLM isn't used",
            "top_p": self.temperature == 0 and "temperature 0 takes the most likely token",
        }
        for key, why in unread.items():
            given, default = getattr(self, key), type(self).model_fields[key].default
            if why and given != default:
                raise about(key, f"it has no effect here: {why}; remove it ({as_found(given)})")
        return self

    @field_validator("matching", mode="before")
    @classmethod
    def _without_labels(cls, value: Any) -> Any:
        if value in ("attention", "exact"):
            raise ValueError(
                "it trains projectors on labels, which a sampled answer doesn't have; set "
                "`mapped` or `order` (dwakd.loss.matching, for given answers, may stay)"
            )
        return value
