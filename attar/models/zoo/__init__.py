"""Small models of the real architecture classes that come with attar."""

from __future__ import annotations

from pathlib import Path

from attar.errors import AttarError

NAMES = ("digits-video", "digits-dit", "digits-image")


def zoo_names() -> list[str]:
    """Names that can be used wherever a model is asked for."""
    return list(NAMES)


def zoo_folder(name: str) -> Path:
    """The diffusers folder of a built-in model. Raises AttarError when its weights do not come with this copy."""
    folder = Path(__file__).parent / name
    if not (folder / "model_index.json").is_file():
        raise AttarError(
            "the weights of this built-in model are not here",
            where=name,
            fix=f"Train it with `python -m attar.models.zoo.train {name}`, and give the folder that is written",
        )
    return folder
