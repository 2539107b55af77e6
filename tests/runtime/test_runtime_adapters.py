"""LoRA beside packed layers, and the ways of diffusers and accelerate to move a model between devices."""

from __future__ import annotations

import accelerate
import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.hooks import apply_group_offloading

from attar.errors import AttarError

TARGETS = ["to_q", "to_k", "to_out.0", "ffn.net.2"]


@pytest.fixture
def model(saved):
    return WanTransformer3DModel.from_pretrained(saved, subfolder="transformer")


def run(model, call):
    with torch.no_grad():
        return model(**call)[0]


def add_lora(model, name="default", targets=TARGETS):
    peft = pytest.importorskip("peft")
    model.add_adapter(peft.LoraConfig(r=4, lora_alpha=4, target_modules=targets), adapter_name=name)
    return model


def fill_lora(model):
    torch.manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.3)


def close(a, b):
    return torch.allclose(a, b, rtol=0, atol=1e-4)


def test_lora(model, call, expected, tmp_path, saved):
    add_lora(model)
    assert close(run(model, call), expected)  # B starts at zero
    fill_lora(model)
    full = run(model, call)
    assert not close(full, expected)

    model.set_adapters("default", 0.0)
    assert close(run(model, call), expected)
    model.set_adapters("default", 0.5)
    assert not close(run(model, call), expected) and not close(run(model, call), full)
    model.set_adapters("default", 1.0)
    assert close(run(model, call), full)
    model.disable_adapters()
    assert close(run(model, call), expected)

    model.save_lora_adapter(tmp_path)
    other = WanTransformer3DModel.from_pretrained(saved, subfolder="transformer")
    other.load_lora_adapter(tmp_path, prefix=None, use_safetensors=True)
    assert close(run(other, call), full)
    other.unload_lora()
    assert close(run(other, call), expected)
    other.save_pretrained(tmp_path / "again")


def test_lora_is_neither_fused_nor_saved_into_codes(model, tmp_path, call):
    fill_lora(add_lora(model))
    full = run(model, call)
    with pytest.raises(AttarError, match="cannot be written"):
        model.fuse_lora()
    assert close(run(model, call), full)
    with pytest.raises(AttarError, match="LoRA is attached"):
        model.save_pretrained(tmp_path)


def test_every_module_can_be_visited(model):
    """`nn.Module.apply` is how libraries walk a model; no module of ours may give the name another meaning."""
    visited = []
    assert model.apply(visited.append) is model
    assert set(visited) == set(model.modules())


def test_lora_is_not_fused_into_a_layer_with_transforms(model):
    fill_lora(add_lora(model, targets=["ffn.net.2"]))
    with pytest.raises(AttarError, match="cannot be written"):
        model.fuse_lora()


def test_lora_trains_through_packed_layers(model, call):
    add_lora(model)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    torch.manual_seed(6)
    target = torch.randn_like(call["hidden_states"])
    losses = []
    for _ in range(8):
        loss = (model(**call)[0] - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


def test_lora_trains_the_biases_too(model, call):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["to_q", "net.0.proj"], bias="all")
    inner = peft.get_peft_model(model, config).base_model.model
    inner(**call)[0].square().sum().backward()
    biases = {n: p for n, p in inner.named_parameters() if n.startswith("blocks.") and n.endswith("bias")}
    assert any("base_layer" in n for n in biases) and all(p.grad is not None for p in biases.values())


@pytest.mark.parametrize("buffers", [False, True])
def test_accelerate_cpu_offload(model, call, expected, buffers):
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"), offload_buffers=buffers)
    layer = model.blocks[0].ffn.net[2]
    assert layer.bias.is_meta and layer.codes.is_meta == buffers
    assert close(run(model, call), expected)
    assert layer.codes.is_meta == buffers


def test_model_cpu_offload_hook(model, call, expected):
    model, hook = accelerate.cpu_offload_with_hook(model, execution_device=torch.device("cpu"))
    assert close(run(model, call), expected)
    hook.offload()
    assert model.blocks[0].ffn.net[2].weight_scale.dtype == torch.float32


@pytest.mark.parametrize("kind", ["leaf_level", "block_level"])
def test_group_offloading(model, call, expected, kind):
    cpu = torch.device("cpu")
    options = {"num_blocks_per_group": 1} if kind == "block_level" else {}
    apply_group_offloading(model, onload_device=cpu, offload_device=cpu, offload_type=kind, **options)
    assert close(run(model, call), expected)


@pytest.mark.parametrize("where", ["cpu", "auto", "balanced", "sequential"])
def test_device_map(saved, call, expected, where):
    model = WanTransformer3DModel.from_pretrained(saved, subfolder="transformer", device_map=where)
    assert close(run(model, call), expected)
    half = WanTransformer3DModel.from_pretrained(
        saved, subfolder="transformer", device_map=where, torch_dtype=torch.bfloat16
    )
    assert half.dtype == torch.bfloat16


def test_compile_repeated_blocks(model, call, expected):
    model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    assert close(run(model, call), expected)


@pytest.mark.gpu
def test_offload_to_and_from_cuda(model, call, expected):
    on_cuda = {k: v.cuda() if torch.is_tensor(v) else v for k, v in call.items()}
    apply_group_offloading(model, torch.device("cuda"), torch.device("cpu"), offload_type="leaf_level")
    assert float((run(model, on_cuda).cpu() - expected).norm() / expected.norm()) < 0.02
