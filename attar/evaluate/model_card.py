"""The model card of a compressed checkpoint: a README.md with the front matter that the hub reads."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from attar.errors import AttarError
from attar.evaluate.report import environment
from attar.evaluate.report_data import PlanRow
from attar.evaluate.size import format_bytes


@dataclass
class Figure:
    """One row of the card's table of results, already in words: "PSNR", "–", "31.2 dB"."""

    name: str
    original: str
    compressed: str


@dataclass
class ModelCard:
    """What a model card says. Parts without data are left out.

    base_model: hub id, or the name of a model that is not on the hub (which then stays out of the front
    matter). sizes: bytes by component as (original, compressed). settings: of calibration, by name.
    generation: of the figures, by name (steps, guidance, seeds, …). call: arguments of the example's
    pipeline call besides the prompt (num_frames, height, …), where the pipeline's defaults do not suit the
    model. by_class: the example's prompt is the name of a class. alone: class of an autoencoder
    without a pipeline. dtype: of the example, a torch name.
    license: an SPDX or hub identifier, inherited from the base model.
    """

    name: str
    base_model: str
    recipe: str
    bits: str
    attar_version: str
    pipeline_tag: str = "text-to-video"
    library_name: str = "diffusers"
    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    tags: list[str] = field(default_factory=list)
    example_prompt: str = "a red fox runs through snow"
    by_class: bool = False
    alone: str | None = None
    fps: float = 16
    dtype: str = "bfloat16"
    call: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    generation: dict[str, Any] = field(default_factory=dict)
    sizes: dict[str, tuple[int, int]] = field(default_factory=dict)
    plan: list[PlanRow] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    limits: list[str] = field(default_factory=list)


def model_card(info: ModelCard | Mapping[str, Any]) -> str:
    """The text of README.md, from a `ModelCard` or a dictionary of its fields.

    A local path as `name` or `base_model` is shortened to its last part: a card names no one's folders.
    Raises AttarError for missing or unknown fields.
    """
    card = info if isinstance(info, ModelCard) else _from_mapping(info)
    on_hub = bool(re.fullmatch(r"[\w][\w.-]*/[\w][\w.-]*", card.base_model))
    base = card.base_model if on_hub else _last_part(card.base_model)
    front: dict[str, Any] = {}
    if on_hub:
        front |= {"base_model": base, "base_model_relation": "quantized"}
    if card.alone is None:
        front["pipeline_tag"] = card.pipeline_tag
    front["library_name"] = card.library_name
    named = {key: getattr(card, key) for key in ("license", "license_name", "license_link")}
    front |= {key: value for key, value in named.items() if value}
    front["tags"] = list(dict.fromkeys(["attar", "quantized", card.bits.lower(), card.recipe, *card.tags]))
    sizes = [
        (part, before, after, format_bytes(before), format_bytes(after))
        for part, (before, after) in card.sizes.items()
    ]
    return (
        environment()
        .get_template("model_card.md.j2")
        .render(
            card=card,
            name=_last_part(card.name),
            repo=card.name if re.fullmatch(r"[\w][\w.-]*/[\w][\w.-]*", card.name) else _last_part(card.name),
            base=base,
            on_hub=on_hub,
            video=card.pipeline_tag == "text-to-video",
            arguments=_arguments(card),
            front=yaml.safe_dump(front, sort_keys=False, allow_unicode=True).strip(),
            sizes=sizes,
            totals=[format_bytes(sum(pair[k] for pair in card.sizes.values())) for k in (0, 1)],
            cell=_cell,
        )
    )


def _from_mapping(info: Mapping[str, Any]) -> ModelCard:
    known = {f.name for f in dataclasses.fields(ModelCard)}
    unknown = sorted(set(info) - known)
    if unknown:
        raise AttarError(
            f"unknown field {unknown[0]!r} of a model card", fix=f"Known: {', '.join(sorted(known))}"
        )
    try:
        values = dict(info)
        values["plan"] = [PlanRow(**row) if isinstance(row, Mapping) else row for row in info.get("plan", ())]
        values["figures"] = [
            Figure(**row) if isinstance(row, Mapping) else row for row in info.get("figures", ())
        ]
        return ModelCard(**values)
    except TypeError as error:
        raise AttarError(f"not a model card: {error}", fix="Give every required field") from error


def _arguments(card: ModelCard) -> str:
    """Of the example's call, but for the noise."""
    prompt = repr(card.example_prompt)
    if card.by_class:
        number = card.example_prompt.isdecimal()
        prompt = f"[{card.example_prompt}]" if number else f"pipe.get_label_ids([{prompt}])"
    return ", ".join([prompt, *(f"{name}={value!r}" for name, value in card.call.items())])


def _last_part(name: str) -> str:
    return re.split(r"[/\\]", name.rstrip("/\\"))[-1]


def _cell(value: Any) -> str:
    """A value inside a Markdown table."""
    return str(value).replace("|", "\\|").replace("\n", " ")
