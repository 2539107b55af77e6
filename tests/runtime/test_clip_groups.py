"""Clipping factors by groups of denoising steps in packed models: the pair of the current group is used, and kept."""

import json
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file
from torch import nn

from attar.errors import AttarError
from attar.runtime import packed_layers, quantization_config_of
from attar.runtime.checkpoint import check_config, replace_linears
from attar.runtime.diffusers_integration import mark_compressed, save_transformer
from attar.runtime.integrity import verify_folder
from attar.runtime.layers import PackedLinear
from attar.runtime.size import packed_size
from attar.runtime.step_groups import StepGroups, choose_group, follow_steps

WEIGHTS = "diffusion_pytorch_model.safetensors"
STEPS = StepGroups((500.0,), True)
PAIRS = torch.tensor([[0.9, 0.6], [0.7, 1.0]])
FFN = "blocks.0.ffn.net.2"


def wan(clip, bits=None):
    """One packed block. clip: the pair, or those of groups. bits: of groups, in its feed-forward."""
    torch.manual_seed(0)
    model = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, text_dim=16, freq_dim=32,
        ffn_dim=64, num_layers=1, patch_size=(1, 2, 2),
    ).eval()  # fmt: skip
    for name, linear in list(model.named_modules()):
        if isinstance(linear, nn.Linear) and name.startswith("blocks."):
            scale = linear.weight.detach().abs().amax(1, keepdim=True) / 7
            codes = (linear.weight.detach() / scale).round().to(torch.int8)
            own = bits if bits is not None and "ffn" in name else None
            layer = PackedLinear.from_codes(
                codes, scale, 4, linear.bias.detach(), 6 if own is None else max(own), clip, act_groups=own
            )
            model.set_submodule(name, layer)
    if clip.ndim > 1:
        follow_steps(model, STEPS)
    return mark_compressed(model, "test")


@torch.no_grad()
def run(model, timestep):
    generator = torch.Generator().manual_seed(1)
    return model(
        hidden_states=torch.randn(1, 4, 2, 8, 8, generator=generator), timestep=torch.tensor([timestep]),
        encoder_hidden_states=torch.randn(1, 6, 16, generator=generator), return_dict=False,
    )[0]  # fmt: skip


@pytest.fixture(scope="module")
def grouped():
    return wan(PAIRS)


@pytest.fixture
def saved(grouped, tmp_path):
    save_transformer(grouped, tmp_path / "transformer")
    return tmp_path


def test_each_group_is_a_model_with_its_pair_everywhere(grouped):
    first, second = wan(PAIRS[0]), wan(PAIRS[1])
    for timestep, same, other in ((900.0, first, second), (100.0, second, first), (700.0, first, second)):
        assert torch.equal(run(grouped, timestep), run(same, timestep))
        assert not torch.equal(run(grouped, timestep), run(other, timestep))


def test_equal_pairs_are_the_plain_layer():
    plain, equal = wan(PAIRS[0]), wan(PAIRS[:1].expand(2, 2))
    for timestep in (900.0, 100.0):
        assert torch.equal(run(equal, timestep), run(plain, timestep))


def test_bits_and_clipping_by_the_same_groups():
    both = wan(PAIRS, (8, 4))
    for group, timestep in enumerate((900.0, 100.0)):
        alone = wan(PAIRS[group])
        for name, layer in packed_layers(alone).items():
            layer.act_bits = (8, 4)[group] if "ffn" in name else 6
        assert torch.equal(run(both, timestep), run(alone, timestep))


def test_round_trip_is_bit_exact(grouped, saved):
    assert verify_folder(saved)
    loaded = WanTransformer3DModel.from_pretrained(saved / "transformer")
    for timestep in (900.0, 100.0):
        assert torch.equal(run(loaded, timestep), run(grouped, timestep))
    first, second = grouped.state_dict(), loaded.state_dict()
    assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)
    assert quantization_config_of(loaded) == quantization_config_of(grouped)


def test_the_format_is_a_new_one_only_where_clipping_has_groups(grouped):
    config, plain = quantization_config_of(grouped), quantization_config_of(wan(PAIRS[0]))
    assert config["format_version"] == 8 and plain["format_version"] == 1
    assert [scheme["clip_groups"] for scheme in config["schemes"]] == [2] * len(config["schemes"])
    assert config["step_groups"] == {"thresholds": [500.0], "descending": True}
    assert "step_groups" not in plain and not any("clip_groups" in scheme for scheme in plain["schemes"])


def test_every_pair_is_counted(grouped):
    plain = packed_size(wan(PAIRS[0]))
    assert packed_size(grouped)["scales"] - plain["scales"] == 8 * len(packed_layers(grouped))


@pytest.mark.parametrize("shape", [(2,), (3, 2), (2, 3), (4,)])
def test_damaged_shapes_are_refused(saved, shape):
    path = saved / "transformer" / WEIGHTS
    tensors = load_file(path)
    tensors[f"{FFN}.act_clip"] = torch.ones(shape)
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(AttarError, match=f"act_clip of '{FFN}' is not of 2 groups of steps"):
        verify_folder(saved)
    with pytest.raises(AttarError, match="act_clip"):
        WanTransformer3DModel.from_pretrained(saved / "transformer")


@pytest.mark.parametrize(
    ("change", "says"),
    {
        "three": (lambda c: c["schemes"][0].update(clip_groups=3), "clipping for 3 groups of steps, and 2 are known"),
        "one": (lambda c: c["schemes"][0].update(clip_groups=1), "clipping for 1 groups of steps"),
        "no clipping": (lambda c: c["schemes"][0].update(act_clip=False), "needs activation clipping"),
        "words": (lambda c: c["schemes"][0].update(clip_groups="two"), "clip_groups = 'two'"),
        "yes": (lambda c: c["schemes"][0].update(clip_groups=True), "clip_groups = True"),
        "no groups": (lambda c: c.pop("step_groups"), "and none are known"),
        "an older version": (lambda c: c.update(format_version=7), "not one that this attar knows"),
    }.values(),
)  # fmt: skip
def test_what_is_read_is_checked(grouped, change, says):
    config = json.loads(json.dumps(quantization_config_of(grouped)))
    change(config)
    with torch.device("meta"):
        empty: Any = WanTransformer3DModel.from_config(dict(grouped.config))
    with pytest.raises(AttarError, match=says):
        replace_linears(empty, check_config(config))


def test_layers_that_cannot_be_are_refused(grouped):
    codes, scale = torch.ones(2, 4, dtype=torch.int8), torch.ones(2, 1)
    cases: list[tuple[torch.Tensor, dict[str, Any], str]] = [
        (torch.ones(1, 2), {}, "no number of groups"),
        (torch.ones(2, 3), {}, "for each of 2 groups"),
        (torch.full((2, 2), -1.0), {}, "not negative"),
        (torch.ones(3, 2), {"act_groups": (8, 6)}, "bits of 2 groups of steps do not fit clipping of 3"),
    ]
    for clip, options, says in cases:
        with pytest.raises(AttarError, match=says):
            PackedLinear.from_codes(codes, scale, 4, act_bits=8, act_clip=clip, **options)
    layer = PackedLinear.from_codes(codes, scale, 4, act_bits=8, act_clip=torch.ones(2, 2))
    with pytest.raises(
        AttarError, match="activation clipping in each group of steps, and the step is not known"
    ):
        layer(torch.randn(1, 4))
    with pytest.raises(AttarError, match="no group 2"):
        choose_group(layer, 2)
    choose_group(layer, 1)
    assert layer(torch.randn(1, 4)).shape == (1, 2) and "clipping of 2 groups" in repr(layer)


def test_compiled_code_takes_the_pair_of_the_call(grouped):
    layer = packed_layers(wan(PAIRS))[FFN]
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    x = torch.randn(3, 64)
    found = []
    for group in (0, 1, 0):
        choose_group(layer, group)
        with torch.no_grad():
            assert torch.equal(compiled(x), layer(x))
            found.append(layer(x))
    assert not torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
