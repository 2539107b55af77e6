"""Several processes of one job: the checkpoint of one process, one voice, and a workspace that resumes."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from support import pipelines
from support.commands import contents

from attar import ranks
from attar.quantize.reconstruct import _batches
from attar.runtime.packing import unpack

FEW = ("--set", "trace.prompts=3", "--set", "select.count=5", "--set", "reconstruct.epochs=2")
NEAREST = ("--recipe", "learned-base", *FEW)
LEARNED = ("--recipe", "s2q-vdit", *FEW)
BATCHES = (*LEARNED, "--set", "reconstruct.batch_size=2")
RUNS = {
    "no data": ("wan", ("--recipe", "hadamard", "--text-encoder-weights", "4")),
    "nearest": ("wan", NEAREST),
    "learned": ("wan", LEARNED),
    "two segments": ("hunyuan", (*BATCHES, "--set", "reconstruct.propagate=quant")),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: pipelines.save(root / name, name) for name in ("wan", "hunyuan")}


@pytest.fixture(scope="module")
def made(commands, models, tmp_path_factory):
    """The folder of a checkpoint by so many processes, its workspace beside it, made once for each kind of run."""
    folders: dict[tuple[str, int], Path] = {}

    def of(kind: str, processes: int) -> Path:
        if (kind, processes) not in folders:
            model, options = RUNS[kind]
            out = tmp_path_factory.mktemp("made") / "small"
            run(commands, processes, "compress", models[model], "-o", out, *options)
            folders[kind, processes] = out
        return folders[kind, processes]

    return of


def run(commands, processes, *arguments):
    command = commands.start(*arguments, processes=processes)
    codes = command.wait_all()
    assert codes == [0] * processes, [log.read_text() for log in command.logs]
    return command


def evidence(folder: Path) -> dict:
    return json.loads((folder / "compression.json").read_text())["components"]["transformer"]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")


# ---------------------------------------------------------------------------------------------- shares


@given(st.lists(st.integers(), max_size=30), st.integers(1, 7))
def test_shares_make_up_the_list(items, processes):
    shares = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranks, "size", lambda: processes)
        for number in range(processes):
            patch.setattr(ranks, "rank", lambda number=number: number)
            shares.append(ranks.mine(items))
    assert [item for share in shares for item in share] == items
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@given(st.integers(1, 40), st.integers(1, 8), st.integers(0, 5))
def test_batches_are_even_over_the_processes(count, processes, seed):
    """Where the batch has a sample for every process, none takes more than one more than another in a step."""
    batches = list(_batches(count, processes, torch.Generator().manual_seed(seed)))
    assert sorted(i for batch in batches for i in batch) == list(range(count))
    assert len(batches) == -(-count // processes) and [len(b) for b in batches[:-1]] == [processes] * (
        len(batches) - 1
    )
    each, more = divmod(count, processes)
    for batch in batches:
        owners = [
            i // (each + 1) if i < more * (each + 1) else more + (i - more * (each + 1)) // each
            for i in batch
        ]
        assert len(set(owners)) == len(owners)


def test_batches_of_one_are_a_plain_shuffle():
    order = torch.randperm(9, generator=torch.Generator().manual_seed(3)).tolist()
    assert list(_batches(9, 1, torch.Generator().manual_seed(3))) == [[i] for i in order]


COLLECTIVES = """
import torch
from torch import nn
from attar import ranks
assert (ranks.size(), ranks.rank(), ranks.place(4)) == (1, 0, (0, 4))
with ranks.joined("cpu"):
    me, n = ranks.rank(), ranks.size()
    assert n == 3 and ranks.here() == 3 and ranks.is_first() == (me == 0)
    own = ranks.mine(list("abcdefg"))
    assert ranks.collected(own) == list("abcdefg")
    assert ranks.place(len(own)) == ([0, 3, 5][me], 7)
    assert ranks.first(lambda: me + 40) == 40
    assert list(ranks.sums(me, 1)) == [3.0, 3.0]
    assert ranks.max_(torch.tensor([me, -me])).tolist() == [2, 0]
    parameters = [nn.Parameter(torch.full((2, 2), float(me))) for _ in range(3)]
    ranks.same_(parameters)
    assert all((p == 0).all() for p in parameters)
    if me != 1:
        (parameters[0].sum() * (me + 1)).backward()
    if me == 2:
        parameters[1].sum().backward()
    ranks.sum_gradients_(parameters)
    assert parameters[0].grad.tolist() == [[4, 4], [4, 4]] and parameters[1].grad.tolist() == [[1, 1], [1, 1]]
    assert parameters[2].grad is None
    turned = nn.Parameter(torch.arange(6.0).view(2, 3).T)  # as an SVD leaves it, column by column
    (turned * torch.arange(6.0).view(3, 2)).sum().backward()
    ranks.sum_gradients_([turned])
    assert turned.grad.tolist() == [[0, 3], [6, 9], [12, 15]] and turned.grad.stride() == turned.stride()
assert ranks.size() == 1
print("done")
"""


def test_what_the_processes_tell_each_other(commands, tmp_path):
    (tmp_path / "collectives.py").write_text(COLLECTIVES)
    command = run(commands, 3, tmp_path / "collectives.py")
    assert [out.read_text() for out in command.outs] == ["done\n"] * 3


STEPS = """
import itertools
import torch
from torch import nn
from attar import ranks
from attar.losses import mse
from attar.models.block import BlockCall
from attar.quantize.reconstruct import ReconstructionSettings, reconstruct_block

def learn(batch, normalise):
    torch.manual_seed(0)
    layer, idle = nn.Linear(4, 4), nn.Parameter(torch.ones(2))
    calls = [BlockCall({"x": torch.randn(1, 5, 4)}) for _ in range(7)]
    targets = [{"x": torch.randn(1, 5, 4)} for _ in range(7)]
    result = reconstruct_block(
        lambda call: {"x": layer(call.streams["x"]).tanh()}, ranks.mine(calls), ranks.mine(targets),
        {"transform": [*layer.parameters(), idle]},
        ReconstructionSettings(epochs=3, batch_size=batch, normalise_loss=normalise), lambda p, t, _: mse(p, t),
        generator=torch.Generator().manual_seed(1),
    )
    assert (idle == 1).all()  # no process has used it, so it does not decay
    return torch.tensor([result.error_before, *result.history]), layer.weight.detach()

kinds = list(itertools.product((1, 2, 3, 5, 7, 9), (False, True)))
alone = [learn(*kind) for kind in kinds]
with ranks.joined("cpu"):
    together = [learn(*kind) for kind in kinds]
for kind, one, several in zip(kinds, alone, together):
    for a, b in zip(one, several):
        torch.testing.assert_close(b, a, atol=2e-6, rtol=2e-6, msg=str(kind))
print("done")
"""


@pytest.mark.parametrize("processes", [2, 3])
def test_the_steps_of_one_process(processes, commands, tmp_path):
    """Whatever the batch, also where some process has no sample in a step."""
    (tmp_path / "steps.py").write_text(STEPS)
    command = run(commands, processes, tmp_path / "steps.py")
    assert [out.read_text() for out in command.outs] == ["done\n"] * processes


# -------------------------------------------------------------------------- the checkpoint of one process


def test_without_data_the_bytes_are_equal(made):
    assert contents(made("no data", 2)) == contents(made("no data", 1))


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_steps_of_one_sample_are_the_same_steps(made, processes):
    """Each is taken by the process that has the sample: scales, rotations, clips and codes are equal bit for bit."""
    one, several = weights(made("nearest", 1)), weights(made("nearest", processes))
    assert one.keys() == several.keys() and all(torch.equal(one[k], several[k]) for k in one)
    blocks = zip(
        evidence(made("nearest", 1))["blocks"], evidence(made("nearest", processes))["blocks"], strict=True
    )
    for a, b in blocks:
        assert b["error_after"] == pytest.approx(a["error_after"], rel=1e-9) and b["loss"] == pytest.approx(
            a["loss"]
        )


def test_traces_and_selection_are_equal(made):
    one, two = (contents(made("learned", n).with_name("small.work")) for n in (1, 2))
    shared = [n for n in one if n.startswith("trace/") or n in ("job.json", "transformer/selection.json")]
    assert len(shared) == 5 and all(one[n] == two[n] for n in shared)
    assert one.keys() == two.keys()


def test_hessians_are_summed_in_another_order(made):
    """GPTQ may round a code of a hundred to its neighbour; all that was learned is equal bit for bit."""
    one, two = weights(made("learned", 1)), weights(made("learned", 2))
    same = total = 0
    for name, tensor in one.items():
        if name.endswith("codes"):
            a, b = (unpack(t, 4, t.shape[-1] * 2) for t in (tensor, two[name]))
            same, total = same + (a == b).sum().item(), total + a.numel()
        else:
            assert torch.equal(two[name], tensor), name
    assert same > 0.99 * total


def test_batches_that_are_shared(made):
    """Other roundings in every step: the first block learns the same curve, the later ones do as well."""
    one, two = (evidence(made("two segments", n))["blocks"] for n in (1, 2))
    assert two[0]["loss"] == pytest.approx(one[0]["loss"], rel=1e-4)
    for a, b in zip(one, two, strict=True):
        assert b["attention"]["curve"] == pytest.approx(a["attention"]["curve"], rel=0.05)
        assert 0.8 < b["error_after"] / a["error_after"] < 1.25
        assert b["error_after"] < b["error_before"]


@pytest.mark.slow
def test_streamed_by_several_processes(commands, models, made, tmp_path):
    model, options = RUNS["two segments"]
    run(commands, 2, "compress", models[model], "-o", tmp_path / "small", *options, "--stream")
    assert contents(tmp_path / "small") == contents(made("two segments", 2))


# -------------------------------------------------------------------------------------- kills and errors


def killed(command, rank: int) -> None:
    """The process of that rank was; the others said so, in one line, and ended."""
    codes = command.wait_all()
    assert codes.pop(rank) == -9 and set(codes) == {1}, [log.read_text() for log in command.logs]
    said = [
        line for line in "".join(log.read_text() for log in command.logs).splitlines() if "error:" in line
    ]
    assert len(said) == 1 and said[0].startswith("error: another process of this job ended"), said
    assert said[0].endswith("Run the same command again; it goes on")


@pytest.mark.slow
def test_killed_before_every_file(commands, models, made, tmp_path):
    """The processes take turns in being killed, the first one before its third file, the second before any."""
    model, options = RUNS["two segments"]
    out, kills = tmp_path / "small", 0
    for turn in range(40):
        arguments = ("compress", models[model], "-o", out, *options)
        command = commands.start(*arguments, processes=2, writes=(2, 0)[turn % 2], deadly=turn % 2)
        if (codes := command.wait_all()) == [0, 0]:
            break
        assert codes[turn % 2] == -9 and not out.exists()
        kills += 1
    assert kills >= 5 and contents(out) == contents(made("two segments", 2))
    left = contents(tmp_path / "small.work")
    assert not [name for name in left if name.endswith(".tmp") or "boundary" in name]


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), pytest.param(3, 2, marks=pytest.mark.slow)])
def test_resumed_by_another_number_of_processes(before, after, commands, models, made, tmp_path):
    """Streams at the entrance of a block are found again, however many have written them."""
    model, options = RUNS["nearest"]
    out, work = tmp_path / "small", tmp_path / "small.work" / "transformer"
    arguments = ("compress", models[model], "-o", out, *options)
    # of 5 files: job, traces, selection, boundary 1, block 0; then boundary 2
    writes = {1: 7, 2: 6, 3: 5}[before]
    command = commands.start(*arguments, processes=before, writes=writes)
    if before == 1:
        assert command.wait() == -9
    else:
        killed(command, 0)
    assert (work / "block-000.safetensors").is_file() and not (work / "block-001.safetensors").is_file()
    assert len([p for p in work.iterdir() if p.name.startswith("boundary-001")]) == before
    run(commands, after, *arguments)
    one, several = weights(made("nearest", 1)), weights(out)
    assert all(torch.equal(one[k], several[k]) for k in one)
    assert not [p for p in work.iterdir() if "boundary" in p.name]


@pytest.mark.slow
def test_a_launcher_ends_the_job_and_it_resumes(commands, models, made, tmp_path):
    """The real command under a real launcher, one of its two processes killed."""
    model, options = RUNS["two segments"]
    out = tmp_path / "small"
    arguments = ["compress", str(models[model]), "-o", str(out), *options]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command = [*launch, "--main_process_port", "0", "-m", "attar", *arguments, "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as launched:
        boundary = tmp_path / "small.work" / "transformer" / "boundary-001.safetensors"
        while not boundary.is_file() and launched.poll() is None:
            time.sleep(0.002)
        (second,) = (p for p in psutil.Process(launched.pid).children() if p.environ().get("RANK") == "1")
        second.kill()
        started = time.monotonic()
        _, said = launched.communicate(timeout=60)
    assert launched.returncode != 0 and time.monotonic() - started < 20
    errors = [line for line in said.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and "another process of" in errors[0], said
    assert "Run the same command again; it goes on" in errors[0] and not out.exists()
    run(commands, 2, *arguments)
    assert contents(out) == contents(made("two segments", 2))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (("--set", "select.count=1"), "2 processes cannot share select.count = 1 calibration samples"),
        (("--set", "quantize.weights=9"), "choose between 2 and 8 bits"),
        (("--workspace", "{model}"), "the workspace lies in the model that is compressed"),
    ],
)
def test_an_error_is_said_once(wrong, message, commands, models, tmp_path):
    model, options = RUNS["nearest"]
    wrong = [part.format(model=models[model]) for part in wrong]
    command = commands.start(
        "compress", models[model], "-o", tmp_path / "small", *options, *wrong, processes=2
    )
    assert command.wait_all() == [1, 1]
    said = "".join(log.read_text() for log in command.logs)
    assert said.count("error:") == 1 and message in said and "Traceback" not in said


def test_the_result_and_the_plan_are_printed_once(commands, models, tmp_path):
    model, options = RUNS["nearest"]
    arguments = ("compress", models[model], "-o", tmp_path / "small", *options)
    plan = run(commands, 2, *arguments, "--dry-run")
    assert (
        "blocks.0" in plan.outs[0].read_text() and plan.outs[1].read_text() == plan.logs[1].read_text() == ""
    )
    done = run(commands, 2, *arguments)
    assert "W4A6" in done.outs[0].read_text() and done.outs[1].read_text() == done.logs[1].read_text() == ""
    assert "2 processes: prompts and calibration samples are shared, but" in done.logs[0].read_text()
    assert "--set reconstruct.batch_size=2" in done.logs[0].read_text()
