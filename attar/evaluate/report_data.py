"""What a comparison report is made of: plain dataclasses that go to JSON and back without loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic_core import PydanticSerializationError

from attar.errors import AttarError
from attar.evaluate.statistics import Estimate, mean_interval, proportion_interval
from attar.evaluate.video import to_data_uri


@dataclass
class ModelFacts:
    """One of the two models. `parts`: bytes of weights by component. `seconds_per_video`: wall time."""

    name: str
    bits: str  # "bf16", "W4A6"
    parts: dict[str, int] = field(default_factory=dict)
    recipe: str | None = None
    backend: str | None = None  # a sentence: "reference backend: exact, not fast"
    seconds_per_video: float | None = None
    hardware: str | None = None

    @property
    def total_bytes(self) -> int:
        return sum(self.parts.values())


@dataclass
class Generation:
    """How both models' videos were made. height, width: of the model's own output, in pixels."""

    steps: int
    guidance_scale: float
    seed: int
    fps: float
    frames: int
    height: int
    width: int
    extra: dict[str, str] = field(default_factory=dict)


@dataclass
class VideoPair:
    """The two videos of one prompt and one noise. Each is a path of an mp4, or of a PNG for images, or its bytes.

    Bytes are kept as a data URI. `psnr` in dB, `inf` for identical videos. The two quality dictionaries
    hold the same attributes, e.g. {"digit": True, "colour": True}: whether the video shows what the prompt
    asked for.
    """

    prompt: str
    reference: str
    compressed: str
    psnr: float | None = None
    ssim: float | None = None
    reference_quality: dict[str, bool] = field(default_factory=dict)
    compressed_quality: dict[str, bool] = field(default_factory=dict)
    seed: int | None = None

    def __post_init__(self) -> None:
        self.reference, self.compressed = _reference_to(self.reference), _reference_to(self.compressed)


@dataclass
class Accuracy:
    """Share of videos that show an attribute of their prompt, for both models."""

    reference: Estimate
    compressed: Estimate


@dataclass
class Summary:
    """The figures of the whole comparison. `accuracy` by attribute; "all": every attribute right at once."""

    videos: int
    psnr: Estimate | None = None
    ssim: Estimate | None = None
    latent_error: Estimate | None = None
    accuracy: dict[str, Accuracy] = field(default_factory=dict)


@dataclass
class ChosenSample:
    """One calibration sample: indices of its prompt and its step in the score table."""

    prompt: int
    step: int
    score: float


@dataclass
class Selection:
    """The calibration samples and the pool they come from. scores: (prompts, steps).

    norm_correlation: Spearman's, of C_quant in the spectral and in the Frobenius norm over the pool.
    """

    policy: str
    prompts: list[str]
    scores: list[list[float]]
    chosen: list[ChosenSample]
    norm_correlation: float | None = None


@dataclass
class BlockError:
    """Relative output error of one block before and after its reconstruction."""

    block: str
    before: float
    after: float


@dataclass
class AttentionMass:
    """How unevenly one block's tokens receive attention.

    curve: cumulative share of the attention mass held by the most attended tokens, at evenly spaced shares
    of the tokens from 0 to 1. weights: percentiles of the token weight λ, {5: …, 25: …, 50: …, 75: …, 95:
    …}.
    """

    block: str
    curve: list[float] = field(default_factory=list)
    weights: dict[int, float] = field(default_factory=dict)


@dataclass
class TimestepError:
    """Relative error of the compressed denoiser's output at one step of the original's trajectory."""

    step: int
    timestep: float
    error: float


@dataclass
class PlanRow:
    """Layers of one role that are treated alike.

    bits: "W4A6", "W4A16g64" with a scale for 64 input channels, or "kept". reason: of an exception. treatment: what
    these layers went through, in order: "channel scale, kronecker, weight clipping, gptq".
    """

    role: str
    bits: str
    layers: int
    parameters: int | None = None
    reason: str | None = None
    treatment: str | None = None


@dataclass
class ReportData:
    """All that a report shows. Sections without data do not appear.

    Without `summary`, the summary is taken from `pairs`. Give one when more videos were judged than are
    shown.
    """

    title: str
    reference: ModelFacts
    compressed: ModelFacts
    generation: Generation
    pairs: list[VideoPair]
    summary: Summary | None = None
    selection: Selection | None = None
    block_errors: list[BlockError] = field(default_factory=list)
    attention: list[AttentionMass] = field(default_factory=list)
    timestep_errors: list[TimestepError] = field(default_factory=list)
    plan: list[PlanRow] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> str:
        """JSON text; infinite figures become the string "Infinity", since JSON has no number for them."""
        return _ADAPTER.dump_json(self, indent=2).decode()

    @classmethod
    def from_json(cls, text: str | bytes) -> ReportData:
        """The inverse of `to_json`. Raises AttarError naming the first wrong, missing or unknown entry."""
        try:
            return _ADAPTER.validate_json(text)
        except ValidationError as error:
            raise _readable(error) from error

    def check(self) -> None:
        """Raise AttarError for entries of the wrong kind, and for figures that contradict each other."""
        try:
            _ADAPTER.validate_json(_ADAPTER.dump_json(self, warnings=False))
        except ValidationError as error:
            raise _readable(error) from error
        except PydanticSerializationError as error:
            raise AttarError(f"not a report: {error}", fix="Use plain Python numbers and strings") from error
        self._check_figures()

    def _check_figures(self) -> None:
        made = self.generation
        if min(made.steps, made.fps, made.frames, made.height, made.width) <= 0:
            raise AttarError("generation settings must be positive", where="generation")
        if not self.pairs:
            raise AttarError("a report needs at least one pair of videos", where="pairs")
        for name, model in (("reference", self.reference), ("compressed", self.compressed)):
            if any(size < 0 for size in model.parts.values()):
                raise AttarError("a size is negative", where=f"{name}.parts")
        for index, pair in enumerate(self.pairs):
            if pair.reference_quality.keys() != pair.compressed_quality.keys():
                raise AttarError(
                    "the two models are judged on different attributes",
                    where=f"pairs[{index}] {pair.prompt!r}",
                )
        numbers: list[tuple[str, list[float]]] = [
            ("pairs.psnr", [p.psnr for p in self.pairs if p.psnr is not None and p.psnr != math.inf]),
            ("pairs.ssim", [p.ssim for p in self.pairs if p.ssim is not None]),
            ("block_errors", [value for row in self.block_errors for value in (row.before, row.after)]),
            (
                "timestep_errors",
                [value for row in self.timestep_errors for value in (row.timestep, row.error)],
            ),
            ("attention", [v for row in self.attention for v in [*row.curve, *row.weights.values()]]),
        ]
        if self.selection is not None:
            _check_selection(self.selection)
        for where, values in numbers:
            if not all(math.isfinite(value) for value in values):
                raise AttarError(
                    "a figure is not finite", where=where, fix="Leave figures out that do not exist"
                )
            if where.endswith("errors") and min(values, default=0) < 0:
                raise AttarError("an error is negative", where=where, fix="Give relative errors, 0 or more")


def summarise(pairs: Sequence[VideoPair]) -> Summary:
    """The summary of these videos: t-intervals for PSNR and SSIM, Wilson intervals for the shares."""

    def estimate(values: list[float], most: float = math.inf) -> Estimate | None:
        if not values:
            return None
        found = mean_interval(values)
        return found if found.high is None else replace(found, high=min(found.high, most))

    judged = [pair for pair in pairs if pair.reference_quality]
    outcomes: dict[str, tuple[list[bool], list[bool]]] = {}
    for pair in judged:
        before, after = pair.reference_quality, pair.compressed_quality
        rows = [(name, before[name], after[name]) for name in before]
        if len(before) > 1:
            rows.append(("all", all(before.values()), all(after.values())))
        for name, first, second in rows:
            lists = outcomes.setdefault(name, ([], []))
            lists[0].append(first)
            lists[1].append(second)
    if "all" in outcomes:
        outcomes["all"] = outcomes.pop("all")  # shown last
    return Summary(
        videos=len(pairs),
        psnr=estimate([pair.psnr for pair in pairs if pair.psnr is not None]),
        ssim=estimate([pair.ssim for pair in pairs if pair.ssim is not None], most=1.0),
        accuracy={
            name: Accuracy(proportion_interval(first), proportion_interval(second))
            for name, (first, second) in outcomes.items()
        },
    )


def _reference_to(video: Any) -> str:
    if isinstance(video, bytes):
        return to_data_uri(video)
    return video.as_posix() if isinstance(video, Path) else video


def _check_selection(selection: Selection) -> None:
    widths = {len(row) for row in selection.scores}
    if len(selection.scores) != len(selection.prompts) or len(widths) != 1 or 0 in widths:
        raise AttarError(
            "the score table must have one row for each prompt and one column for each step",
            where="selection",
        )
    if not all(math.isfinite(score) for row in selection.scores for score in row):
        raise AttarError("a score is not finite", where="selection.scores")
    steps = widths.pop()
    for sample in selection.chosen:
        if not (0 <= sample.prompt < len(selection.prompts) and 0 <= sample.step < steps):
            raise AttarError(
                f"prompt {sample.prompt}, step {sample.step} is outside the score table",
                where="selection.chosen",
            )


def _readable(error: ValidationError) -> AttarError:
    first = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in first["loc"]) or "report"
    return AttarError(f"not a report: {first['msg']}", where=where, fix="Correct this entry")


for _part in (
    *(ModelFacts, Generation, VideoPair, Accuracy, Summary, Estimate, ChosenSample, Selection),
    *(BlockError, AttentionMass, TimestepError, PlanRow, ReportData),
):
    setattr(_part, "__pydantic_config__", ConfigDict(extra="forbid", ser_json_inf_nan="strings"))  # noqa: B010
_ADAPTER = TypeAdapter(ReportData)
