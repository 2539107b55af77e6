"""The first block of a tiny model, to be quantized."""

import torch
from support import tiny

from attar.calibration.catch import catch_block_calls
from attar.losses import mse, relative_error
from attar.models.adapter import ModelAdapter
from attar.models.block import run_block
from attar.quantize.block import quantize_block
from attar.quantize.plan import Rules, plan_layers


class Case:
    """The first block of a tiny model with four calls of it. offset: of its modulation's shifts."""

    def __init__(self, name="wan", offset=0.0):
        make, call = tiny.MODELS[name]
        model = make().requires_grad_(False)
        adapter = ModelAdapter.of(model)
        if offset:
            table = adapter.blocks[0].module.scale_shift_table
            pattern = torch.randn(table.shape[-1], generator=torch.Generator().manual_seed(0))
            table[:, [0, 3]] += offset * pattern
        self.calls = catch_block_calls(model, adapter, 0, [call(model, seed=i) for i in range(4)])
        self.block = adapter.blocks[0]
        plans = plan_layers(adapter.linears(self.block), [], Rules(4, 6))
        self.plans = {p.name.removeprefix(f"{self.block.name}."): p for p in plans}
        self.targets = [self.run(call) for call in self.calls]

    @torch.no_grad()
    def error(self):
        pairs = zip(self.calls, self.targets, strict=True)
        errors = [relative_error(self.run(c), t, c.streams).item() for c, t in pairs]
        return sum(errors) / len(errors)

    def run(self, call):
        return run_block(self.block.module, call, self.block.outputs)

    def quantize(self, settings, data=True, **options):
        calls, targets = (self.calls, self.targets) if data else ([], [])
        return quantize_block(
            self.block.module, self.plans, self.run, calls, targets, settings,
            loss=lambda p, t, c: mse(p, t), **options,
        )  # fmt: skip
