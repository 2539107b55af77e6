"""The compression of one transformer, or of an autoencoder's decoder: its samples, then block after block, with
everything finished kept on disk."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from attar import ranks
from attar.calibration.score import score_candidates
from attar.calibration.select import ScoreTable, select, selection_histogram
from attar.errors import AttarError
from attar.job import Job
from attar.losses import BlockLoss, TemporalTerm, joint_token_weights, mass_concentration, weight_percentiles
from attar.models.adapter import Block, TokenGrid, evaluating
from attar.models.attention_mass import attention_mass
from attar.models.block import BlockCall
from attar.models.types import give_types, types_kept
from attar.models.weights import fill
from attar.quantize.block import quantize_block
from attar.quantize.block_settings import BlockSettings
from attar.quantize.frame_gate import KEY, FrameGrid
from attar.quantize.initialize import TransformSettings
from attar.quantize.plan import LayerPlan, open_planned
from attar.runtime.step_groups import ARGUMENT, StepGroups, choose_group, follow_steps
from attar.samples import Calls, Sample, SegmentStarts, catch_samples, traced_groups
from attar.settings import block_settings, has_groups
from attar.stored import (
    OUTSIDE,
    block_file,
    read_boundary,
    read_layers,
    remove_boundary,
    restore_block,
    save_block,
    write_boundary,
)
from attar.synthesis import read_samples

LAMBDA_PERCENTILES = (5, 25, 50, 75, 90, 95, 99)


class ComponentJob(Job):
    """Compresses a transformer block after block. One block is open at a time, wherever its weights come from.

    Several processes make every block together; each holds its share of the calibration samples.
    """

    def __init__(self, *job: Any) -> None:
        """The arguments of `Job`."""
        super().__init__(*job)
        self.settings = block_settings(self.recipe)
        self.grid: TokenGrid | None = None  # where the loss looks at frames
        self.frames: FrameGrid | None = None  # where branches have gates over them
        learned = self.recipe.reconstruct
        self.propagates = learned is not None and learned.propagate == "quant"
        self.groups: StepGroups | None = None  # of steps, where activations have bits or clipping by them

    def run(self, prompts: int) -> dict[str, Any]:
        """Compresses the transformer; returns its part of the evidence. prompts: how many were traced."""
        self.transformer.requires_grad_(False).eval()
        if has_groups(self.plan.values(), self.settings):
            found = traced_groups(self.store, self.name, prompts, self.recipe.quantize.step_groups)
            self.groups = found[0]
            follow_steps(self.transformer, self.groups)
        evidence: dict[str, Any] = {}
        calls: list[Sample] = []
        if self.recipe.needs_data:
            calls, samples = self._samples(prompts)
            evidence |= samples
            example = ranks.first(lambda: calls[0][0])
            self.adapter.observe(example)
            learned = self.recipe.reconstruct
            if learned is not None and learned.epochs and learned.temporal_weight:
                self.grid = self.adapter.token_grid(example)
            branch = self.recipe.quantize.branch
            if branch is not None and branch.gate != "none":
                grid = self.adapter.token_grid(example)
                self.frames = FrameGrid(grid.frames, grid.tokens)
        blocks = self.adapter.blocks
        first = ranks.first(self._first_unfinished)
        starts = self._segment_starts(calls, first)
        evidence["blocks"] = results = []
        full: Calls = []
        quantized: Calls = []
        with self.progress.task(f"{self.name}: quantize", len(blocks)) as advance:
            for block in blocks:
                if block.index in starts:
                    full = starts.take(block.index)
                    # later segments start behind glue that only a run of the model applies
                    quantized = self._catch(block, calls) if self.propagates and block.index else full
                boundary, file = self._boundary(block.index), self._file(block.index)
                if block.index < first:
                    result = restore_block(self.workspace, file, block.module)
                    remove_boundary(self.workspace, boundary)  # a kill may have left it
                else:
                    if block.index == first and ranks.first(partial(self.workspace.has, boundary)):
                        full, quantized = read_boundary(self.workspace, boundary, full, quantized)
                    with self.weights.opened(block.module):
                        result, full, quantized = self._make(block, full, quantized, advance)
                self.weights.replaced(block.module, partial(read_layers, self.workspace, file))
                results.append(result)
                note = block.name
                if result["error_before"] is not None:
                    note = f"{block.name} error {result['error_before']:.4f} → {result['error_after']:.4f}"
                advance(block.index + 1, note)
        starts.end()
        self._outside()
        return evidence

    def _outside(self) -> None:
        """Linears outside the blocks that an override asks for: weights only, rounded to nearest, no data needed."""
        inside = tuple(f"{block.name}." for block in self.adapter.blocks)
        plans = {name: plan for name, plan in self.plan.items() if not name.startswith(inside)}
        plain = BlockSettings(
            TransformSettings(scale=False, rotation="none"), weight_clip=False, act_clip=False
        )
        file = f"{self.name}/{OUTSIDE}"
        if plans and self.workspace.has(file):
            restore_block(self.workspace, file, self.transformer)
            fill(self.transformer, read_layers(self.workspace, file).get, self.device)
        elif plans:
            outcome = quantize_block(
                self.transformer, plans, lambda call: {}, [], [], plain, loss=BlockLoss()
            )
            save_block(self.workspace, file, outcome.layers, {})

    # -- what is there already

    def _first_unfinished(self) -> int:
        """The block to go on with: all before it are finished, and its inputs are on disk or can be caught."""
        first, count = 0, len(self.adapter.blocks)
        while first < count and self.workspace.has(self._file(first)):
            first += 1
        if self.recipe.needs_data and first < count:
            heads = {segment[0].index for segment in self.adapter.segments}
            while first not in heads and not self.workspace.has(self._boundary(first)):
                first -= 1  # someone removed files: blocks behind the last known inputs are made again
        return first

    def _segment_starts(self, calls: list[Sample], first: int) -> SegmentStarts:
        """Inputs of the first block of each unfinished segment."""
        segments = self.adapter.segments if calls else []
        heads = [segment[0] for segment in segments if segment[-1].index >= first]
        return SegmentStarts(
            self.transformer, self.adapter, heads, calls, self.workspace, self.name, self.groups
        )

    def _samples(self, prompts: int) -> tuple[list[Sample], dict[str, Any]]:
        """This process's calibration samples, and how they came to be."""
        if self.recipe.synthesize is not None:
            made, known = read_samples(self.name, self.transformer, self.workspace)
            return list(ranks.mine(made)), {"synthesis": known}
        table, chosen = self._selection(prompts)
        assert self.recipe.select is not None
        self._check_groups({table.step[i]: table.prompt[i] for i in chosen})
        calls = [self.store.calls(self.name, table.prompt[i], table.step[i]) for i in ranks.mine(chosen)]
        evidence = {
            "policy": self.recipe.select.policy,
            "table": vars(table),
            "chosen": chosen,
            "histogram": selection_histogram(table, chosen),
        }
        return calls, {"selection": evidence}

    def _check_groups(self, chosen: dict[int, int]) -> None:
        """Each group of steps with clipping of its own is learned on some sample. chosen: steps, each with a prompt."""
        if self.groups is None or self.settings.clip_groups is None:
            return
        steps = (self.store.calls(self.name, prompt, step)[0] for step, prompt in chosen.items())
        left = set(range(self.groups.count)) - {self.groups.group(call.get(ARGUMENT)) for call in steps}
        if left:
            raise AttarError(
                f"no calibration sample is of group {min(left)} of {self.groups.count} groups of steps, so its "
                "clipping cannot be learned",
                where=f"{self.name}: quantize.clip_by_group",
                fix="Choose more samples (select.count), or evenly over the steps (select.policy uniform_steps)",
            )

    def _selection(self, prompts: int) -> tuple[ScoreTable, list[int]]:
        """The score table and the chosen rows, from the workspace where they are there already."""
        chosen_by, file = self.recipe.select, f"{self.name}/selection.json"
        assert chosen_by is not None
        known = ranks.first(lambda: self.workspace.read_json(file))
        if known is None:
            with self.progress.task(f"{self.name}: score candidates", 1) as advance:
                table = score_candidates(
                    self.store, list(range(prompts)), self.name, self.adapter,
                    features=chosen_by.features, norm=chosen_by.norm, neighbour=chosen_by.neighbour,
                    normalise=chosen_by.normalise,
                    progress=lambda done, total: advance(done / total, f"{done} of {total}"),
                )  # fmt: skip
            try:
                chosen = select(
                    chosen_by.policy, table, chosen_by.count, self.seed,
                    cap_per_prompt=chosen_by.cap_per_prompt, cap_per_step=chosen_by.cap_per_step,
                )  # fmt: skip
            except AttarError as error:  # of two experts, one may have run in a few steps only
                raise AttarError(error.what, where=self.name, fix=error.fix) from error
            known = {"table": vars(table), "chosen": chosen}
            if ranks.is_first():
                self.workspace.write_json(file, known)
        return ScoreTable(**known["table"]), known["chosen"]

    # -- one block

    def _catch(self, block: Block, calls: list[Sample]) -> Calls:
        if not calls:
            return []
        hold = self.workspace.hold
        return catch_samples(self.transformer, self.adapter, block, calls, self.groups, hold)

    def _make(
        self, block: Block, full: Calls, quantized: Calls, advance: Callable[..., None]
    ) -> tuple[dict[str, Any], Calls, Calls]:
        """Quantizes the block and saves it; returns its result and the calls of the next block."""
        prefix = f"{block.name}."
        plans = {name.removeprefix(prefix): p for name, p in self.plan.items() if name.startswith(prefix)}
        open_planned(block.module, plans)
        with types_kept(block.module) as dtypes:
            return self._made(block, plans, dtypes, full, quantized, advance)

    def _made(
        self,
        block: Block,
        plans: dict[str, LayerPlan],
        dtypes: dict[str, torch.dtype],
        full: Calls,
        quantized: Calls,
        advance: Callable[..., None],
    ) -> tuple[dict[str, Any], Calls, Calls]:
        """`_make` of a block with types that are given back."""
        module = block.module
        if full:
            module.float()  # learned in float32 whatever the model is stored in

        def runner(call: BlockCall) -> dict[str, Tensor]:
            if call.group is not None:
                choose_group(module, call.group)
            return self.arithmetic.run(module, call, block.outputs)

        targets, contexts, masses = self._targets(block, full)

        def step(epoch: int, done: int, loss: float) -> None:
            epochs = self.settings.epochs
            advance(
                block.index + min(0.99, epoch / epochs),
                f"{block.name} epoch {epoch}/{epochs} loss {loss:.2e}",
            )

        try:
            outcome = quantize_block(
                module, plans, runner, quantized, targets, self.settings,
                loss=self._loss(block), contexts=contexts, seed=f"{self.seed}/{self.name}/{block.name}", progress=step,
                frames=self.frames, types=self.deployed(dtypes, f"{block.name}."),
            )  # fmt: skip
        except AttarError as error:
            raise AttarError(
                error.what, where=error.where or f"{self.name}.{block.name}", fix=error.fix
            ) from error
        if block.index == 0 and outcome.gates and not any(outcome.gates.values()):
            raise AttarError(  # now, and not behind hours of calibration
                "no layer of the first block reads the video's tokens alone, so none can have a gate over frames",
                where=KEY,
                fix="Set it to none",
            )
        full = following = [call.with_streams(t) for call, t in zip(full, targets, strict=True)]
        if self.propagates:
            with torch.no_grad():
                following = [call.with_streams(self.workspace.hold(runner(call))) for call in quantized]
        give_types(module, dtypes)
        for name, layer in outcome.layers.items():
            layer.to(dtypes.get(f"{name}.weight", layer.compute_dtype))  # with a branch, which is new
        learning = outcome.learning
        result = {
            "block": block.name,
            "error_before": outcome.error_before,
            "error_after": outcome.error_after,
            "loss": None if learning is None else [learning.error_before, *learning.history],
            "rolled_back": None if learning is None else learning.rolled_back,
            "stopped": None if learning is None else learning.stopped,
            "attention": masses,
        }
        result |= self.arithmetic.evidence
        result |= {"rotations": outcome.rotations} if outcome.rotations else {}
        result |= {"frame_gates": outcome.gates} if outcome.gates else {}
        if outcome.rounding is not None:
            result["rounding_loss"] = [outcome.rounding.error_before, *outcome.rounding.history]
        # the next block's inputs first: a block that is on disk always has its successor's inputs beside it
        if full and self.adapter.segment_of(block)[-1] is not block:
            write_boundary(
                self.workspace, self._boundary(block.index + 1), full, following if self.propagates else None
            )
        save_block(self.workspace, self._file(block.index), outcome.layers, result)
        remove_boundary(self.workspace, self._boundary(block.index))
        ranks.barrier()  # a streamed block is read again from its file
        return result, full, following

    def _targets(
        self, block: Block, calls: Calls
    ) -> tuple[list[dict[str, Tensor]], list[Any] | None, dict[str, Any] | None]:
        """Full-precision outputs of the block, and for token weighting the λ of every sample with their statistics."""
        learned = self.recipe.reconstruct
        if learned is None or not learned.epochs or learned.loss != "token_weighted":
            with evaluating(block.module):
                outputs = [
                    self.workspace.hold(self.arithmetic.run(block.module, c, block.outputs)) for c in calls
                ]
            return outputs, None, None
        targets, contexts, shares = [], [], []
        with evaluating(block.module):
            for call in calls:
                with attention_mass(self.adapter, block) as mass:
                    targets.append(
                        self.workspace.hold(self.arithmetic.run(block.module, call, block.outputs))
                    )
                found = mass.per_stream()
                options = {
                    "low": learned.lambda_min,
                    "high": learned.lambda_max,
                    "cap_quantile": learned.cap_quantile,
                    "over": learned.lambda_over,
                }
                contexts.append(joint_token_weights(found, **options) if found else {})
                if found:
                    shares.append(mass_concentration(torch.cat(list(found.values()), dim=1)))
        shares = ranks.collected(shares)
        if not shares:
            return targets, contexts, None
        flat = [w.flatten().cpu() for context in contexts for w in context.values()]
        weights = torch.cat(ranks.collected(flat))
        curve = [0.0, *torch.stack(shares).mean(0).tolist()]
        return (
            targets,
            contexts,
            {"curve": curve, "weights": weight_percentiles(weights, LAMBDA_PERCENTILES)},
        )

    def _loss(self, block: Block) -> BlockLoss:
        learned = self.recipe.reconstruct
        if learned is None:
            return BlockLoss()
        temporal = None
        if self.grid is not None:
            stream = self.adapter.main_stream(block)
            temporal = TemporalTerm(learned.temporal_weight, stream, self.grid.frames, self.grid.tokens)
        return BlockLoss(learned.loss == "token_weighted", temporal)

    def _file(self, index: int) -> str:
        return f"{self.name}/{block_file(index)}"

    def _boundary(self, index: int) -> str:
        return f"{self.name}/boundary-{index:03d}.safetensors"
