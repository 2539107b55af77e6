"""The comparison report: one self-contained page, `index.html`, and the same figures as `report.json`."""

from __future__ import annotations

import base64
import dataclasses
import math
import os
import re
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from attar.errors import AttarError
from attar.evaluate import charts
from attar.evaluate.report_data import (
    Accuracy,
    AttentionMass,
    BlockError,
    ChosenSample,
    Generation,
    ModelFacts,
    PlanRow,
    ReportData,
    Selection,
    Summary,
    TimestepError,
    VideoPair,
    summarise,
)
from attar.evaluate.size import format_bytes
from attar.evaluate.video import media_type, to_data_uri
from attar.files import writing

__all__ = [
    "Accuracy",
    "AttentionMass",
    "BlockError",
    "ChosenSample",
    "Generation",
    "ModelFacts",
    "PlanRow",
    "ReportData",
    "Selection",
    "Summary",
    "TimestepError",
    "VideoPair",
    "build_report",
    "summarise",
]

_MEDIA = re.compile(
    r"\.?\d{3}-(original|compressed)\.(mp4|png)(\.\d+\.tmp)?"
)  # or one that was being written
_PIXEL_WIDTH = 128  # videos up to this wide are shown with square pixels


def build_report(data: ReportData, out_dir: str | Path) -> Path:
    """Write `index.html` (videos or images inside, no network needed) and `report.json`; return the page's path.

    Each file is written whole or not at all. In `report.json` video paths are relative to `out_dir`, and the
    summary is filled in. Raises AttarError for data that contradict themselves, a video or image that is missing or
    neither mp4 nor PNG, a mixture of both, and a folder that cannot be written.
    """
    data.check()
    out = Path(out_dir)
    media = [
        (_media(pair.reference, f"pairs[{k}].reference"), _media(pair.compressed, f"pairs[{k}].compressed"))
        for k, pair in enumerate(data.pairs)
    ]
    kinds = {uri.partition(";")[0] for pair in media for uri in pair}
    if len(kinds) > 1:
        raise AttarError("videos and images are mixed", where="pairs", fix="Give one kind")
    still = kinds == {"data:image/png"}
    data = dataclasses.replace(data, summary=data.summary or summarise(data.pairs))
    page = environment().get_template("report.html.j2").render(**_context(data, still), media=media)
    pairs = [
        dataclasses.replace(
            pair, reference=_relative(pair.reference, out), compressed=_relative(pair.compressed, out)
        )
        for pair in data.pairs
    ]
    write_text(out / "report.json", dataclasses.replace(data, pairs=pairs).to_json() + "\n")
    write_text(out / "index.html", page)
    return out / "index.html"


def check_report_folder(folder: Path) -> None:
    """Raises AttarError unless `folder` is empty or new, or holds a report, finished or not, that may be replaced."""
    if not folder.is_dir() or all(_begun(path) for path in folder.iterdir()):
        return
    report = folder / "report.json"
    try:
        ReportData.from_json(report.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, AttarError) as error:
        what = "the folder is not empty and holds no report of attar"
        raise AttarError(what, where=str(folder), fix="Name a new folder") from error


def _begun(path: Path) -> bool:
    """Whether an entry is what a comparison leaves that was stopped before its report."""
    known = path.name in ("videos", "images") and path.is_dir()
    return known and all(map(_MEDIA.fullmatch, os.listdir(path)))


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all. Raises AttarError if it cannot be written."""
    with writing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@cache
def environment() -> Environment:
    """The jinja environment of the templates; only HTML templates are escaped."""
    env = Environment(
        loader=PackageLoader("attar.evaluate"),
        autoescape=lambda name: name is not None and ".html" in name,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    env.filters.update(
        bytes=format_bytes,
        figure=_figure,
        percent=lambda share: f"{100 * share:.1f}".removesuffix(".0"),
        signed=lambda value, digits: (
            f"{value:+.{digits}f}".replace("-", "−") if round(value, digits) else "0"
        ),
    )
    return env


def _context(data: ReportData, still: bool) -> dict[str, Any]:
    summary, reference, compressed = data.summary, data.reference, data.compressed
    assert summary is not None
    parts = list(dict.fromkeys([*reference.parts, *compressed.parts]))
    shared = [(part, reference.parts.get(part), compressed.parts.get(part)) for part in parts]
    shrunk = [(old / new, part) for part, old, new in shared if old and new and old > new]
    before, after = reference.total_bytes, compressed.total_bytes
    accuracy = summary.accuracy
    curves = [row for row in data.attention if len(row.curve) > 1]
    weights = [row for row in data.attention if row.weights]
    selection = data.selection
    return {
        "data": data,
        "still": still,
        "noun": "image" if still else "video",
        "summary": summary,
        "infinity": math.inf,
        "size_ratio": before / after if before and after else None,
        "size_rows": shared,
        "best_part": max(shrunk)[::-1] if shrunk and len(parts) > 1 else None,
        "largest": max(before, after),
        "headline": accuracy.get("all") or next(iter(accuracy.values()), None),
        "speed": _speed(reference.seconds_per_video, compressed.seconds_per_video),
        "pixels": data.generation.width <= _PIXEL_WIDTH,
        "pool": sum(len(row) for row in selection.scores) if selection else 0,
        "percentiles": _outer_percentiles(weights),
        "plan_parameters": any(row.parameters is not None for row in data.plan),
        "plan_reasons": any(row.reason for row in data.plan),
        "plan_treatments": any(row.treatment for row in data.plan),
        "notes": _notes(data, "an image" if still else "a video"),
        "charts": {
            "selection": charts.selection_map(selection) if selection else None,
            "blocks": charts.block_errors(data.block_errors) if data.block_errors else None,
            "steps": charts.timestep_errors(data.timestep_errors) if data.timestep_errors else None,
            "curves": charts.mass_curves(curves) if curves else None,
            "weights": charts.weight_ranges(weights) if weights else None,
        },
    }


def _notes(data: ReportData, one: str) -> list[str]:
    """What a reader must know to judge the figures: who computed them, and where."""
    notes = []
    for model in (data.reference, data.compressed):
        facts = [model.backend.strip().rstrip(".")] if model.backend else []
        if model.seconds_per_video is not None:
            place = f" on {model.hardware}" if model.hardware else ", hardware not named"
            facts.append(f"{_figure(model.seconds_per_video, 2)} s for {one}{place}")
        if facts:
            notes.append(f"{model.name}, {model.bits}: {'; '.join(facts)}.")
    return [*notes, *data.notes]


def _speed(before: float | None, after: float | None) -> str | None:
    if after is None:
        return None
    if not before or not after:
        return "original not measured"
    ratio = before / after
    verdict = f"{ratio:.2f}× faster" if ratio >= 1 else f"{1 / ratio:.2f}× slower"
    return f"{verdict} than {_figure(before, 2)} s"


def _outer_percentiles(rows: list[AttentionMass]) -> str:
    return f"{min(rows[0].weights)} – {max(rows[0].weights)}" if rows else ""


def _figure(value: float, digits: int) -> str:
    return "∞" if math.isinf(value) else f"{value:.{digits}f}"


def _relative(video: str, out: Path) -> str:
    return video if video.startswith("data:") else Path(os.path.relpath(video, out)).as_posix()


def _media(source: str, where: str) -> str:
    """The data URI of a video or an image, after a look at its first bytes."""
    uri = source if source.startswith("data:") else to_data_uri(source)
    try:
        found = media_type(base64.b64decode(uri.partition(",")[2][:16], validate=True))
    except ValueError as error:
        raise AttarError(
            "not a video", where=where, fix="Give the path or the bytes of an mp4 or PNG file"
        ) from error
    if found is None:
        name = "" if source.startswith("data:") else f" {source}"
        fix = "Write it with save_video or save_image"
        raise AttarError("not an mp4 or PNG file", where=f"{where}{name}", fix=fix)
    return f"data:{found};{uri.partition(';')[2]}"
