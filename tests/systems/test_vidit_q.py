"""ViDiT-Q (arXiv 2406.02540): static and dynamic balancing of channels, per-token scales, and the recipe."""

import pytest
import torch
from diffusers import DiffusionPipeline
from support import pipelines, tiny
from torch import nn

import attar
from attar.quantize.initialize import build_transforms
from attar.quantize.linear import QuantizedLinear
from attar.quantize.transforms import smooth_scale
from attar.recipe import load_recipe
from attar.runtime.backend import use_backend
from attar.runtime.layers import PackedLinear, packed_layers
from attar.runtime.reference import quantize_tokens
from attar.runtime.transforms import Hadamard
from attar.settings import transform_settings

D = 128
PARTS = {
    "plain": {"quantize.scale": False, "quantize.rotation": "none"},
    "rotation": {"quantize.scale": False},
    "scale": {"quantize.rotation": "none"},
    "both": {},
}


def incoherence(x):
    """μ = max|x| / (‖x‖₂ / √d), mean over rows: 1 is ideal, √d is a single channel."""
    return (x.abs().amax(-1) / x.norm(dim=-1) * x.shape[-1] ** 0.5).mean().item()


def layer_of(linear, seen, part, bits=(4, 4), **changes):
    settings = transform_settings(load_recipe("vidit-q", {**PARTS[part], **changes}))
    absmax = seen.abs().flatten(0, -2).amax(0)
    transforms = build_transforms(linear, absmax, settings, torch.Generator().manual_seed(0))
    return QuantizedLinear(linear, *bits, transforms, weight_clip=False, act_clip=False)


def steps(moving, count=8, tokens=64, seed=0, first=7):
    """Inputs (steps, tokens, D) with one channel 30 times larger: always the same one, or another at each step."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, tokens, D, generator=generator)
    for t in range(count):
        x[t, :, first + 13 * t * moving] *= 30
    return x


@pytest.mark.parametrize("part", PARTS)
def test_without_quantizers_the_layer_is_its_linear(part):
    torch.manual_seed(0)
    linear, x = nn.Linear(D, 48), steps(moving=True)
    layer = layer_of(linear, x, part)
    layer.weight_quant = layer.act_quant = False
    with torch.no_grad():
        expected = linear(x)
        assert ((layer(x) - expected).norm() / expected.norm()).item() < 1e-5


@pytest.mark.parametrize("d", [64, 96, 128, 160, 1152])
def test_the_rotation_is_orthogonal_and_fast(d):
    rotation = Hadamard.random(d, torch.Generator().manual_seed(0))
    dense = rotation(torch.eye(d, dtype=torch.float64))
    torch.testing.assert_close(dense @ dense.mT, torch.eye(d, dtype=torch.float64), rtol=0, atol=1e-6)
    x = torch.randn(5, d, dtype=torch.float64)
    torch.testing.assert_close(rotation(x), x @ dense)


def test_a_scale_removes_what_stays_and_a_rotation_what_moves():
    """The ablation of the paper: μ of a planted outlier channel is near √d, and must come below 3.

    A scale that takes all of the range from the activations, at steps whose outlier is elsewhere if it moves.
    """
    torch.manual_seed(0)
    linear, left = nn.Linear(D, 48), {}
    for moving in (False, True):
        seen, fresh = steps(moving), steps(moving, seed=1, first=7 + moving)
        for part in PARTS:
            layer = layer_of(linear, seen, part, **{"quantize.alpha": 1.0})
            with torch.no_grad():
                left[part, moving] = incoherence(layer.transform_input(fresh.flatten(0, 1)))
    print(left)
    assert left["plain", False] > 8 and left["plain", True] > 8  # √128 = 11.3
    assert left["scale", False] < 3 and left["scale", True] > 8
    assert all(left[part, moving] < 3 for part in ("rotation", "both") for moving in (False, True)), left
    planted = torch.zeros(1, D)
    planted[0, 3] = 30
    rotation = Hadamard.random(D, torch.Generator().manual_seed(0))
    assert incoherence(planted) == pytest.approx(D**0.5)
    assert incoherence(rotation(planted)) == pytest.approx(1)


def test_the_order_of_the_parts():
    """W4A4, output error: with static outliers plain > rotation > scale > both, with moving ones scale > rotation."""
    torch.manual_seed(0)
    linear, errors = nn.Linear(D, 96), {}
    for moving in (False, True):
        seen, fresh = steps(moving, seed=1), steps(moving, seed=2)
        with torch.no_grad():
            expected = linear(fresh)
            for part in PARTS:
                difference = layer_of(linear, seen, part)(fresh) - expected
                errors[part, moving] = (difference.norm() / expected.norm()).item()
    static = [errors[part, False] for part in ("plain", "rotation", "scale", "both")]
    assert static == sorted(static, reverse=True), errors
    assert errors["both", True] < errors["scale", True] and errors["rotation", True] < errors["scale", True]


def test_tokens_of_different_steps_and_branches_do_not_share_a_range():
    torch.manual_seed(0)
    linear = nn.Linear(D, 48)
    x = torch.randn(3, 16, D) * torch.tensor([1.0, 50.0, 1e-3])[:, None, None]
    packed = layer_of(linear, x, "both", (4, 8)).bake()
    together = packed(x)
    for i in range(3):
        assert torch.equal(packed(x[i : i + 1])[0], together[i])
    expected = linear(x)
    per_token = layer_of(linear, x, "plain", (8, 8)).bake()(x)
    step = x.abs().max() / 127  # one scale for all
    per_tensor = linear((x / step).round() * step)
    for i in range(3):
        ours, theirs = ((y[i] - expected[i]).norm() for y in (per_token, per_tensor))
        assert ours < theirs and (i == 1 or ours < 0.1 * theirs)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_sums_of_integers_give_what_rounded_numbers_give_and_do_not_overflow(backend):
    """W8A8: s_a s_w acc + b is the product of the fake-quantized numbers to 1e-5. Both are symmetric here, so the zero
    point times the sum of a row, which the paper adds, is zero. 127 · 127 · 2^16 fits 32 bits."""
    torch.manual_seed(0)
    linear = nn.Linear(D, 48)
    x = torch.randn(20, D)
    layer = layer_of(linear, x, "plain", (8, 8))
    with torch.no_grad(), use_backend(backend):
        packed = layer.bake()
        codes, scale = quantize_tokens(x, 8)
        sums = codes.long() @ packed.numbers().flatten(1).long().T
        expected = sums.double() * scale * packed.weight_scale.flatten() + linear.bias
        torch.testing.assert_close(packed(x).double(), expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(layer(x).double(), expected, atol=1e-5, rtol=0)
        width = 2**16
        full = torch.full((2, width), 127, dtype=torch.int8)
        wide = PackedLinear.from_codes(full, torch.ones(2, 1), 8, None, 8)
        assert wide(torch.full((1, width), 127.0)).tolist() == [[127 * 127 * width] * 2]
        assert 127 * 127 * width < 2**31


def test_the_exponent_is_the_papers():
    """ViDiT-Q multiplies by m = w^α / x^(1-α); attar divides by c = x^a / w^(1-a), so a = 1 - α."""
    x, w = torch.rand(D) + 0.1, torch.rand(D) + 0.1
    alpha = 1 - load_recipe("vidit-q").quantize.alpha
    assert alpha == pytest.approx(0.5665)
    torch.testing.assert_close(1 / smooth_scale(x, w, 1 - alpha), w**alpha / x ** (1 - alpha))
    dead = smooth_scale(x.index_fill(0, torch.tensor([4]), 0), w, 1 - alpha)
    assert 0.1 < dead[4] < 10  # no channel blows up


READ_AGAIN = """
import sys
import torch
from diffusers import DiffusionPipeline
from attar.runtime.backend import use_backend
torch.manual_seed(987)
pipe = DiffusionPipeline.from_pretrained(sys.argv[2])
call = torch.load(sys.argv[3])
with torch.no_grad(), use_backend("reference"):
    output = pipe.transformer(**call, return_dict=False)[0]
torch.save({"output": output, "state": pipe.transformer.state_dict()}, sys.argv[4])
"""


def test_the_recipe_over_a_pipeline(tmp_path, commands):
    """Scale and rotation both change the model; read again under another seed, in this process and in another, it is
    the same, rotations and all."""
    case, found = pipelines.CASES["wan"], {}
    for part in ("both", "scale", "rotation"):
        found[part] = attar.compress(
            pipelines.make("wan"), "vidit-q", prompts=pipelines.PROMPTS[:2],
            overrides={"trace.prompts": 2, "select.count": 3, **PARTS[part]},
            generation={**case.generation, "num_inference_steps": case.steps},
        )  # fmt: skip
    codes = {
        part: torch.cat([layer.codes.flatten() for layer in packed_layers(pipe.transformer).values()])
        for part, pipe in found.items()
    }
    assert not torch.equal(codes["both"], codes["scale"])
    assert not torch.equal(codes["both"], codes["rotation"])
    found["both"].save_pretrained(tmp_path / "small")
    torch.manual_seed(987)
    again = DiffusionPipeline.from_pretrained(tmp_path / "small")
    again.set_progress_bar_config(disable=True)
    pipelines.assert_same_model(found["both"], again, "wan")
    transformer = found["both"].transformer
    call = tiny.wan_call(transformer)
    script, given, made = (tmp_path / name for name in ("read.py", "call.pt", "made.pt"))
    script.write_text(READ_AGAIN)
    torch.save(call, given)
    assert commands.run(script, tmp_path / "small", given, made) == 0
    there = torch.load(made)
    with torch.no_grad(), use_backend("reference"):
        expected = transformer(**call, return_dict=False)[0]
    assert there["state"].keys() == transformer.state_dict().keys()
    assert all(torch.equal(tensor, there["state"][name]) for name, tensor in transformer.state_dict().items())
    torch.testing.assert_close(there["output"], expected, atol=1e-5, rtol=0)
