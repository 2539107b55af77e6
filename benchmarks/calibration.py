"""Calibration of a real model's blocks on this machine, held against the forecast: seconds of each stage and peak
memory.

    python -m benchmarks.calibration                                   # one block of Wan-1.3B at 480p and 81 frames
    python -m benchmarks.calibration --shape wan-14b --resolution 1280x720 --recipe attar-ptq
    python -m benchmarks.calibration --table                           # what was measured

The transformer has the real widths, few blocks and random weights; text encoder and autoencoder are small stand-ins,
which tracing hardly notices. Results lie in benchmarks/results/calibration.json, by device.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from transformers import UMT5Config, UMT5EncoderModel

import attar
from attar.forecast.architecture import find_architecture
from attar.forecast.plan import hardware_for, plan_model, size_for
from attar.models.source import find_source, load_pipeline
from attar.progress import RichProgress
from attar.recipe import load_recipe
from benchmarks.big_model import WORDS, tokenizer
from benchmarks.gpu import versions
from benchmarks.store import FOLDER, load, processor, save
from benchmarks.tables import table_lines

RESULTS = FOLDER / "calibration.json"
SHAPES = ("wan-1.3b", "wan-14b")
TEXT_TOKENS = 512
STAGES = {"trace": "trace_seconds", "allocate": "allocate_seconds", "learn": "learn_seconds"}
COLUMNS = ("what", "stage", "measured", "forecast", "measured / forecast")


def write_model(folder: Path, shape: str, blocks: int) -> None:
    """A random pipeline of a Wan model's widths."""
    config = {**find_architecture(shape).transformers["transformer"].config, "num_layers": blocks}
    text = UMT5Config(
        vocab_size=len(WORDS) + 3, d_model=4096, d_kv=64, d_ff=128, num_layers=1, num_heads=2,
        pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    WanPipeline(
        tokenizer=tokenizer(),
        text_encoder=UMT5EncoderModel(text),
        vae=AutoencoderKLWan(base_dim=8, num_res_blocks=1),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=WanTransformer3DModel.from_config(config),
    ).save_pretrained(folder)


def measure(args: argparse.Namespace, device: str) -> dict[str, Any]:
    """Seconds of each stage and peak bytes, of the run and of its forecast."""
    width, height = map(int, args.resolution.split("x"))
    overrides = {
        "quantize.weights": args.weights, "quantize.acts": args.acts, "trace.prompts": args.prompts,
        "trace.steps": args.steps,
    }  # fmt: skip
    recipe = load_recipe(args.recipe, overrides)
    with tempfile.TemporaryDirectory(prefix="attar-calibration-") as folder:
        write_model(Path(folder), args.shape, args.blocks)
        architecture = find_architecture(folder)
        pipe = load_pipeline(find_source(folder))
    size = size_for(architecture, args.resolution, args.frames, TEXT_TOKENS)
    hardware = hardware_for(args.hardware, {})
    expected = plan_model(architecture, recipe, hardware, size, args.steps, True)["calibration"]
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    started = time.monotonic()
    call = {"height": height, "width": width, "num_frames": args.frames, "num_inference_steps": args.steps}
    call |= {"max_sequence_length": TEXT_TOKENS, "guidance_scale": 5.0}
    made = attar.compress(
        pipe, recipe, prompts=[" ".join(WORDS[i:]) for i in range(args.prompts)], generation=call,
        progress=RichProgress(),
    )  # fmt: skip
    seconds = dict(made.attar_compression.seconds)
    whole = time.monotonic() - started
    learn = whole - sum(seconds.get(stage, 0.0) for stage in ("trace", "allocate"))
    row: dict[str, Any] = {
        "seconds": {"trace": seconds["trace"], "allocate": seconds.get("allocate", 0.0), "learn": learn},
        "parts": seconds,
        "host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    if device == "cuda":
        row["device"] = torch.cuda.max_memory_allocated()
    row["forecast"] = {stage: expected[key] for stage, key in STAGES.items()}
    row["forecast"] |= {key: expected[key] for key in ("device", "host", "precision")}
    return row


def table(content: dict[str, Any]) -> list[str]:
    """The results as lines of Markdown."""
    rows = []
    for device, study in content["devices"].items():
        for name, row in study["runs"].items():
            for stage, seconds in row["seconds"].items():
                expected = row["forecast"][stage]
                ratio = f"{seconds / expected:.2f}" if expected else "–"
                rows.append([f"{device}, {name}", stage, f"{seconds:.0f} s", f"{expected:.0f} s", ratio])
            if "device" in row:
                measured, expected = (r["device"] for r in (row, row["forecast"]))
                text = [f"{n / 1e9:.1f} GB" for n in (measured, expected)]
                rows.append([f"{device}, {name}", "memory", *text, f"{measured / expected:.2f}"])
    return table_lines(COLUMNS, rows)


def main() -> None:
    """Measures one run and puts it into the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="wan-1.3b")
    parser.add_argument("--blocks", type=int, default=1)
    parser.add_argument("--resolution", default="832x480")
    parser.add_argument("--frames", type=int, default=81)
    parser.add_argument("--recipe", default="attar")
    parser.add_argument("--weights", type=int, default=4)
    parser.add_argument("--acts", type=int, default=6)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--hardware", default="h200", help="of the forecast, as attar plan names it")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="only print what was measured")
    args = parser.parse_args()
    content = load(args.results, "devices")
    if not args.table:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        row = measure(args, device)
        name = f"{args.shape}, {args.blocks} block, {args.resolution}x{args.frames}, {args.recipe}"
        name += f" W{args.weights}A{args.acts}, {args.prompts} prompts, {args.steps} steps"
        title = torch.cuda.get_device_name() if device == "cuda" else processor()
        study = content["devices"].setdefault(title, {"runs": {}})
        study["versions"] = versions()
        study["runs"][name] = row
        save(args.results, content)
    print("\n".join(table(content)))


if __name__ == "__main__":
    main()
