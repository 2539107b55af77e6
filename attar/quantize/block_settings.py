"""How the layers of a block are quantized."""

from __future__ import annotations

from dataclasses import dataclass

from attar.quantize.initialize import TransformSettings
from attar.quantize.linear import QuantizedLinear
from attar.quantize.low_rank import LowRankSettings
from attar.quantize.plan import LayerPlan
from attar.quantize.reconstruct import ReconstructionSettings
from attar.quantize.row_bits import RowBitsSettings


@dataclass(frozen=True)
class BlockSettings:
    """How a block is quantized. `learning` None trains nothing; `gptq_damping` None rounds to nearest.

    clip_groups: how many groups of denoising steps have activation clipping of their own, None for one pair in all.
    clip_start: logit from which clipping factors start; clip_search: weights' factors start where rounding errs least.
    round_weights: weights are rounded while the block learns; else only activations are, which leaves the weights to
    what comes behind it; layers with floating-point activations round their weights in any case. gptq_whole,
    gptq_by_activation: see `gptq_codes`. rounding: codes are learned behind all that, and their scales where these
    have a rate (`LearnedCodes`).
    stats_ema: momentum of the channels' statistics, see `collect_input_stats`.
    """

    transforms: TransformSettings
    weight_clip: bool = True
    act_clip: bool = True
    clip_groups: int | None = None
    clip_start: float = 4.0
    clip_search: bool = False
    stats_ema: float | None = None
    learning: ReconstructionSettings | None = None
    train_scale: bool = True
    train_rotation: bool = True
    train_clip: bool = True
    train_levels: bool = False
    train_branch: bool = False
    round_weights: bool = True
    gptq_damping: float | None = None
    gptq_block: int = 128
    gptq_whole: bool = False
    gptq_by_activation: bool = False
    rounding: ReconstructionSettings | None = None
    low_rank: LowRankSettings | None = None
    row_bits: RowBitsSettings | None = None

    @property
    def epochs(self) -> int:
        """Passes over the samples with gradients, of transforms and of codes."""
        return sum(stage.epochs for stage in (self.learning, self.rounding) if stage is not None)

    def keeps_weight(self, layer: QuantizedLinear) -> bool:
        """Whether the layer's weight is not rounded while the block learns; a weight-only layer has nothing else."""
        return not self.round_weights and layer.act_bits is not None and bool(len(layer.transforms))

    @property
    def _act_clipping(self) -> str:
        groups = "" if self.clip_groups is None else f" of {self.clip_groups} groups of steps"
        return f"activation clipping{groups}"

    def treatment(self, plan: LayerPlan) -> list[str]:
        """What a planned layer goes through, in order: ["channel scale", "kronecker", …, "gptq"]; [] when skipped."""
        if plan.skipped or plan.plain:
            return [] if plan.skipped else ["nearest"]
        chosen = self.transforms
        steps = [("channel scale", chosen.scale), (chosen.rotation, chosen.rotation != "none")]
        steps = steps if plan.transformed else []
        if chosen.order == "rotate_then_scale":
            steps.reverse()
        steps = [("channel shift", chosen.shift), *steps]
        steps += [
            ("bits by rows", plan.row_bits is not None),
            ("searched weight clipping" if self.clip_search else "weight clipping", self.weight_clip),
            (f"low-rank branch ({plan.low_rank})", plan.low_rank > 0),
            (self._act_clipping, self.act_clip and plan.act_bits is not None),
            ("nearest", self.gptq_damping is None),
            ("gptq", self.gptq_damping is not None),
            ("learned rounding", self.rounding is not None),
            ("learned scales of codes", self.rounding is not None and self.rounding.scale_lr > 0),
        ]
        return [name for name, taken in steps if taken]
