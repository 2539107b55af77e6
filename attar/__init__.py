"""attar: make generative vision models small and fast.

    import attar
    small = attar.compress(pipe, recipe="s2q-vdit", weights=4, acts=6, workspace="work/")
    small.save_pretrained("wan-w4a6")

Importing attar lets `from_pretrained` of diffusers and transformers read compressed folders.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

from attar.errors import AttarError
from attar.runtime.diffusers_integration import register as _register_with_diffusers
from attar.runtime.transformers_integration import register as _register_with_transformers

_register_with_diffusers()
_register_with_transformers()

if TYPE_CHECKING:
    from attar.calibration.synthesize import synthesize
    from attar.conductor import compress
    from attar.models.adapter import ModelAdapter
    from attar.models.source import load
    from attar.recipe import Recipe, load_recipe, recipe_names
    from attar.runtime.integrity import verify_folder
    from attar.runtime.layers import PackedLinear

_WHERE = {
    "compress": "attar.conductor",
    "load": "attar.models.source",
    "ModelAdapter": "attar.models.adapter",
    "Recipe": "attar.recipe",
    "load_recipe": "attar.recipe",
    "recipe_names": "attar.recipe",
    "verify_folder": "attar.runtime.integrity",
    "PackedLinear": "attar.runtime.layers",
    "synthesize": "attar.calibration.synthesize",
}
__all__ = [
    "AttarError",
    "ModelAdapter",
    "PackedLinear",
    "Recipe",
    "__version__",
    "compress",
    "load",
    "load_recipe",
    "recipe_names",
    "synthesize",
    "verify_folder",
]


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        from importlib import import_module

        return getattr(import_module(_WHERE[name]), name)
    raise AttributeError(f"module 'attar' has no attribute {name!r}")
