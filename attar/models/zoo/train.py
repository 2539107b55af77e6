"""Train a built-in model again: `python -m attar.models.zoo.train digits-video`, or digits-dit, or digits-image.

A stage that is done is skipped; a killed one goes on from its last state in the work folder.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch
from torch import distributed

from attar.models.zoo.training import digits_dit, digits_image, digits_video

MODELS = {"digits-video": digits_video, "digits-dit": digits_dit, "digits-image": digits_image}


def options(arguments: list[str]) -> argparse.Namespace:
    """The command line; options beside the common ones are those of the named model."""
    name = next((word for word in arguments if word in MODELS), "digits-video")
    parser = argparse.ArgumentParser(
        description=MODELS[name].__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", choices=MODELS, help="each has options of its own: name it before --help")
    parser.add_argument("--out", type=Path, default=Path("work") / name, help="the diffusers folder to write")
    parser.add_argument(
        "--work", type=Path, default=Path(f"work/{name}-training"), help="states for resuming"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1)
    MODELS[name].add_options(parser)
    return parser.parse_args(arguments)


def main() -> None:
    args = options(sys.argv[1:])
    torch.set_num_threads(args.threads)
    args.processes = int(os.environ.get("WORLD_SIZE", 1))
    if "RANK" in os.environ:
        distributed.init_process_group("gloo")
    MODELS[args.model].train(args)


if __name__ == "__main__":
    main()
