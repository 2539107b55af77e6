"""What fusion of packed layers with their neighbours gives on this processor, and what more of it could give.

    taskset -c 1 python -m benchmarks.fusion [--shape wan-1.3b] [--tokens 2048] [--rounds 5]

At W8A8, in bfloat16 and on one thread, all in turns: GELU in the epilogue of the up projection against diffusers' two
steps, alone and in a whole block; q, k and v in one layer, which quantizes its input once, against three; channel
scales in a layer against none, which is what folding them into a norm would save. Parts are printed beside the whole
block of their recipe.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from statistics import median

import torch
import torch.nn.functional as F
from diffusers.models.activations import GELU
from torch import Tensor, nn

from attar.bench.subject import BenchBlock, bench_blocks, latent_grid, pack_block
from attar.bench.timing import Ratio, faster, interleave
from attar.forecast.architecture import find_architecture
from attar.forecast.calls import text_length
from attar.recipe import load_recipe
from attar.runtime import PackedLinear
from attar.runtime.gelu import PackedGELU
from attar.runtime.transforms import ChannelScale, Hadamard, Transform

Runs = dict[str, Callable[[], object]]
BITS = {"quantize.weights": 8, "quantize.acts": 8}
RECIPES = ("rtn", "hadamard", "smoothquant", "attar-ptq")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shape", default="wan-1.3b")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    architecture = find_architecture(given.shape)
    text = text_length(architecture, None)
    block = bench_blocks(architecture, latent_grid(architecture, given.tokens), text)[0]
    whole = measure_blocks(block, given.rounds)
    up = next(m.proj for m in block.dense.modules() if isinstance(m, GELU))
    measure_gelu(up, given.tokens, given.rounds)
    measure_rows(up.in_features, given.tokens, text, given.rounds, whole)


def measure_blocks(block: BenchBlock, rounds: int) -> dict[str, float]:
    """Seconds of a whole block by recipe; prints what fused GELU gives to each."""
    runs: Runs = {}
    for name in RECIPES:
        fused = pack_block(block, load_recipe(name, BITS))
        two_steps = copy.deepcopy(fused)
        for module in two_steps.modules():
            if isinstance(module, PackedGELU):
                module.__class__ = GELU
        runs[name] = _running(block, fused)
        runs[f"{name}, two steps"] = _running(block, two_steps)
    seconds = interleave(runs, rounds)
    for name in RECIPES:
        gain = faster(seconds[f"{name}, two steps"], seconds[name])
        print(f"block, {name}: {_ms(seconds[name])} with fused GELU, {_times(gain)}")
    return {name: median(seconds[name]) for name in RECIPES}


def measure_gelu(up: nn.Linear, tokens: int, rounds: int) -> None:
    layer, x = _layer(up.in_features, up.out_features), _input(tokens, up.in_features)
    for approximate in ("tanh", "none"):
        seconds = interleave(
            {
                "fused": lambda a=approximate: layer(x, gelu=a),
                "two steps": lambda a=approximate: F.gelu(layer(x), approximate=a),
                "no GELU": lambda: layer(x),
            },
            rounds,
        )
        gain = faster(seconds["two steps"], seconds["fused"])
        parts = ", ".join(f"{name} {_ms(values)}" for name, values in seconds.items())
        print(f"up projection, GELU {approximate!r}: {parts}, {_times(gain)}")


def measure_rows(width: int, tokens: int, text: int, rounds: int, whole: dict[str, float]) -> None:
    """Three layers on the video and two on the text, against one of all their outputs; and channel scales."""
    chains: dict[str, list[Transform]] = {
        "rtn": [],
        "hadamard": [Hadamard.random(width)],
        "smoothquant": [ChannelScale(torch.rand(width) + 0.5)],
    }
    inputs = {3: _input(tokens, width), 2: _input(text, width)}
    runs: Runs = {}
    for name, chain in chains.items():
        for count, x in inputs.items():
            layers = [_layer(width, width, chain) for _ in range(count)]
            one = _layer(width, count * width, chain)
            runs[f"{name} {count}"] = lambda layers=layers, x=x: [layer(x) for layer in layers]
            runs[f"{name} {count} in one"] = lambda one=one, x=x: one(x)
    seconds = interleave(runs, rounds)
    for name in ("rtn", "hadamard"):
        saved = sum(_more(seconds[f"{name} {n}"], seconds[f"{name} {n} in one"]) for n in inputs)
        print(f"shared rows, {name}: {1e3 * saved:.1f} ms, {100 * saved / whole[name]:.1f} % of the block")
    # Of the layers behind a norm, q, k, v, the query of the cross-attention and the up projection.
    scales = _more(seconds["smoothquant 3"], seconds["rtn 3"]) / 3 * 5
    share = 100 * scales / whole["smoothquant"]
    print(f"channel scales behind norms: {1e3 * scales:.1f} ms, {share:.1f} % of the block")


def _layer(width: int, outputs: int, chain: list[Transform] | None = None) -> PackedLinear:
    codes = torch.randint(-128, 128, (outputs, width), dtype=torch.int8)
    scale, bias = torch.full((outputs, 1), 3e-4), torch.randn(outputs).bfloat16()
    return PackedLinear.from_codes(codes, scale, 8, bias, act_bits=8, transforms=chain or [])


def _input(tokens: int, width: int) -> Tensor:
    return torch.randn(1, tokens, width).bfloat16()


def _running(block: BenchBlock, module: nn.Module) -> Callable[[], object]:
    return lambda: block.run(module)


def _more(longer: list[float], shorter: list[float]) -> float:
    return median(a - b for a, b in zip(longer, shorter, strict=True))


def _ms(seconds: list[float]) -> str:
    return f"{1e3 * median(seconds):.1f} ms"


def _times(gain: Ratio) -> str:
    return f"{gain.value:.3f} times faster ({gain.low:.3f} to {gain.high:.3f})"


if __name__ == "__main__":
    main()
