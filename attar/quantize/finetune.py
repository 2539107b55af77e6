"""End-to-end training of a quantized model against the outputs of the original, on samples of its own trajectories.

One loop serves several systems, which differ in what they train: the weights behind the rounding, with auxiliary
branches whose rank decays (QVGen, arXiv 2505.11497); low-rank adapters that are merged before the rounding
(EfficientDM, arXiv 2310.03270); the numbers of a table (Polino et al., arXiv 1802.05668); scales, biases and clipping
alone, behind a calibration whose codes stay (`polish.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from attar.errors import AttarError
from attar.losses import mse
from attar.quantize.batching import Streams, join, like
from attar.quantize.linear import QuantizedLinear
from attar.quantize.polish import ScaledCodes
from attar.quantize.rank_decay import RankDecay, decay, start_auxiliary
from attar.quantize.relations import FEATURES, RelationTerm
from attar.quantize.seeds import seed_of
from attar.quantize.terms import LowRankTerm
from attar.quantize.unused_rows import keep_unused_rows

OPEN = (
    0.999  # the clipping factor of a weight that is on its grid: no code moves, and it can still be trained
)
Layer = QuantizedLinear | ScaledCodes
Samples = Sequence[tuple[Any, Streams]]  # a call of the model, and what the original gave


@dataclass(frozen=True)
class FinetuneSettings:
    """What is trained, and how. A rate of 0 leaves its parameters as they are.

    steps: updates. batch_size: samples in one. weight_lr, bias_lr: of the full-precision weights and the biases.
    adapter_rank: of merged adapters, 0 for none. adapter_start: "zero" leaves the weight as their base; "rounded" takes
    the rounded weight for it, as EfficientDM's code does, and "error" as well, with the leading part of what rounding
    lost as the adapter (MPQ-DMv2, arXiv 2507.04290). adapter_lr: their rate as a share of the layer's mean step size,
    so that in all layers about as many codes change (EfficientDM's scale-aware optimisation; under Adam scaling the
    gradient would do nothing). auxiliary_rank: of branches that decay, 0 for none; auxiliary_lr their rate;
    auxiliary_keep: share of the rank that a phase leaves. clip_lr, level_lr: of clipping factors and tables. scale_lr:
    of the logarithms of scales whose codes stay.
    schedule: "cosine" or "linear" to zero, behind a linear warm-up over the share `warmup` of the steps. weight_decay:
    of weights alone. max_norm: the gradient is cut there; None for never.
    """

    steps: int
    batch_size: int = 1
    weight_lr: float = 0.0
    bias_lr: float = 0.0
    adapter_rank: int = 0
    adapter_start: str = "zero"
    adapter_lr: float = 1 / 2500
    auxiliary_rank: int = 0
    auxiliary_lr: float = 3e-5
    auxiliary_keep: float = 0.5
    clip_lr: float = 0.0
    level_lr: float = 0.0
    scale_lr: float = 0.0
    schedule: str = "cosine"
    warmup: float = 0.0
    weight_decay: float = 0.0
    max_norm: float | None = 1.0


class NothingTrained(AttarError):
    """No parameter has a rate, or none is there that has one."""


class Finetuner:
    """A training run over the layers of a model, which can be stopped after any step and taken up again.

    run: the model on one call, giving its output streams. samples: read again in every epoch, in an order that `seed`
    and the epoch decide. layers: name -> what is trained, in the model that `run` runs; chosen: those whose weights,
    biases and adapters are trained, by default all. loss: of what `run` gives and what the original gave. relation: a
    term of the stream FEATURES beside it. groups: samples, by their places, that stay together in a batch, as a window
    of steps does; what is in none is not trained on. By default every sample is alone. parts: of each sample a number,
    such as its group of denoising steps; batches hold samples of one part, and each part has batches in proportion.
    Raises NothingTrained, or AttarError when a rank does not fit.
    """

    def __init__(
        self,
        run: Callable[[Any], Streams],
        samples: Samples,
        layers: Mapping[str, Layer],
        settings: FinetuneSettings,
        seed: str = "0",
        chosen: Sequence[str] | None = None,
        loss: Callable[[Streams, Streams], Tensor] = mse,
        relation: RelationTerm | None = None,
        groups: Sequence[Sequence[int]] | None = None,
        parts: Sequence[int] | None = None,
    ) -> None:
        if not samples:
            raise AttarError("there are no samples to train on")
        self.run, self.samples, self.layers, self.settings, self.seed = run, samples, layers, settings, seed
        self.loss, self.relation = loss, relation
        self.groups = [[i] for i in range(len(samples))] if groups is None else groups
        self.parts = _parts(self.groups, parts)
        self.chosen = {name: layers[name] for name in (layers if chosen is None else chosen)}
        self._open = {name: layer for name, layer in layers.items() if isinstance(layer, QuantizedLinear)}
        self.decay: RankDecay | None = None
        self.step = 0
        self.history: list[tuple[int, float]] = []  # (step, mean loss of the steps since the last entry)
        self._sums: list[float] = []
        self._order: tuple[int, list[list[int]]] = (-1, [])
        self._sizes: dict[str, float] = {}  # mean step size of the layers with adapters
        self._start()
        self._main = self._optimizer(_main_groups(layers, self.chosen, settings, self._sizes))
        keep_unused_rows(self._main, _grouped_clips(layers) if settings.clip_lr else [])
        self._side = self._optimizer(_auxiliary_groups(layers, settings))
        if not self._main.param_groups and not self._side.param_groups:
            raise NothingTrained(
                "nothing is trained: there is no parameter with a learning rate", where="finetune"
            )

    def train(
        self, after: Callable[[Finetuner, float], None] | None = None, until: int | None = None
    ) -> None:
        """Runs the steps that are left, or those before `until`. after: called with (this, loss) behind every step.

        Raises AttarError when a loss is not finite; the parameters are those of the step before then.
        """
        last = self.settings.steps if until is None else min(until, self.settings.steps)
        with torch.enable_grad():
            while self.step < last:
                loss = self._update()
                self._note(loss)
                if after is not None:
                    after(self, loss)
        self._decay()  # the last phase may end with the last step

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """(tensors, JSON-able rest), from which `restore` goes on as if nothing had been stopped."""
        tensors = {name: p.detach() for name, p in self._trained().items()}
        names = {id(p): name for name, p in self._trained().items()}
        for optimizer in (self._main, self._side):
            for parameter, slots in optimizer.state.items():
                for slot, value in slots.items():
                    tensors[f"{slot} of {names[id(parameter)]}"] = value
        return tensors, {"step": self.step, "history": self.history, "sums": self._sums}

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor], rest: Mapping[str, Any]) -> None:
        """Takes the state of a run with the same settings. Raises AttarError for any other."""
        for name, layer in self._open.items():
            if layer.auxiliary is not None:
                up, down = (tensors.get(f"{name}.auxiliary.{part}") for part in ("up", "down"))
                layer.auxiliary = (
                    None
                    if up is None or down is None
                    else LowRankTerm(up.to(layer.weight), down.to(layer.weight))
                )
        self._side = self._optimizer(_auxiliary_groups(self.layers, self.settings))
        trained = self._trained()
        known = {name for name in tensors if " of " not in name}
        if known != set(trained) or any(tensors[name].shape != p.shape for name, p in trained.items()):
            raise AttarError(
                "the stored training state is of other parameters", fix="Delete it and run again"
            )
        for name, parameter in trained.items():
            parameter.copy_(tensors[name])
        optimizers = {id(p): o for o in (self._main, self._side) for p in _parameters(o)}
        for name, value in tensors.items():
            slot, _, of = name.partition(" of ")
            if of:
                parameter = trained[of]
                optimizers[id(parameter)].state[parameter][slot] = value.clone().to(parameter.device)
        self.step = rest["step"]
        self.history, self._sums = [(int(s), float(x)) for s, x in rest["history"]], list(rest["sums"])

    # -------------------------------------------------------------------------------------------- one step

    def _update(self) -> float:
        self._decay()
        factor = _factor(self.settings, self.step)
        for optimizer in (self._main, self._side):
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * factor
        batch = [(call, target, None) for call, target in map(self.samples.__getitem__, self._places())]
        try:
            call, target, _ = join(batch)
        except AttarError as error:  # texts of unequal length
            fix = f"Set it to {len(self.groups[0])}, or give prompts of equal length"
            raise AttarError(f"{error.what} ({error.where})", where="finetune.batch_size", fix=fix) from error
        value = self._loss(self.run(call), target, len(batch))
        loss = value.item()
        if not math.isfinite(loss):
            raise AttarError(
                f"the loss at step {self.step + 1} is {loss}",
                where="finetune",
                fix="Lower the learning rates, or train less of the model",
            )
        parameters = [*_parameters(self._main), *_parameters(self._side)]
        for parameter in parameters:
            parameter.grad = None
        value.backward()
        if self.settings.max_norm is not None:
            nn.utils.clip_grad_norm_(parameters, self.settings.max_norm)
        self._main.step()
        self._side.step()
        self.step += 1
        return loss

    def _loss(self, prediction: Streams, target: Streams, count: int) -> Tensor:
        """Of a batch of `count` samples."""
        target, prediction = dict(like(target, prediction)), dict(prediction)
        if self.relation is None:
            return self.loss(prediction, target)
        ours, full = prediction.pop(FEATURES), target.pop(FEATURES)
        return self.loss(prediction, target) + self.relation(ours, full, count, self.step)

    def _decay(self) -> None:
        if self.decay is not None and decay(self._open, self.decay, self.step):
            # the moments of the old factors mean nothing for the new ones
            self._side = self._optimizer(_auxiliary_groups(self.layers, self.settings))

    def _places(self) -> list[int]:
        """The samples of this step: each epoch has an order of its own, and leaves out what fills no batch."""
        size = max(1, self.settings.batch_size // len(self.groups[0]))
        counts = {part: self.parts.count(part) for part in sorted(set(self.parts))}
        sizes = {part: min(size, count) for part, count in counts.items()}
        epoch, place = divmod(self.step, sum(counts[part] // sizes[part] for part in counts))
        if self._order[0] != epoch:
            self._order = epoch, self._batches(epoch, sizes)
        return [i for k in self._order[1][place] for i in self.groups[k]]

    def _batches(self, epoch: int, sizes: Mapping[int, int]) -> list[list[int]]:
        """The batches of an epoch, as places in `groups`. sizes: of the batches of each part."""
        generator = torch.Generator().manual_seed(seed_of(self.seed, "order", str(epoch)))
        order = torch.randperm(len(self.groups), generator=generator).tolist()
        batches = []
        for part, size in sizes.items():
            own = [k for k in order if self.parts[k] == part]
            batches += [own[start : start + size] for start in range(0, len(own) - size + 1, size)]
        if len(sizes) == 1:
            return batches
        return [batches[k] for k in torch.randperm(len(batches), generator=generator).tolist()]

    def _note(self, loss: float) -> None:
        self._sums.append(loss)
        if self.step % max(1, self.settings.steps // 100) == 0 or self.step == self.settings.steps:
            self.history.append((self.step, sum(self._sums) / len(self._sums)))
            self._sums = []

    # ------------------------------------------------------------------------------------- what is trained

    def _start(self) -> None:
        settings = self.settings
        chosen = {name: layer for name, layer in self.chosen.items() if name in self._open}
        for name, layer in chosen.items():
            assert isinstance(layer, QuantizedLinear)
            if settings.weight_lr:  # a copy of its own, exact enough for small updates
                layer.weight = nn.Parameter(layer.weight.detach().float().clone())
            if settings.bias_lr and layer.bias is not None:
                layer.bias = nn.Parameter(layer.bias.detach().float().clone())
            if settings.adapter_rank:
                # before there is an adapter, which may come from an SVD: that gives no two runs the same bits
                self._sizes[name] = layer.baked_weight()[1].abs().mean().item()
                rank = min(settings.adapter_rank, *layer.weight.shape)
                lost = None if settings.adapter_start == "zero" else _round_base(layer)
                if lost is not None and settings.adapter_start == "error":
                    term = LowRankTerm.leading(lost, rank)
                    layer.adapter = LowRankTerm(term.up, layer.to_original(term.down))
                else:
                    generator = torch.Generator().manual_seed(seed_of(self.seed, name, "adapter"))
                    layer.adapter = LowRankTerm.nothing(layer.weight.detach().float(), rank, generator)
        if settings.auxiliary_rank:
            self.decay = RankDecay(settings.auxiliary_rank, settings.steps, settings.auxiliary_keep)
            start_auxiliary({name: self._open[name] for name in chosen}, settings.auxiliary_rank)

    def _trained(self) -> dict[str, nn.Parameter]:
        """Every trained parameter by its name."""
        taken = {id(p) for p in (*_parameters(self._main), *_parameters(self._side))}
        return {
            f"{name}.{path}": parameter
            for name, layer in self.layers.items()
            for path, parameter in layer.named_parameters()
            if id(parameter) in taken
        }

    def _optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        if groups:
            return torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
        idle = torch.optim.AdamW([nn.Parameter(torch.zeros(0))])
        idle.param_groups.clear()
        return idle


def _parts(groups: Sequence[Sequence[int]], parts: Sequence[int] | None) -> list[int]:
    """The part of each group of samples. AttarError where one has samples of several."""
    found = [{0} if parts is None else {parts[i] for i in group} for group in groups]
    if any(len(own) > 1 for own in found):
        raise AttarError("samples that stay together are of several groups of steps", where="finetune")
    return [own.pop() for own in found]


@torch.no_grad()
def _round_base(layer: QuantizedLinear) -> Tensor:
    """W becomes Ŵ, whose codes are the same; returns what is lost, W - Ŵ in the basis in which the layer quantizes.

    Ŵ ends where W was clipped, so clipping opens again, or it would cut a second time and the codes would move. What
    a shifted input's mean loses by it goes into the bias.
    """
    weight = layer.transformed_weight()
    rounded = layer.rounded(weight)
    former, layer.weight = layer.weight, nn.Parameter(layer.to_original(rounded), requires_grad=False)
    if layer.shift is not None:
        lost = (former.float() - layer.weight.float()) @ layer.shift
        layer.bias = nn.Parameter(lost if layer.bias is None else layer.bias + lost, requires_grad=False)
    if layer.quantizer.clip_logit is not None:
        layer.quantizer.clip_logit.fill_(math.log(OPEN / (1 - OPEN)))
    return weight - rounded


def _parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _main_groups(
    layers: Mapping[str, Layer],
    chosen: Mapping[str, Layer],
    settings: FinetuneSettings,
    sizes: Mapping[str, float],
) -> list[dict[str, Any]]:
    opened = [layer for layer in layers.values() if isinstance(layer, QuantizedLinear)]
    packed = [layer for layer in layers.values() if isinstance(layer, ScaledCodes)]
    weights = [layer.weight for layer in chosen.values() if isinstance(layer, QuantizedLinear)]
    clips = [p for layer in opened for p in layer.clip_parameters()]
    clips += [layer.clip for layer in packed if layer.clip is not None]
    groups = [
        (weights, settings.weight_lr, settings.weight_decay),
        ([layer.bias for layer in chosen.values() if layer.bias is not None], settings.bias_lr, 0.0),
        (clips, settings.clip_lr, 0.0),
        ([p for layer in opened for p in layer.level_parameters()], settings.level_lr, 0.0),
        ([layer.log_scale for layer in packed], settings.scale_lr, 0.0),
    ]
    for name, layer in chosen.items():
        if isinstance(layer, QuantizedLinear) and layer.adapter is not None:
            terms: list[Any] = [layer.adapter.up, layer.adapter.down]
            groups.append((terms, sizes[name] * settings.adapter_lr, 0.0))
    return [
        {"params": parameters, "peak": rate, "lr": rate, "weight_decay": rest}
        for parameters, rate, rest in groups
        if parameters and rate
    ]


def _grouped_clips(layers: Mapping[str, Layer]) -> list[nn.Parameter]:
    """Clipping factors with a row for each group of steps."""
    return [p for layer in layers.values() for p in layer.group_parameters()]


def _auxiliary_groups(layers: Mapping[str, Layer], settings: FinetuneSettings) -> list[dict[str, Any]]:
    opened = [layer for layer in layers.values() if isinstance(layer, QuantizedLinear)]
    terms = [layer.auxiliary for layer in opened if layer.auxiliary is not None]
    if not terms or not settings.auxiliary_lr:
        return []
    rate, parameters = settings.auxiliary_lr, [p for term in terms for p in (term.up, term.down)]
    return [{"params": parameters, "peak": rate, "lr": rate, "weight_decay": 0.0}]


def _factor(settings: FinetuneSettings, step: int) -> float:
    """Share of the learning rates in a step, counted from 0."""
    warm = round(settings.warmup * settings.steps)
    if step < warm:
        return (step + 1) / warm
    progress = (step - warm) / (settings.steps - warm)
    return 1 - progress if settings.schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
