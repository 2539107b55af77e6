"""The checkpoint format: an ordinary diffusers folder whose config.json has a `quantization_config`.

    {"quant_method": "attar", "format_version": 1, "attar_version": "...", "recipe": "s2q-vdit",
     "schemes": [{"weight_bits": 4, "act_bits": 6, "act_clip": true, "group_size": null,
                  "transforms": [{"kind": "channel_scale"},
                                 {"kind": "hadamard", "order": 12, "block": 1536}]}],
     "layers": {"blocks.0.attn1.to_q": 0, ...},
     "modules_to_not_convert": ["proj_out", ...]}

A scheme whose numbers are no integers, or that has a low-rank branch, says so in further fields, which format version 2
brought: "weight_format", "act_format", "levels", "low_rank". Without them a checkpoint is still one of version 1.

A convolution is listed under the name of the linear that it becomes ("….conv1.linear", see patches.py); the model's own
class says which convolution that is. Layers that are split over their input have their parts' channels in "splits":

     "splits": {"up_blocks.0.resnets.0.conv1.linear": [11520, 5760]}

Models that have either are of format version 3. Version 4 brought layers whose rows have several widths or formats:

     "rows": [[3, "int", 153], [4, "int", 1230], [5, "int", 153]]

in their scheme, bits, format and count of each kind (rows.py). Version 5 brought the transform
{"kind": "channel_shift"}, whose layers have a bias whether the original ones do or not, and "act_format": "full_range".

Version 6 brought activation bits by groups of denoising steps, "act_groups": [8, 6] in a scheme, and what tells the
groups apart by the timestep that the model is called with (step_groups.py):

     "step_groups": {"thresholds": [562.5], "descending": true}

Version 7 brought a gate over the frames of a video for the low-rank branch, "frame_gate": 21 in a scheme, of so many.

Version 8 brought clipping factors of activations by groups of denoising steps, "clip_groups": 2 in a scheme, of so
many; "act_clip" is then a tensor (groups, 2), and "step_groups" is as in version 6.

The tensors are the state dict of the packed model. Nothing else is needed to load it, and nothing else is in
it: no prompts, no paths. Checksums lie in the header of each weight file (integrity.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from torch import nn

from attar.errors import AttarError, reason
from attar.runtime.layers import PackedLinear, packed_layers
from attar.runtime.packing import packed_width
from attar.runtime.patches import PatchLinear, model_splits, open_layers
from attar.runtime.rows import kinds_of
from attar.runtime.scheme import ACT_GROUPS, CLIP_GROUPS, FRAME_GATE, LATER, LATER_TRANSFORMS, MIXED_ROWS
from attar.runtime.step_groups import StepGroups, follow_steps, step_groups_of
from attar.runtime.transforms import is_shifted, transform_class

QUANT_METHOD = "attar"
FORMAT_VERSION = 8
_FIELDS = {
    "quant_method": str,
    "format_version": int,
    "attar_version": str,
    "recipe": str,
    "schemes": list,
    "layers": dict,
    "modules_to_not_convert": list,
}
_SPLITS = "splits"  # of version 3, and only where there are any
_STEP_GROUPS = "step_groups"  # of version 6, and only where a scheme has bits or clipping by them
_SINCE = {
    MIXED_ROWS: 4,
    ACT_GROUPS: 6,
    FRAME_GATE: 7,
    CLIP_GROUPS: 8,
}  # of the later fields of schemes; others came with version 2
_SCHEME_FIELDS: dict[str, tuple[type, ...]] = {
    "weight_bits": (int,),
    "act_bits": (int, type(None)),
    "act_clip": (bool,),
    "group_size": (int, type(None)),
    "transforms": (list,),
}


def quantization_config_of(model: nn.Module, recipe: str = "custom") -> dict[str, Any]:
    """The `quantization_config` of a model that holds packed layers.

    Raises AttarError when there is none, when a LoRA is still wrapped around one, and when layers have activation bits
    or clipping by groups of steps that the model does not follow.
    """
    layers = packed_layers(model)
    if not layers:
        raise AttarError("the model has no packed layer", where=type(model).__name__, fix="Compress it first")
    schemes: list[dict[str, Any]] = []
    index: dict[str, int] = {}
    for name, layer in layers.items():
        if name.endswith("base_layer"):
            raise AttarError(
                "a LoRA is attached to the packed model", where=name, fix="Unload it before saving"
            )
        scheme = layer.scheme()
        if scheme not in schemes:
            schemes.append(scheme)
        index[name] = schemes.index(scheme)
    later = any(
        field in LATER or (field == "transforms" and any(t["kind"] in LATER_TRANSFORMS for t in value))
        for scheme in schemes
        for field, value in scheme.items()
    )
    kept = [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and name not in layers]
    splits = model_splits(model)
    opened = bool(splits) or any(isinstance(m, PatchLinear) for m in model.modules())
    clipped = any(CLIP_GROUPS in scheme for scheme in schemes)
    grouped = clipped or any(ACT_GROUPS in scheme for scheme in schemes)
    steps = step_groups_of(model) if grouped else None
    if grouped:
        _check_groups(schemes, steps, type(model).__name__)
    return {
        "quant_method": QUANT_METHOD,
        "format_version": 8
        if clipped
        else 7
        if any(FRAME_GATE in scheme for scheme in schemes)
        else 6
        if grouped
        else 5
        if any(map(_of_version_5, schemes))
        else 4
        if any(MIXED_ROWS in scheme for scheme in schemes)
        else 3
        if opened
        else 2
        if later
        else 1,
        "attar_version": attar_version(),
        "recipe": recipe,
        "schemes": schemes,
        "layers": index,
        "modules_to_not_convert": kept,
        **({_SPLITS: splits} if splits else {}),
        **({_STEP_GROUPS: steps.config()} if steps is not None else {}),
    }


def _check_groups(schemes: Iterable[Mapping[str, Any]], steps: StepGroups | None, where: str) -> None:
    """Raises AttarError unless as many groups are followed as schemes have bits or clipping for."""
    for scheme in schemes:
        counts = {"clipping": scheme[CLIP_GROUPS]} if CLIP_GROUPS in scheme else {}
        counts |= {"bits": len(scheme[ACT_GROUPS])} if ACT_GROUPS in scheme else {}
        for what, count in counts.items():
            if steps is None or count != steps.count:
                known = "none" if steps is None else str(steps.count)
                raise AttarError(
                    f"layers have activation {what} for {count} groups of steps, and {known} are known",
                    where=where,
                    fix="Compress the model again",
                )


def _of_version_5(scheme: Mapping[str, Any]) -> bool:
    return is_shifted(scheme["transforms"]) or scheme.get("act_format") == "full_range"


def check_config(config: Mapping[str, Any], where: str = "quantization_config") -> dict[str, Any]:
    """The config as a plain dict, once every field of it is known to be understood; else AttarError."""
    update = "Update attar, or compress the model again"
    found = config.get("format_version")
    if type(found) is not int or found < 1:  # true is an int to isinstance
        raise AttarError(f"format_version is {found!r}, not a version of the attar format", where=where)
    if found > FORMAT_VERSION:
        raise AttarError(
            f"the checkpoint has format version {found}, this attar reads up to {FORMAT_VERSION}",
            where=where,
            fix="Update attar",
        )
    known = {*_FIELDS, *([_SPLITS] if found >= 3 else []), *([_STEP_GROUPS] if found >= 6 else [])}
    unknown = sorted(set(config) - known)
    if unknown:
        raise AttarError(f"unknown field {unknown[0]!r}", where=where, fix=update)
    for field, kind in _FIELDS.items():
        if not isinstance(config.get(field), kind):
            raise AttarError(f"field {field!r} is missing or not a {kind.__name__}", where=where)
    if config["quant_method"] != QUANT_METHOD:
        raise AttarError(f"quant_method is {config['quant_method']!r}, not {QUANT_METHOD!r}", where=where)
    for position, scheme in enumerate(config["schemes"]):
        later = {key: kind for key, kind in LATER.items() if found >= _SINCE.get(key, 2)}
        if not isinstance(scheme, Mapping) or not set(_SCHEME_FIELDS) <= set(scheme) <= {
            *_SCHEME_FIELDS,
            *later,
        }:
            raise AttarError(f"scheme {position} is not one that this attar knows", where=where, fix=update)
        for field, value in scheme.items():
            if type(value) not in {**_SCHEME_FIELDS, **later}[field]:
                raise AttarError(f"scheme {position} has {field} = {value!r}", where=where, fix=update)
        packed_width(1, scheme["weight_bits"])
        if MIXED_ROWS in scheme:
            kinds_of(scheme[MIXED_ROWS])
        for transform in scheme["transforms"]:
            if not isinstance(transform, Mapping):
                raise AttarError(
                    f"scheme {position} has the transform {transform!r}", where=where, fix=update
                )
            transform_class(transform)
    for name, position in config["layers"].items():
        if type(position) is not int or not 0 <= position < len(config["schemes"]):
            raise AttarError(f"layer {name!r} names scheme {position!r}, which is not listed", where=where)
    splits = config.get(_SPLITS, {})
    if not isinstance(splits, Mapping) or not all(map(_is_split, splits.values())):
        raise AttarError(f"{_SPLITS} does not list the channels of parts", where=where, fix=update)
    try:
        steps = StepGroups.from_config(config[_STEP_GROUPS]) if _STEP_GROUPS in config else None
    except AttarError as error:
        raise AttarError(error.what, where=where, fix=update) from error
    _check_groups(config["schemes"], steps, where)
    return {**config, "quant_method": QUANT_METHOD}


def _is_split(sizes: Any) -> bool:
    return isinstance(sizes, list) and len(sizes) > 1 and all(type(n) is int and n > 0 for n in sizes)


def replace_linears(model: nn.Module, config: Mapping[str, Any]) -> nn.Module:
    """Puts empty packed layers, on the meta device, in the place of the linears listed in `config`.

    In place. No memory is allocated: a model on the meta device never has its float weights in memory.
    Raises AttarError for an unknown scheme, a layer that the model lacks, a layer that is not a linear.
    """
    config = check_config(config)
    open_layers(model, config["layers"], config.get(_SPLITS, {}))
    replacements = {}
    for name, position in config["layers"].items():
        try:
            linear = model.get_submodule(name)
        except AttributeError:
            linear = None
        if not isinstance(linear, nn.Linear) or isinstance(linear, PackedLinear):
            state = "has no layer" if linear is None else f"has a {type(linear).__name__}, not a Linear, as"
            raise AttarError(
                f"{type(model).__name__} {state} {name!r}, which the checkpoint quantizes",
                fix="The checkpoint belongs to another model class or configuration",
            )
        try:
            replacements[name] = PackedLinear.from_scheme(
                config["schemes"][position],
                linear.in_features,
                linear.out_features,
                linear.bias is not None,
                dtype=linear.weight.dtype,
            )
        except AttarError as error:
            raise AttarError(error.what, where=name, fix=error.fix) from error
        except (TypeError, ValueError, ArithmeticError, RuntimeError) as error:
            raise AttarError(f"scheme {position} cannot be read: {reason(error)}", where=name) from error
    for name, layer in replacements.items():
        model.set_submodule(name, layer)
    if _STEP_GROUPS in config:
        follow_steps(model, StepGroups.from_config(config[_STEP_GROUPS]))
    return model


def attar_version() -> str:
    """Version of the installed package; "unknown" in an uninstalled source tree."""
    try:
        return version("attar")
    except PackageNotFoundError:
        return "unknown"
