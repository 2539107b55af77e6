"""Weight formats on a complete pipeline: compressed, saved, loaded again, and as large as the plan said."""

import json

import pytest
import torch
from diffusers import DiffusionPipeline
from support import pipelines

import attar
from attar.quantize.tables import TABLES, WEIGHT_FORMATS
from attar.runtime.backend import use_backend
from attar.runtime.layers import packed_layers

CASE = pipelines.CASES["wan"]
GENERATION = {**CASE.generation, "num_inference_steps": CASE.steps}
FEW = {"trace.prompts": 2, "select.count": 3, "reconstruct.epochs": 2}


def assert_saved_and_loaded(small, folder):
    small.save_pretrained(folder)
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    pipelines.assert_same_model(small, pipe, "wan")
    attar.verify_folder(folder)


# name -> (bits, number format in the checkpoint, what has tables of its own)
STORED = {
    "int": (4, "int", None),
    "full_range": (4, "int", None),
    "fp8": (8, "fp8", None),
    "fp4": (4, "table", "layer"),
    "nf4": (4, "table", "layer"),
    "power": (2, "table", "layer"),
    "twin_log": (3, "table", "row"),
    "twin_log_released": (3, "table", "row"),
    "binary": (1, "table", "row"),
    "dual_binary": (2, "table", "row"),
    "dual_binary_plain": (2, "table", "row"),
    "residual": (3, "table", "row"),
    "lloyd": (1, "table", "row"),
}


@pytest.mark.slow(but=["int", "power", "lloyd", "residual", "binary", "twin_log"])
@pytest.mark.parametrize("name", WEIGHT_FORMATS)
def test_a_pipeline_in_every_format(name, tmp_path):
    """Saved and loaded again it is the same, bit for bit, and the reference gives the same for it."""
    assert name in STORED, "say in STORED how the format is stored"
    bits, number, tables = STORED[name]
    if name in TABLES:
        assert bits == TABLES[name].bits[0] and (tables == "row") == TABLES[name].per_row
    options = {"quantize.weights": bits, "quantize.weight_format": name}
    if name == "fp8":
        options |= {"quantize.acts": 8, "quantize.act_format": "fp8"}
    small = attar.compress(pipelines.make("wan"), "rtn", overrides=options)
    layers = packed_layers(small.transformer)
    assert len(layers) == 30 and all(layer.weight_bits == bits for layer in layers.values())
    for layer in layers.values():
        shape = None if layer.levels is None else layer.levels.shape
        rows = layer.out_features if tables == "row" else 1
        assert shape == (None if tables is None else (rows, 1, 1 << bits))
    scheme = small.transformer.config["quantization_config"].fields["schemes"][0]
    assert (scheme.get("weight_format", "int"), scheme.get("levels")) == (number, tables)
    with use_backend("reference"):
        assert torch.isfinite(pipelines.generate(small, "wan")).all()
    assert torch.isfinite(pipelines.generate(small, "wan")).all()
    assert_saved_and_loaded(small, tmp_path / "small")


@pytest.mark.slow(but=["binary-1"])
@pytest.mark.parametrize(("name", "bits"), [("binary", 1), ("lloyd", 2)])
def test_learning_with_trained_levels(name, bits, tmp_path):
    options = {"quantize.weights": bits, "quantize.weight_format": name, "reconstruct.train_levels": True}
    made = {}
    for trained in (True, False):
        made[trained] = attar.compress(
            pipelines.make("wan"), "attar-ptq", overrides={**FEW, **options, "reconstruct.train_levels": trained},
            prompts=pipelines.PROMPTS[:2], generation=GENERATION,
        )  # fmt: skip
    calibrated, others = (packed_layers(made[key].transformer) for key in (True, False))
    changed = {n for n, layer in calibrated.items() if not torch.equal(layer.levels, others[n].levels)}
    assert changed and all(calibrated[n].act_bits is not None for n in changed)  # modulation is plain
    for block in made[True].attar_compression.components["transformer"]["blocks"]:
        assert block["error_after"] > 0 and block["stopped"] is None
    assert_saved_and_loaded(made[True], tmp_path / "small")


def test_one_bit_on_the_command_line(cli, wan_folder, tmp_path):
    options = ("--recipe", "rtn", "--weights", "1", "--set", "quantize.weight_format=binary")
    assert "W1A6" in cli("compress", wan_folder, "-o", tmp_path / "x", *options, "--dry-run").out
    done = cli("compress", wan_folder, "-o", tmp_path / "small", *options)
    assert done.code == 0 and "W1A6-binary" in done.out
    plan = json.loads(cli("plan", "wan-1.3b", "--gpu", "h200", *options, "--json").out)
    assert plan
    refused = cli("compress", wan_folder, "-o", tmp_path / "y", "--weights", "1")
    assert "quantize.weights = 1: choose between 2 and 8 bits" in refused.message
    trained = ("--set", "reconstruct.train_levels=true")
    said = cli("compress", wan_folder, "-o", tmp_path / "y", "--recipe", "attar-ptq", *trained).message
    assert "int has no levels to train" in said and "lloyd" in said
