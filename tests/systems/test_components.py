"""No recipe is another under a new name: every part of each changes the packed model that it makes.

Where a recipe says that it is another one and a part, it is that other one without the part, bit for bit.

Every recipe has an entry in PARTS. They run at the same bits, which are chosen apart from a recipe, on one small model
whose rows and layers are unlike enough for every part to find something to do.
"""

import itertools
from dataclasses import dataclass, field

import pytest
import torch
from support import autoencoders, pipelines, tiny, unets
from torch import nn

import attar
from attar.recipe import load_recipe, recipe_names
from attar.runtime.backend import use_backend
from attar.runtime.layers import packed_layers

BITS = {"quantize.weights": 4, "quantize.acts": 4}
STEPS = 4  # denoising steps of the one prompt that is traced
HEAVY = 4  # every such row has a heavy tail
NOISE = 1e-4  # outputs that are nearer to each other than this are the same


@dataclass(frozen=True)
class Part:
    """A part of a recipe.

    off: settings that leave it out. within: settings that are changed with and without it. rest: the recipe, and
    changes to it, whose model is the one without the part, bit for bit; None where there is no such recipe.
    """

    off: dict
    within: dict = field(default_factory=dict)
    rest: tuple | None = None


NEAREST = {"rounding.method": "nearest"}
SMOOTH = {"select.policy": "uniform_steps", "quantize.alpha": 0.4335}
SAME_BITS = {"allocate": None}  # without the search for bits, which takes longer than all else
RATES = {"finetune.schedule": "linear", "finetune.warmup": 0}
MPQ_RELATION = {"weight": 25, "window": 2}
MPQ = {"quantize.row_bits.salient_format": "int", "finetune.adapter_start": "zero"}
POINTS = {
    "quantize.weight_format": "lloyd",
    "quantize.weights": 2,
    "finetune.weight_lr": 0,
    "finetune.level_lr": 1e-2,
}

PARTS = {
    # plain ones: they differ from each other
    "rtn": {},
    "fp8": {},
    # fixed transforms
    "hadamard": {"rotation": Part({"quantize.rotation": "none"}, rest=("rtn", {}))},
    "smoothquant": {"channel scales": Part({"quantize.scale": False}, rest=("rtn", {}))},
    "vidit-q": {
        "static balancing": Part({"quantize.scale": False}, rest=("hadamard", {})),
        "dynamic balancing": Part({"quantize.rotation": "none"}, rest=("smoothquant", SMOOTH)),
    },
    "lrq-dit": {
        "logarithmic weights": Part({"quantize.weight_format": "int"}),
        "adaptive rotation": Part({"quantize.rotation": "hadamard"}),
        "all": Part(
            {"quantize.weight_format": "int", "quantize.rotation": "hadamard"},
            rest=("vidit-q", {"select.policy": "random", "quantize.alpha": 0.5}),
        ),
    },
    "svdquant": {
        "branch": Part({"quantize.low_rank": None}, rest=("smoothquant", {})),
        "channel scales": Part({"quantize.scale": False}),
    },
    # learned block by block
    "learned-base": {
        "learned scales": Part({"reconstruct.train_scale": False}),
        "learned rotations": Part({"reconstruct.train_rotation": False}),
        "learned clipping": Part({"reconstruct.train_clip": False}),
    },
    "s2q-vdit": {
        "salient samples": Part({"select.policy": "random"}),
        "weights of tokens": Part({"reconstruct.loss": "mse"}),
        "all": Part(
            {"select.policy": "random", "reconstruct.loss": "mse", **NEAREST}, rest=("learned-base", {})
        ),
    },
    "q-vdit": {
        "branch": Part({"quantize.low_rank": None, "reconstruct.train_branch": False}),
        "temporal loss": Part({"reconstruct.temporal_weight": 0}),
    },
    "attar-ptq": {
        "random samples": Part({"select.policy": "salient"}),
        "learned transforms": Part({"reconstruct": None}),
        "GPTQ": Part(NEAREST, rest=("learned-base", {})),
    },
    "attar-mixed": {"bits by sensitivity": Part(SAME_BITS, rest=("attar-ptq", {}))},
    "attar": {
        "bits by sensitivity": Part(SAME_BITS),
        "shift": Part({"quantize.shift": False}, SAME_BITS),
        "calibrated modulation": Part({"quantize.calibrate_modulation": False}, SAME_BITS),
        "branch": Part({"quantize.low_rank": None}, SAME_BITS),
        "rotation": Part({"quantize.rotation": "none"}, SAME_BITS),
        "searched clipping": Part({"quantize.clip_search": False}, SAME_BITS),
        "full range": Part({"quantize.act_format": "int"}, SAME_BITS),
        "learned transforms": Part({"reconstruct": None}, SAME_BITS),
        "transforms for activations alone": Part({"reconstruct.round_weights": True}, SAME_BITS),
        "GPTQ": Part(NEAREST, SAME_BITS),
        "what clipping cuts off": Part({"rounding.target": "clipped"}, SAME_BITS),
        "order of columns": Part({"rounding.order": "given"}, SAME_BITS),
        "all": Part(
            {
                "quantize.shift": False, "quantize.calibrate_modulation": False, "quantize.low_rank": None,
                "quantize.clip_search": False, "quantize.act_format": "int", "reconstruct.round_weights": True,
                "rounding.target": "clipped", "rounding.order": "given",
            },
            SAME_BITS, rest=("attar-ptq", {}),
        ),
    },
    # trained as a whole
    "quantized-distillation": {
        "trained weights": Part({"finetune.weight_lr": 0}),
        "trained points": Part({"finetune.level_lr": 0}, POINTS),
    },
    "qvgen": {
        "auxiliary branches": Part({"finetune.auxiliary_rank": 0}, rest=("quantized-distillation", {})),
    },
    "efficientdm": {
        "adapters": Part(
            {"finetune.adapter_rank": 0},
            rest=("quantized-distillation", {"finetune.weight_lr": 0, **RATES}),
        ),
        "trained clipping": Part({"finetune.clip_lr": 0}),
    },
    "mpq-dm": {
        "bits by rows": Part({"quantize.row_bits": None}),
        "rows by their kurtosis": Part({"quantize.row_bits.by": "random"}),
        "relations": Part({"finetune.relation": None}),
        "channel scales": Part({"quantize.scale": False}),
        "all": Part(
            {"quantize.row_bits": None, "quantize.scale": False, "finetune.relation": None}, rest=("efficientdm", {})
        ),
    },
    "mpq-dmv2": {
        "residual rows": Part({"quantize.row_bits.salient_format": "int"}),
        "start from the error": Part({"finetune.adapter_start": "zero"}),
        "memory": Part({"finetune.relation.memory": 0}),
        "all": Part({**MPQ, "finetune.relation": MPQ_RELATION}, rest=("mpq-dm", {})),
    },
    "quest": {
        "few layers": Part({"finetune.layers": None}),
        "local errors": Part({"finetune.local": None}),
        "weight of local errors": Part({"finetune.local_weight": 1e-6}),
        "split": Part({"quantize.split": False}),
    },
    # of autoencoders
    "zeroq": {
        "synthesised latents": Part({"synthesize.by": "noise"}),
        "bits by sensitivity": Part(SAME_BITS),
        "ranges": Part({"reconstruct": None}, SAME_BITS),
    },
    "genie": {
        "generator": Part({"synthesize.by": "noise"}),
        "learned codes": Part({"rounding.epochs": 0, "rounding.scale_lr": 0}),
        "learned scales": Part({"rounding.scale_lr": 0}),
    },
}  # fmt: skip

# settings that let a recipe do in a second what it does, and make what it learns in so few steps visible
SHORT = {
    "fp8": {"quantize.weights": 8, "quantize.acts": 8},
    "lrq-dit": {"quantize.rotation_threshold": 0.7},  # between the layers of the model
    "svdquant": {"quantize.low_rank.rank": 2},
    "q-vdit": {"reconstruct.branch_lr": 1e-2},
    "attar": {"quantize.low_rank.rank": 2, "allocate.act_bits": [3, 4, 5]},
    "qvgen": {"finetune.auxiliary_rank": 2, "finetune.auxiliary_lr": 1e-2},
    "efficientdm": {"finetune.adapter_rank": 2, "finetune.adapter_lr": 0.1},
    "mpq-dm": {"finetune.adapter_rank": 2, "finetune.adapter_lr": 0.1},
    "mpq-dmv2": {
        "finetune.adapter_rank": 2, "finetune.adapter_lr": 0.1, "finetune.relation.memory": 64,
        "finetune.relation.anchors": 32,
    },
    "quest": {"finetune.weight_lr": 1e-3, "finetune.bias_lr": 1e-3},
    "zeroq": {"quantize.acts": 8},
    "genie": {"quantize.acts": 8, "rounding.epochs": 1, "rounding.lr": 0.05},
}  # fmt: skip
UNETS, AUTOENCODERS = {"quest"}, {"zeroq", "genie"}
BLOCKS = {
    "down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",), "mid_block_type": None,
}  # fmt: skip


def short(name):
    """Settings of every recipe: the bits, and little to trace and to learn."""
    recipe, found = load_recipe(name), dict(BITS)
    if recipe.trace is not None:
        found["trace.prompts"] = 1
    if recipe.select is not None:
        found["select.count"] = 2
    if recipe.synthesize is not None:
        found |= {"synthesize.count": 4, "synthesize.steps": 10}
    if recipe.allocate is not None:
        found |= {"allocate.samples": 2, "allocate.bits": [3, 4, 5]}
    if recipe.reconstruct is not None:
        found["reconstruct.epochs"] = 2
    if recipe.finetune is not None:
        found |= {"finetune.steps": 4, "finetune.batch_size": 2}
    return found | SHORT.get(name, {})


def planted(model):
    """The model with a heavy tail in every fourth row of its linears, and with layers that count for more."""
    for name, linear in model.named_modules():
        if isinstance(linear, nn.Linear):
            weight = linear.weight.data
            tail = weight[::HEAVY] ** 5
            weight[::HEAVY] = 4 * weight.std() * tail / tail.std()
            weight *= 4 if name.endswith("net.2") else 0.25 if name.endswith("to_v") else 1
    return model


def pipeline(name):
    """(a small pipeline for the recipe, its generation, its denoiser's name, a call of it)."""
    if name in UNETS:
        pipe = unets.make("sd")
        pipe.register_modules(unet=unets.condition(block_out_channels=(16,), **BLOCKS))
        return pipe, unets.GENERATION, "unet", unets.condition_call
    pipe = pipelines.make("cogvideox")  # of videos, and with modulation inside its blocks
    pipe.register_modules(transformer=planted(tiny.cogvideox(num_layers=1)))
    return pipe, pipelines.CASES["cogvideox"].generation, "transformer", tiny.cogvideox_call


@dataclass(frozen=True)
class Made:
    """A packed model: its tensors, those of the quantized layers among them, and what it gives for one input."""

    state: dict
    layers: dict
    output: torch.Tensor


def run(name, changes):
    """What the recipe with some changes makes of its kind of model."""
    overrides = short(name) | changes
    if name in AUTOENCODERS:
        vae = autoencoders.trained_autoencoder(blocks=("ResBlock", "EfficientViTBlock"))
        model = attar.compress(vae, name, overrides=overrides).vae
        inputs = {"z": autoencoders.latents(2, seed=5)}
        forward = model.decode
    else:
        pipe, sizes, component, call = pipeline(name)
        generation = {**sizes, "num_inference_steps": STEPS}
        attar.compress(pipe, name, overrides=overrides, prompts=pipelines.PROMPTS[:1], generation=generation)
        model = forward = getattr(pipe, component)
        inputs = call(model)
    with torch.no_grad(), use_backend("reference"):
        return Made(model.state_dict(), packed_layers(model), forward(**inputs)[0])


@pytest.fixture(scope="module")
def made():
    """The model that a recipe with some changes makes, once for each."""
    results = {}

    def of(name, changes=None):
        changes = changes or {}
        key = name, repr(changes)
        if key not in results:
            results[key] = run(name, changes)
        return results[key]

    return of


def same(one, other):
    """Whether two models have the same tensors, bit for bit."""
    return one.state.keys() == other.state.keys() and all(
        torch.equal(tensor, other.state[key]) for key, tensor in one.state.items()
    )


def distance(one, other):
    """Of the outputs, relative to their size."""
    return float((one.output - other.output).norm() / other.output.norm())


@pytest.mark.slow(but=[name for name in recipe_names() if name not in ("attar", "quest", "zeroq")])
@pytest.mark.parametrize("name", recipe_names())
def test_each_part_of_a_recipe_changes_the_model(name, made):
    assert name in PARTS, "say in PARTS what the recipe adds to others, and how each part is left out"
    for part, switch in PARTS[name].items():
        whole, without = made(name, switch.within), made(name, switch.within | switch.off)
        assert not same(whole, without), part
        assert distance(without, whole) > NOISE, part
        if switch.rest is not None:
            assert same(without, made(*switch.rest)), part


def test_recipes_differ_from_each_other(made):
    """Also the plain ones, which add nothing."""
    found = {name: made(name) for name in recipe_names()}
    found["rtn at 8 bits"] = made("rtn", {"quantize.weights": 8, "quantize.acts": 8})
    for one, other in itertools.combinations(found, 2):
        if found[one].output.shape == found[other].output.shape:
            assert not same(found[one], found[other]), (one, other)
            assert distance(found[one], found[other]) > NOISE, (one, other)


@pytest.mark.parametrize("name", ["mpq-dm", "mpq-dmv2"])
def test_rows_of_heavy_tails_get_the_bits(name, made):
    """Of the weights as they are, without channel scales, which mix the planted tails with others."""
    layers = made(name, {"quantize.scale": False}).layers.values()
    mixed = [layer for layer in layers if layer.rows is not None]
    assert mixed
    for layer in mixed:
        widest = torch.tensor([row.bits == 5 for row in layer.rows])
        more = widest[layer.row_kind.long()]
        assert bool(more[::HEAVY].all()) and more.sum() < 0.4 * len(more)
