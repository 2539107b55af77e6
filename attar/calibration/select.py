"""Which (prompt, denoising step) candidates become calibration samples.

Salient Data Selection of S²Q-VDiT (arXiv 2508.04016): score = C̄_diff · C̄_quant over the whole candidate
pool; and the policies it is to be compared with. A policy ranks candidates; `select` takes the first ones.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from random import Random

import torch
from torch import Tensor

from attar.errors import AttarError

# ---------------------------------------------------------------------------------------------- metrics


def patchify(latents: Tensor, patch: int | tuple[int, int, int], layout: str = "BCFHW") -> Tensor:
    """Latents as matrices of tokens.

    latents: axes named by `layout`, a permutation of BCFHW with B and F optional (video "BCFHW" or "BFCHW",
    image "BCHW", single sample "CFHW"). patch: spatial patch size p, or (frames, height, width).
    Returns (B, n, C·pf·ph·pw), or (n, C·pf·ph·pw) for a layout without B.
    Raises AttarError when a size is no multiple of its patch.
    """
    if latents.ndim != len(layout) or not set("CHW") <= set(layout) <= set("BCFHW"):
        raise AttarError(f"latents of shape {tuple(latents.shape)} do not fit the layout {layout!r}")
    order = [layout.index(axis) for axis in "BCFHW" if axis in layout]
    x = latents.permute(order)
    if "B" not in layout:
        x = x[None]
    if "F" not in layout:
        x = x[:, :, None]
    b, c, f, h, w = x.shape
    pf, ph, pw = (1, patch, patch) if isinstance(patch, int) else patch
    if f % pf or h % ph or w % pw:
        raise AttarError(f"latents of {f}×{h}×{w} are no multiple of the patch {pf}×{ph}×{pw}")
    x = x.reshape(b, c, f // pf, pf, h // ph, ph, w // pw, pw).permute(0, 2, 4, 6, 1, 3, 5, 7)
    tokens = x.reshape(b, -1, c * pf * ph * pw)  # (B, n, C·pf·ph·pw)
    return tokens if "B" in layout else tokens[0]


def change_metric(x: Tensor, x_next: Tensor) -> Tensor:
    """C_diff = ‖x_t − x_{t−1}‖² / ‖x_t‖² of each sample (S²Q-VDiT, SDS).

    x, x_next: (m, …), the latents before and after the denoising step. Returns (m,) float32.
    """
    before, after = x.float().flatten(1), x_next.float().flatten(1)
    tiny = torch.finfo(torch.float32).tiny
    return (before - after).square().sum(1) / before.square().sum(1).clamp_min(tiny)


def amplification_metric(x: Tensor, norm: str = "spectral", iterations: int = 20) -> Tensor:
    """C_quant = ‖XᵀX‖ of each matrix of tokens (S²Q-VDiT, SDS): how much a weight error is amplified.

    x: (n, d) or (m, n, d). norm: "spectral", the largest eigenvalue by `iterations` products with XᵀX from a
    fixed start vector, or "frobenius". The spectral norm is taken over all iterates at once (Lanczos), which
    costs what plain power iteration costs and is never less accurate. Works sample by sample, so the result
    does not depend on the batch split, and never forms an n×n matrix. Returns (m,) float32, m = 1 for (n, d).
    Raises AttarError for an unknown norm.
    """
    if norm not in ("spectral", "frobenius"):
        raise AttarError(f"unknown amplification norm {norm!r}", fix="Use spectral or frobenius")
    matrices = x.float()[None] if x.ndim == 2 else x.float()
    if norm == "frobenius":
        return torch.stack([torch.linalg.matrix_norm(m.T @ m) for m in matrices])
    return torch.stack([_largest_eigenvalue(m, iterations) for m in matrices])


def _largest_eigenvalue(x: Tensor, iterations: int) -> Tensor:
    """Largest eigenvalue of XᵀX, X (n, d): Lanczos with full reorthogonalisation."""
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(x.shape[1], generator=generator).to(x.device)
    v = v / v.norm()
    size = min(iterations, x.shape[1])
    basis = x.new_zeros(size, x.shape[1])
    images = x.new_zeros(size, x.shape[1])  # XᵀX times each basis vector
    for k in range(size):
        basis[k] = v
        image = x.T @ (x @ v)
        images[k] = image
        # Twice is enough: one Gram–Schmidt pass loses orthogonality once an eigenvector has converged.
        rest = image - basis[: k + 1].T @ (basis[: k + 1] @ image)
        rest = rest - basis[: k + 1].T @ (basis[: k + 1] @ rest)
        length = rest.norm()
        if length <= 1e-6 * image.norm():  # the Krylov space is exhausted
            size = k + 1
            break
        v = rest / length
    projected = basis[:size] @ images[:size].T
    return torch.linalg.eigvalsh((projected + projected.T) / 2)[-1].clamp_min(0)


def min_max(scores: Tensor) -> Tensor:
    """Scores moved to [0, 1] over the whole pool; a pool of equal scores gives ones (S²Q-VDiT, SDS)."""
    scores = torch.as_tensor(scores, dtype=torch.float64)
    smallest, largest = scores.min(), scores.max()
    if largest == smallest:
        return torch.ones_like(scores)
    return (scores - smallest) / (largest - smallest)


def rank(scores: Tensor) -> Tensor:
    """Ranks in the pool, moved to [0, 1]; ties share their mean rank, a pool of equal scores gives ones.

    Where min–max leaves the choice to a few candidates, because one large value compresses all others, ranks do not
    (not in the paper).
    """
    return min_max(_ranks(torch.as_tensor(scores)))


NORMALISATIONS: dict[str, Callable[[Tensor], Tensor]] = {"min_max": min_max, "rank": rank}


def _ranks(values: Tensor) -> Tensor:
    """1 for the smallest; ties share their mean rank."""
    _, group, sizes = values.double().flatten().unique(return_inverse=True, return_counts=True)
    last = sizes.cumsum(0).double()
    return (last - (sizes - 1) / 2)[group]


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's rank correlation of two metrics; ties share their mean rank, a constant metric gives 0."""
    x, y = _ranks(torch.as_tensor(a)), _ranks(torch.as_tensor(b))
    x, y = x - x.mean(), y - y.mean()
    length = x.norm() * y.norm()
    return float(x @ y / length) if length > 0 else 0.0


# ------------------------------------------------------------------------------------------ score table


@dataclass
class ScoreTable:
    """The candidate pool, one entry per (prompt, denoising step), in a fixed order.

    prompt, step: indices, step counting from the start of sampling; change: C_diff; amplification: C_quant;
    score: product of both after their normalisation over the pool. norm_correlation: Spearman's, of C_quant in the
    spectral and in the Frobenius norm, where both were computed.
    """

    prompt: list[int]
    step: list[int]
    change: list[float]
    amplification: list[float]
    score: list[float]
    norm_correlation: float | None = None

    def __post_init__(self) -> None:
        if len({len(column) for column in asdict(self).values() if isinstance(column, list)}) != 1:
            raise AttarError("the columns of a score table differ in length")

    @classmethod
    def build(
        cls,
        prompt: Sequence[int],
        step: Sequence[int],
        change: Sequence[float] | Tensor,
        amplification: Sequence[float] | Tensor,
        normalise: str = "min_max",
    ) -> ScoreTable:
        """The table with its scores. normalise: "min_max" (S²Q-VDiT) or "rank".

        Raises AttarError when a metric is not finite.
        """
        if not len(prompt):
            raise AttarError("the candidate pool is empty", fix="Trace at least one prompt")
        changes = torch.as_tensor(change, dtype=torch.float64).cpu()
        amplifications = torch.as_tensor(amplification, dtype=torch.float64).cpu()
        for name, values in (("change", changes), ("amplification", amplifications)):
            if not torch.isfinite(values).all():
                worst = int((~torch.isfinite(values)).nonzero()[0])
                raise AttarError(
                    f"the {name} metric of a candidate is not finite",
                    where=f"prompt {prompt[worst]}, step {step[worst]}",
                    fix="Check the traced latents for NaN or overflow",
                )
        normalised = NORMALISATIONS[normalise]
        score = normalised(changes) * normalised(amplifications)
        return cls(list(prompt), list(step), changes.tolist(), amplifications.tolist(), score.tolist())

    def __len__(self) -> int:
        return len(self.prompt)

    def to_json(self) -> str:
        """One JSON object of its columns; floats keep all their digits."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> ScoreTable:
        return cls(**json.loads(text))


def selection_histogram(table: ScoreTable, chosen: Sequence[int]) -> dict[str, dict[int, int]]:
    """How many chosen candidates each prompt and each step has: {"prompt": {…}, "step": {…}}."""
    return {
        "prompt": dict(sorted(Counter(table.prompt[i] for i in chosen).items())),
        "step": dict(sorted(Counter(table.step[i] for i in chosen).items())),
    }


# --------------------------------------------------------------------------------------------- policies


def _descending(values: Sequence[float]) -> list[int]:
    return sorted(range(len(values)), key=lambda i: -values[i])  # stable: ties keep the pool's order


def _by_prompt(table: ScoreTable) -> dict[int, list[int]]:
    """Candidates of each prompt, in the order of their steps."""
    groups: dict[int, list[int]] = defaultdict(list)
    for i in sorted(range(len(table)), key=lambda i: table.step[i]):
        groups[table.prompt[i]].append(i)
    return dict(sorted(groups.items()))


def _evenly(items: list[int], count: int) -> list[int]:
    """`count` of the items, evenly spaced from the middle of the first share to the middle of the last."""
    count = min(count, len(items))
    return [items[int((k + 0.5) * len(items) / count)] for k in range(count)]


def _shares(count: int, parts: int) -> list[int]:
    return [count // parts + (k < count % parts) for k in range(parts)]


def _random(table: ScoreTable, count: int, rng: Random) -> list[int]:
    return rng.sample(range(len(table)), len(table))


def _steps_of_prompts(prompts: int, random_steps: bool) -> Callable[[ScoreTable, int, Random], list[int]]:
    """`count` samples spread over the steps of a few random prompts (ATOP, ATFP, RTFP)."""

    def policy(table: ScoreTable, count: int, rng: Random) -> list[int]:
        pool = _by_prompt(table)
        chosen = sorted(rng.sample(list(pool), min(prompts, len(pool))))
        pick = (lambda items, k: sorted(rng.sample(items, min(k, len(items))))) if random_steps else _evenly
        shares = _shares(count, len(chosen))
        return [i for prompt, share in zip(chosen, shares, strict=True) for i in pick(pool[prompt], share)]

    return policy


def _last_steps(table: ScoreTable, count: int, rng: Random) -> list[int]:
    return sorted(range(len(table)), key=lambda i: (-table.step[i], table.prompt[i]))


def _uniform_steps(table: ScoreTable, count: int, rng: Random) -> list[int]:
    """Steps evenly spaced over the trajectory, each with prompts in a random order of its own."""
    by_step: dict[int, list[int]] = defaultdict(list)
    for i in range(len(table)):
        by_step[table.step[i]].append(i)
    steps = sorted(by_step)
    for step in steps:
        rng.shuffle(by_step[step])
    chosen = []
    for round_ in range(len(table)):
        left = [step for step in steps if round_ < len(by_step[step])]
        wanted = count - len(chosen)
        if wanted <= 0 or not left:
            break
        chosen += [by_step[step][round_] for step in _evenly(left, wanted)]
    return chosen


def _salient_stratified(table: ScoreTable, count: int, rng: Random) -> list[int]:
    """The best score inside each stratum of steps, then the second best of each, and so on."""
    steps = sorted(set(table.step))
    strata = min(count, len(steps))
    stratum_of = {step: k * strata // len(steps) for k, step in enumerate(steps)}
    groups: list[list[int]] = [[] for _ in range(strata)]
    for i in _descending(table.score):
        groups[stratum_of[table.step[i]]].append(i)
    depth = max(len(group) for group in groups)
    return [group[k] for k in range(depth) for group in groups if k < len(group)]


POLICIES: dict[str, Callable[[ScoreTable, int, Random], list[int]]] = {
    "salient": lambda table, count, rng: _descending(table.score),
    "change": lambda table, count, rng: _descending(table.change),
    "amplification": lambda table, count, rng: _descending(table.amplification),
    "lowest": lambda table, count, rng: _descending([-s for s in table.score]),
    "random": _random,
    "one_prompt_all_steps": _steps_of_prompts(1, random_steps=False),  # ATOP
    "few_prompts_all_steps": _steps_of_prompts(5, random_steps=False),  # ATFP
    "few_prompts_random_steps": _steps_of_prompts(5, random_steps=True),  # RTFP
    "last_steps": _last_steps,
    "uniform_steps": _uniform_steps,
    "salient_stratified": _salient_stratified,
}


def select(
    policy: str,
    table: ScoreTable,
    count: int,
    seed: int = 0,
    *,
    cap_per_prompt: int | None = None,
    cap_per_step: int | None = None,
) -> list[int]:
    """Indices into the table of the `count` candidates that the policy prefers, best first.

    "salient" is S²Q-VDiT's SDS: the highest scores, ties by index. cap_per_prompt and cap_per_step bound how
    many candidates one prompt or one step may give (not in the paper). Deterministic for a given table and
    seed. Raises AttarError for an unknown policy and when the pool cannot give `count` candidates.
    """
    if policy not in POLICIES:
        raise AttarError(f"unknown selection policy {policy!r}", fix=f"Use one of {', '.join(POLICIES)}")
    if count < 1:
        raise AttarError(f"{count} calibration samples were asked for", fix="Ask for at least one")
    per_prompt, per_step = Counter[int](), Counter[int]()
    chosen: list[int] = []
    for i in POLICIES[policy](table, count, Random(seed)):
        if len(chosen) == count:
            break
        if cap_per_prompt is not None and per_prompt[table.prompt[i]] >= cap_per_prompt:
            continue
        if cap_per_step is not None and per_step[table.step[i]] >= cap_per_step:
            continue
        per_prompt[table.prompt[i]] += 1
        per_step[table.step[i]] += 1
        chosen.append(i)
    if len(chosen) < count:
        raise AttarError(
            f"the policy {policy!r} finds {len(chosen)} of {count} samples in a pool of {len(table)}",
            fix="Ask for fewer samples, trace more prompts or steps, or raise the caps",
        )
    return chosen
