"""Loading a packed checkpoint never makes a dense weight, neither of a transformer nor of a text encoder."""

import pytest
import torch
from diffusers import WanTransformer3DModel
from support import pipelines
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import UMT5EncoderModel

import attar
from attar.runtime.layers import packed_layers


class Shapes(TorchDispatchMode):
    """Notes the shape of every floating-point tensor that an operation gives values to.

    `empty` alone takes no memory: accelerate calls it for each parameter on its way to the meta device.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result) if func is not torch.ops.aten.empty.memory_format else ():
            if isinstance(value, torch.Tensor) and value.is_floating_point() and not value.is_meta:
                self.seen.add(tuple(value.shape))
        return result


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The same pipeline, dense and packed; no kept tensor has the shape of a packed layer's weight."""
    root = tmp_path_factory.mktemp("loading")
    pipe = pipelines.make("wan")
    pipe.save_pretrained(root / "dense")
    small = attar.compress(pipe, "rtn", overrides={"text_encoder.weights": 4, "text_encoder.group_size": 16})
    small.save_pretrained(root / "packed")
    return root


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("cls", "part"), [(WanTransformer3DModel, "transformer"), (UMT5EncoderModel, "text_encoder")]
)
def test_no_tensor_has_the_shape_of_a_dense_weight(folders, monkeypatch, cls, part, dtype):
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # what is noted is noted in this thread
    with Shapes() as dense:
        cls.from_pretrained(folders / "dense" / part, torch_dtype=dtype)
    with Shapes() as packed:
        model = cls.from_pretrained(folders / "packed" / part, torch_dtype=dtype)
    layers = packed_layers(model).values()
    kept = {tuple(tensor.shape) for tensor in model.state_dict().values()}
    weights = {(layer.out_features, layer.in_features) for layer in layers} - kept
    assert weights and weights <= dense.seen
    assert not weights & packed.seen
