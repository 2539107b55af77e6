"""Gates on one Wan block with planted outlier channels: what learning has to improve, in which order."""

import copy

import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanTransformerBlock
from torch import nn

from attar.losses import mse, relative_error
from attar.models.block import BlockCall, run_block
from attar.quantize.initialize import TransformSettings, build_transforms, collect_input_stats
from attar.quantize.linear import QuantizedLinear, parameter_groups, quantized_linears, replace_module
from attar.quantize.reconstruct import ReconstructionSettings, reconstruct_block
from attar.quantize.rounding import collect_hessians, gptq
from attar.runtime import use_backend

DIM, TOKENS, TEXT = 64, 48, 32
OUTLIERS = torch.tensor([5, 23, 50])


def plant_outliers(block, factor=20.0):
    """Three channels of every norm's output become `factor` times larger; the next weights undo it."""
    with torch.no_grad():
        for linear in (m for m in block.modules() if isinstance(m, nn.Linear)):
            # heavy tails, as trained weights have: the uniform start would make any rotation a loss
            linear.weight.copy_(heavy_tailed(linear.weight.shape) * linear.in_features**-0.5)
        block.scale_shift_table.mul_(0.3)
        for row, linears in ((1, ("attn1.to_q", "attn1.to_k", "attn1.to_v")), (4, ("ffn.net.0.proj",))):
            # norm · (1 + scale) + shift, with scale and shift from the table only at these channels
            block.scale_shift_table[0, row, OUTLIERS] = factor - 1
            block.scale_shift_table[0, row - 1, OUTLIERS] *= factor
            for name in linears:
                block.get_submodule(name).weight[:, OUTLIERS] /= factor
        block.norm2.weight[OUTLIERS] *= factor
        block.norm2.bias[OUTLIERS] *= factor
        block.attn2.to_q.weight[:, OUTLIERS] /= factor


def heavy_tailed(shape, generator=None):
    """Laplace noise of unit variance."""
    uniform = torch.rand(shape, generator=generator) - 0.5
    return -uniform.sign() * (1 - 2 * uniform.abs()).clamp_min(1e-6).log() / 2**0.5


def make_calls(count, seed):
    generator = torch.Generator().manual_seed(seed)
    calls = []
    mix = torch.randn(DIM, DIM, generator=torch.Generator().manual_seed(99)) / 8  # tokens share a covariance
    for _ in range(count):
        temb = 0.3 * torch.randn(1, 6, DIM, generator=generator)
        temb[:, [0, 1, 3, 4]] = temb[:, [0, 1, 3, 4]].index_fill(2, OUTLIERS, 0)
        hidden = heavy_tailed((1, TOKENS, DIM), generator) @ (mix + torch.eye(DIM)) + 0.3
        text = torch.randn(1, TEXT, DIM, generator=generator) @ mix.T + 0.2
        constants = {"encoder_hidden_states": text, "temb": temb, "rotary_emb": None}
        calls.append(BlockCall({"hidden_states": hidden}, constants))
    return calls


class Case:
    def __init__(self, seed):
        torch.manual_seed(seed)
        self.block = WanTransformerBlock(DIM, 4 * DIM, 4, cross_attn_norm=True).eval().requires_grad_(False)
        plant_outliers(self.block)
        self.train, self.test = make_calls(8, seed), make_calls(4, seed + 1000)
        self.train_targets = [self.run(self.block, c) for c in self.train]
        self.test_targets = [self.run(self.block, c) for c in self.test]

    @staticmethod
    def run(block, call):
        return run_block(block, call, ("hidden_states",))

    def quantize(self, settings, bits=(4, 4), clip=True):
        block = copy.deepcopy(self.block)
        linears = {name: m for name, m in block.named_modules() if isinstance(m, nn.Linear)}
        stats = collect_input_stats(lambda c: self.run(block, c), self.train, linears)
        generator = torch.Generator().manual_seed(0)
        for name, linear in linears.items():
            transforms = build_transforms(linear, stats[name], settings, generator)
            layer = QuantizedLinear(linear, *bits, transforms, weight_clip=clip, act_clip=clip)
            replace_module(block, name, layer)
        return block

    def learn(self, block, groups=("transform", "clip"), epochs=15):
        parameters = parameter_groups(block.modules())
        return reconstruct_block(
            lambda c: self.run(block, c),
            self.train,
            self.train_targets,
            {name: parameters[name] for name in groups},
            ReconstructionSettings(epochs=epochs),
            lambda p, t, c: mse(p, t),
            generator=torch.Generator().manual_seed(0),
            validation=(self.test, self.test_targets, None),
        )

    @torch.no_grad()
    def error(self, block):
        errors = [
            relative_error(self.run(block, c), t, c.streams).item()
            for c, t in zip(self.test, self.test_targets, strict=True)
        ]
        return sum(errors) / len(errors)


@pytest.fixture(scope="module", params=[0, pytest.param(1, marks=pytest.mark.slow)])
def case(request):
    with torch.no_grad():
        return Case(request.param)


@pytest.mark.slow
def test_each_part_of_the_learned_transform_lowers_the_error(case):
    kinds = {
        "nearest": TransformSettings(scale=False, rotation="none"),
        "rotation": TransformSettings(scale=False, rotation="hadamard"),
        "scale": TransformSettings(rotation="none"),
        "both": TransformSettings(rotation="hadamard"),
    }
    errors = {kind: case.error(case.quantize(settings, clip=False)) for kind, settings in kinds.items()}
    clipped = case.quantize(TransformSettings(rotation="hadamard"))
    case.learn(clipped, groups=("clip",))
    errors["clipping"] = case.error(clipped)
    trained = case.quantize(TransformSettings())
    case.learn(trained)
    errors["everything"] = case.error(trained)
    order = list(errors)
    assert sorted(errors, key=errors.__getitem__, reverse=True) == order, errors


def test_reconstruction_lowers_the_held_out_error(case):
    block = case.quantize(TransformSettings())
    result = case.learn(block)
    assert result.error_after < result.error_before
    assert result.validation_after < result.validation_before


@pytest.mark.slow
def test_learned_clipping_helps_at_four_bits_and_is_neutral_at_eight(case):
    ratios = {}
    for bits, epochs in ((4, 12), (8, 40)):  # 0.982 is too tight a start for 8 bits and takes longer to leave
        plain = case.quantize(TransformSettings(scale=False, rotation="hadamard"), (bits, bits), clip=False)
        clipped = case.quantize(TransformSettings(scale=False, rotation="hadamard"), (bits, bits))
        case.learn(clipped, groups=("clip",), epochs=epochs)
        ratios[bits] = case.error(clipped) / case.error(plain)
    assert ratios[4] < 0.95 and ratios[8] < 1.05, ratios


def test_gptq_lowers_the_held_out_error_of_layers_on_average_and_of_the_block(case):
    block = case.quantize(TransformSettings(rotation="hadamard"))
    layers = quantized_linears(block)
    hessians = collect_hessians(lambda c: case.run(block, c), case.train, layers)
    fresh = collect_hessians(lambda c: case.run(block, c), case.test, layers)
    before, gains, best = case.error(block), [], {}
    for name, layer in layers.items():
        weight, scale = layer.baked_weight(clipped=True)
        codes = best[name] = gptq(weight, hessians[name], scale, 4)
        errors = []
        for chosen in (None, codes):
            layer.freeze(chosen)
            difference = layer._frozen.weight - weight
            errors.append(((difference @ fresh[name]) * difference).sum())
            layer.unfreeze()
        gains.append((errors[1] / errors[0]).item())
    for name, layer in layers.items():
        layer.freeze(best[name])
    assert sum(gains) / len(gains) < 0.85, gains
    assert case.error(block) < 0.9 * before


def test_baking_the_trained_block_keeps_its_output(case):
    block = case.quantize(TransformSettings(), bits=(4, 6))
    case.learn(block, epochs=2)
    layers = quantized_linears(block)
    for layer in layers.values():
        layer.freeze()
    with torch.no_grad():
        frozen = case.run(block, case.test[0])["hidden_states"]
        for name, layer in layers.items():
            replace_module(block, name, layer.bake())
        own = case.run(block, case.test[0])["hidden_states"]
        with use_backend("reference"):
            packed = case.run(block, case.test[0])["hidden_states"]
    assert (packed - frozen).norm() / frozen.norm() < 1e-3
    assert (own - frozen).norm() / frozen.norm() < 5e-3  # rotations of bfloat16 for 6-bit codes, with AMX
