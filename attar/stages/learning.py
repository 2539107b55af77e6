"""What a recipe learns, and how it rounds behind that."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from attar.errors import AttarError
from attar.quantize.rank_decay import RankDecay
from attar.stages.base import Stage


class Reconstruct(Stage):
    """Block-by-block training of scales, rotations and clipping."""

    epochs: int = Field(default=15, ge=0)
    batch_size: int = Field(
        default=1, ge=1, description="calibration samples in a step; one sample holds both CFG branches"
    )
    transform_lr: float = Field(default=5e-3, gt=0)
    clip_lr: float = Field(default=5e-2, gt=0)
    branch_lr: float = Field(default=2.5e-4, gt=0)
    eta_min_ratio: float = Field(default=1e-3, ge=0, le=1)
    weight_decay: float = Field(default=0.01, ge=0)
    normalise_loss: bool = Field(default=False, description="divide each loss by its own value")
    train_scale: bool = True
    train_rotation: bool = True
    train_clip: bool = True
    train_levels: bool = Field(default=False, description="also what a table format's numbers depend on")
    level_lr: float = Field(default=1e-3, gt=0)
    train_branch: bool = Field(default=False, description="needs quantize.low_rank")
    round_weights: bool = Field(
        default=True,
        description="round weights while learning; else activations alone, which leaves weights to GPTQ",
    )
    loss: Literal["token_weighted", "mse"] = "token_weighted"
    temporal_weight: float = Field(
        default=0.0,
        ge=0,
        description="γ of the divergence of frame similarities that is added to it (Q-VDiT)",
    )
    lambda_min: float = Field(
        default=0.5, gt=0, description="weight of the token that receives least attention"
    )
    lambda_max: float = Field(default=1.0, gt=0)
    lambda_over: Literal["joint", "stream"] = Field(
        default="joint",
        description="tokens among which λ is normalised: text and video together, or each alone",
    )
    cap_quantile: float | None = Field(
        default=None, gt=0, le=1, description="cut the attention mass there, against attention sinks"
    )
    propagate: Literal["fp", "quant"] = Field(
        default="fp", description="what the next block is calibrated on"
    )

    @model_serializer(mode="wrap")
    def _as_before(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        later = {"round_weights": not self.round_weights}
        return {key: value for key, value in handler(self).items() if later.get(key, True)}

    @model_validator(mode="after")
    def _levels_are_rounded_to(self) -> Reconstruct:
        if self.train_levels and not self.round_weights:
            raise ValueError("train_levels needs round_weights")
        return self

    @model_validator(mode="after")
    def _ordered_weights(self) -> Reconstruct:
        if self.lambda_min > self.lambda_max:
            raise ValueError("lambda_min is larger than lambda_max")
        return self


class Relation(Stage):
    """A term for which places of the last block's features resemble each other."""

    kind: Literal["divergence", "direction"] = Field(
        default="divergence",
        description="of the softmax over cosines (MPQ-DM), or the distance of the directions of Z·Zᵀ (BiBERT)",
    )
    weight: float = Field(
        default=25.0, gt=0, description="of the mean divergence or distance beside the mean squared error"
    )
    window: int = Field(default=2, ge=1, description="consecutive steps whose features are averaged")
    temperature: float = Field(default=1.0, gt=0, description="of the softmax over cosines")
    memory: int = Field(
        default=0,
        ge=0,
        description="the original's places, from all traced steps, to compare with; 0 compares places of a sample",
    )
    anchors: int = Field(default=4096, ge=1, description="of that memory in one update")
    places: int = Field(default=1024, ge=2, description="the most of a sample that are compared")

    @model_validator(mode="after")
    def _directions_have_no_memory(self) -> Relation:
        if self.kind == "direction" and self.memory:
            raise ValueError("relation.kind direction compares places of a sample: set relation.memory to 0")
        return self

    @model_serializer(mode="wrap")
    def _as_before(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in handler(self).items() if key != "kind" or value != "divergence"}


class Finetune(Stage):
    """End-to-end training of the quantized model against the original's outputs, on every traced step."""

    steps: int = Field(default=1000, ge=1, description="updates")
    batch_size: int = Field(default=4, ge=1, description="traced steps in one, each with both CFG branches")
    layers: list[str] | None = Field(
        default=None,
        min_length=1,
        description="roles or names whose weights, biases and adapters are trained; null for all",
    )
    local: list[str] | None = Field(
        default=None, min_length=1, description="roles or names of layers whose outputs are compared as well"
    )
    local_weight: float = Field(default=1.0, gt=0, description="of the error of each of them")
    weight_lr: float = Field(
        default=0.0, ge=0, description="of the weights behind the rounding; 0 leaves them"
    )
    bias_lr: float = Field(default=0.0, ge=0)
    clip_lr: float = Field(default=0.0, ge=0, description="of the clipping factors of all layers")
    level_lr: float = Field(default=0.0, ge=0, description="of what a table format's numbers depend on")
    scale_lr: float = Field(
        default=0.0, ge=0, description="of the logarithms of scales, behind a calibration whose codes stay"
    )
    adapter_rank: int = Field(
        default=0, ge=0, description="of low-rank adapters merged before rounding; 0 for none"
    )
    adapter_start: Literal["zero", "rounded", "error"] = Field(
        default="zero",
        description="beside the weight; beside the rounded weight; there, as the leading part of what it lost",
    )
    adapter_lr: float = Field(default=4e-4, gt=0, description="as a share of the layer's mean step size")
    relation: Relation | None = Field(default=None, description="a term for relations between places")
    auxiliary_rank: int = Field(
        default=0, ge=0, description="of branches behind the rounding, which decay while training; 0 for none"
    )
    auxiliary_lr: float = Field(default=3e-5, gt=0)
    auxiliary_keep: float = Field(
        default=0.5, ge=0, lt=1, description="share of the rank that a phase leaves"
    )
    schedule: Literal["cosine", "linear"] = "cosine"
    warmup: float = Field(default=0.1, ge=0, lt=1, description="share of the steps")
    weight_decay: float = Field(default=1e-4, ge=0, description="of the weights")
    max_norm: float | None = Field(default=1.0, gt=0, description="the gradient's norm is cut there")
    gradient_checkpointing: bool = Field(
        default=False,
        description="blocks keep their inputs alone and run twice: far less memory, the same result",
    )

    @model_validator(mode="after")
    def _trains_something(self) -> Finetune:
        rates = (self.weight_lr, self.bias_lr, self.clip_lr, self.level_lr, self.scale_lr)
        if not any(rates) and not self.adapter_rank:
            raise ValueError("nothing is trained: give a learning rate, or adapters a rank")
        return self

    @model_validator(mode="after")
    def _adapters_start_beside_something(self) -> Finetune:
        if self.adapter_start != "zero" and (not self.adapter_rank or self.weight_lr):
            raise ValueError(
                "adapter_start takes the rounded weight as the base of adapters: give them adapter_rank, and leave "
                "weight_lr at 0"
            )
        return self

    @model_validator(mode="after")
    def _batches_hold_windows(self) -> Finetune:
        if self.relation is not None and self.batch_size % self.relation.window:
            raise ValueError(f"batch_size is no multiple of relation.window, {self.relation.window}")
        return self

    @model_serializer(mode="wrap")
    def _as_before(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        later = {"relation": self.relation, "adapter_start": self.adapter_start != "zero"}
        return {key: value for key, value in handler(self).items() if later.get(key, True)}

    @model_validator(mode="after")
    def _branches_have_time_to_decay(self) -> Finetune:
        if self.auxiliary_rank:
            try:
                RankDecay(self.auxiliary_rank, self.steps, self.auxiliary_keep)
            except AttarError as error:
                raise ValueError(f"{error.what}. {error.fix or ''}".strip()) from error
        return self


class Rounding(Stage):
    """How transformed weights become integers."""

    method: Literal["nearest", "gptq"] = "gptq"
    target: Literal["clipped", "weight"] = Field(
        default="clipped",
        description="what GPTQ approximates: the clipped weight, or the weight, making up for what clipping cuts off",
    )
    order: Literal["given", "activation"] = Field(
        default="given", description="of GPTQ's columns: as they are, or those of the largest inputs first"
    )
    damping: float = Field(default=0.01, gt=0)
    block: int = Field(default=128, ge=1)
    epochs: int = Field(
        default=0,
        ge=0,
        description="over the samples, in which the codes of a block are learned by the block's error; 0 leaves them",
    )
    lr: float = Field(default=5e-3, gt=0, description="of learned codes, in steps between two codes")
    scale_lr: float = Field(
        default=0.0, ge=0, description="of the logarithms of their scales, learned with them; 0 leaves them"
    )

    @model_validator(mode="after")
    def _scales_are_learned_with_codes(self) -> Rounding:
        if self.scale_lr and not self.epochs:
            raise ValueError("scale_lr is of scales that are learned with codes: give epochs, or set it to 0")
        return self

    @property
    def needs_data(self) -> bool:
        """Whether codes depend on calibration samples."""
        return self.method == "gptq" or self.epochs > 0

    @model_serializer(mode="wrap")
    def _as_before(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        later = {
            "target": self.target != "clipped",
            "order": self.order != "given",
            "epochs": self.epochs != 0,
            "lr": self.epochs != 0,
            "scale_lr": self.scale_lr != 0,
        }
        return {key: value for key, value in handler(self).items() if later.get(key, True)}
