"""A model of two quantized linears, to be trained in milliseconds."""

import torch
from torch import nn

from attar.models.block import BlockCall
from attar.quantize.finetune import Finetuner, FinetuneSettings
from attar.quantize.linear import QuantizedLinear

WEIGHTS = FinetuneSettings(steps=12, batch_size=2, weight_lr=1e-3)


class Toy:
    """Two linears with a nonlinearity, quantized, and what the original gives on seven samples."""

    def __init__(self, bits=3, acts=4, seed=0, width=16, size=1.0):
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        for linear in (self.model[0], self.model[2]):
            linear.weight.data *= size
        inputs = [torch.randn(1, 5, width) for _ in range(7)]
        with torch.no_grad():
            self.samples = [(BlockCall({"x": x}), {"y": self.model(x)}) for x in inputs]
        self.layers = {n: QuantizedLinear(self.model[int(n)], bits, acts) for n in ("0", "2")}
        for name, layer in self.layers.items():
            self.model[int(name)] = layer

    def run(self, call):
        return {"y": self.model(call.streams["x"])}

    def tuner(self, settings=WEIGHTS, **options):
        return Finetuner(self.run, self.samples, self.layers, settings, **options)

    def error(self):
        with torch.no_grad():
            return sum(float((self.run(c)["y"] - t["y"]).square().mean()) for c, t in self.samples)
