"""The command line: what it prints where."""

import json
import shlex
import subprocess
import sys

import pytest
from support import pipelines
from support.fixtures import SMALL

import attar
from attar.errors import AttarError
from attar.identity import pipeline_fingerprint
from attar.models.source import Source, find_source, load, read_prompts
from attar.recipe import load_recipe, recipe_names
from attar.runtime import backend_description


@pytest.mark.parametrize(
    ("command", "kind"),
    [
        (["recipes", "--json"], list),
        (["recipes", "show", "s2q-vdit", "--json"], dict),
        (["compress", "WAN", "--dry-run", "--json", *SMALL], dict),
        (["compress", "WAN", "-o", "OUT/small", "--json", *SMALL], dict),
        (["generate", "WAN", "a dog", "a fox", "-o", "OUT/x.mp4", "--steps", "1", "--json"], list),
        (["compare", "WAN", "WAN", "-o", "OUT/report", "--steps", "1", "-n", "1", "--json"], dict),
    ],
    ids=lambda value: " ".join(value[:3]) if isinstance(value, list) else "",
)
def test_json_and_nothing_else_on_stdout(command, kind, commands, wan_folder, tmp_path):
    """Neither from Python nor from what libraries write to the descriptor itself."""
    arguments = [part.replace("WAN", str(wan_folder)).replace("OUT", str(tmp_path)) for part in command]
    done = commands.start(*arguments)
    assert done.wait() == 0, done.log.read_text()

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    assert isinstance(json.loads(done.out.read_text(), parse_constant=refuse), kind)


def test_recipes(cli):
    done = cli("recipes")
    assert done.code == 0 and done.err == ""
    assert all(f"\n{name}" in f"\n{done.out}" for name in recipe_names()) and done.out.count("(default)") == 1
    shown = cli("recipes", "show", "s2q-vdit", "--set", "quantize.weights=3")
    assert "weights: 3" in shown.out and "cap_quantile: null" in shown.out


def test_compress_says_what_it_did(cli, wan_folder, tmp_path):
    done = cli("compress", wan_folder, "-o", tmp_path / "small", *SMALL)
    assert done.code == 0
    first, second = done.out.splitlines()
    assert "s2q-vdit W4A6, block linears" in first and "can be deleted" in second
    assert done.err.count("blocks.") == 3 and "→" in done.err


def test_the_version(cli):
    assert cli("--version").out == f"attar {attar.__version__}\n"


def test_the_next_command_can_be_pasted(cli, wan_folder, tmp_path):
    output = tmp_path / "a'b $(touch x)"
    line = cli("compress", wan_folder, "-o", output, "--recipe", "rtn").out.splitlines()[-1]
    command = shlex.split(line.partition("next: ")[2])
    assert command == ["attar", "compare", str(wan_folder), str(output), "-o", f"{output.name}-report"]


def test_generate(cli, wan_folder, tmp_path):
    done = cli(
        "generate", wan_folder, "a dog", "-o", tmp_path / "new" / "x.mp4", "--steps", "1", "--frames", "5"
    )
    assert done.code == 0 and (tmp_path / "new" / "x.mp4").stat().st_size > 0
    assert "backend" not in done.err
    assert cli("compress", wan_folder, "-o", tmp_path / "small", "--recipe", "rtn").code == 0
    done = cli("generate", tmp_path / "small", "a dog", "a fox", "-o", tmp_path / "y.mp4", "--steps", "1")
    assert done.code == 0 and f"backend {backend_description()}" in done.err
    assert sorted(p.name for p in tmp_path.glob("y*.mp4")) == ["y-0.mp4", "y-1.mp4"]


def test_sizes_of_the_calibration(cli, wan_folder, tmp_path):
    options = ("--height", "16", "--width", "16", "--frames", "5")
    assert cli("compress", wan_folder, "-o", tmp_path / "small", *SMALL, *options).code == 0
    evidence = json.loads((tmp_path / "small" / "compression.json").read_text())
    assert evidence["generation"]["width"] == 16 and evidence["generation"]["num_frames"] == 5


def test_help(cli):
    for command in ([], ["compress"], ["generate"], ["compare"], ["plan"], ["recipes"]):
        done = cli(*command, "--help")
        assert done.code == 0 and "Usage" in done.out
    bare = cli()
    assert bare.code == 2 and "Usage" in bare.out + bare.err


def test_a_reader_that_goes_away(wan_folder):
    command = f"{sys.executable} -m attar recipes show s2q-vdit | head -c 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert "Traceback" not in done.stderr and "error" not in done.stderr


# ---------------------------------------------------------------------------------------------- sources


def test_call_arguments():
    source = Source("x", generation={"height": 16, "fps": 8, "guidance_scale": 4.0})
    assert source.call_arguments(height=None, num_frames=5) == {
        "height": 16,
        "guidance_scale": 4.0,
        "num_frames": 5,
    }
    assert source.call_arguments(height=32)["height"] == 32 and source.fps == 8
    assert Source("x").fps == 16


def test_what_a_folder_brings(wan_folder):
    source = find_source(str(wan_folder))
    assert source.prompts == pipelines.PROMPTS and source.generation["num_inference_steps"] == 3
    assert type(load(str(wan_folder))).__name__ == "WanPipeline"


def test_prompts_of_a_file(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffein Fuchs läuft\r\n\r\n  a dog  \n".encode())
    assert read_prompts(file) == ["ein Fuchs läuft", "a dog"]
    file.write_text("\n")
    with pytest.raises(AttarError, match="is empty"):
        read_prompts(file)


def test_videos_are_kept_as_they_come(cli, wan_folder, tmp_path, monkeypatch):
    """What was made before a failure or an interrupt is there, and no resumption is promised."""
    from attar.evaluate import generate as module

    options = ("--steps", "1", "--frames", "5")
    three = ("generate", wan_folder, "a dog", "a fox", "a cat", *options)
    assert cli(*three, "-o", tmp_path / "all.mp4").code == 0
    make = module.generate

    def interrupted(pipe, prompts, **given):
        if prompts == ["a cat"]:
            raise KeyboardInterrupt
        return make(pipe, prompts, **given)

    monkeypatch.setattr(module, "generate", interrupted)
    done = cli(*three, "-o", tmp_path / "some.mp4")
    assert done.code == 130 and "interrupted" in done.err and "again" not in done.err
    assert sorted(p.name for p in tmp_path.glob("some*")) == ["some-0.mp4", "some-1.mp4"]
    for i in (0, 1):
        assert (tmp_path / f"some-{i}.mp4").read_bytes() == (tmp_path / f"all-{i}.mp4").read_bytes()


def test_the_fingerprint_of_a_model(wan_folder, tmp_path):
    known = pipeline_fingerprint(load(str(wan_folder)))
    assert known == pipeline_fingerprint(load(str(wan_folder)))
    pipe = load(str(wan_folder))
    pipe.transformer.blocks[1].ffn.net[2].weight.data[0, 0] += 1
    assert pipeline_fingerprint(pipe) != known
    pipe = load(str(wan_folder))
    pipe.scheduler.register_to_config(shift=9.0)
    assert pipeline_fingerprint(pipe) != known
    pipe = load(str(wan_folder))
    pipe.register_to_config(boundary_ratio=0.5)
    assert pipeline_fingerprint(pipe) != known
    code = "import sys; from attar.models.source import load; from attar.identity import pipeline_fingerprint as of"
    command = [sys.executable, "-c", f"{code}; print(of(load(sys.argv[1])))", str(wan_folder)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == known


def test_set_reads_yaml(cli):
    shown = json.loads(
        cli("recipes", "show", "rtn", "--json", "--set", "quantize.roles={ffn.up: {weights: 8}}").out
    )
    assert shown["quantize"]["roles"] == {"ffn.up": {"weights": 8}}
    assert shown["reconstruct"] is None and load_recipe(shown).name == "rtn"
