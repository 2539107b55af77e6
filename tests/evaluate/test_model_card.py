import ast

import pytest
import yaml

from attar.errors import AttarError
from attar.evaluate.model_card import Figure, ModelCard, model_card
from attar.evaluate.report_data import PlanRow

FULL = ModelCard(
    name="someone/wan-w4a6",
    base_model="Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
    recipe="s2q-vdit",
    bits="W4A6",
    attar_version="0.1.0",
    license="apache-2.0",
    tags=["wan", "attar"],
    example_prompt='it\'s a "fox"',
    call={"num_frames": 17},
    settings={"samples": 40, "policy": "salient | capped"},
    generation={"steps": 50},
    sizes={"transformer": (2_600_000_000, 700_000_000), "vae": (250_000_000, 250_000_000)},
    plan=[PlanRow("head", "bf16", 1, reason="kept in high precision")],
    figures=[Figure("PSNR", "–", "31.2 dB")],
    limits=["Slower than bf16."],
)


def front_matter(text):
    _, front, body = text.split("---\n", 2)
    return yaml.safe_load(front), body


def test_front_matter_is_what_the_hub_reads():
    front, _ = front_matter(model_card(FULL))
    assert front == {
        "base_model": "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
        "base_model_relation": "quantized",
        "pipeline_tag": "text-to-video",
        "library_name": "diffusers",
        "license": "apache-2.0",
        "tags": ["attar", "quantized", "w4a6", "s2q-vdit", "wan"],
    }


def test_the_usage_code_is_python_and_imports_attar_first():
    code = model_card(FULL).split("```python\n")[1].split("```")[0]
    tree = ast.parse(code)
    assert tree.body[0].names[0].name == "attar"
    assert 'it\'s a "fox"' in [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    assert "num_frames=17" in code and "someone/wan-w4a6" in code
    assert '# pipe.to("cuda")' in code  # a comment: the code runs without a GPU


def test_every_part_is_shown_and_tables_hold():
    text = model_card(FULL)
    for part in (
        "2.6 GB | 700 MB | 3.71 ×",
        "| all | 2.85 GB | 950 MB |",
        "PSNR | – | 31.2 dB",
        "salient \\| capped",
    ):
        assert part in text
    for part in ("kept in high precision", "Slower than bf16.", "steps 50"):
        assert part in text


def test_parts_without_data_vanish_and_local_paths_are_not_told():
    text = model_card(ModelCard("/home/me/out/small", "/home/me/digits-video/", "rtn", "W8A8", "0.1.0"))
    assert "/home" not in text
    front, body = front_matter(text)
    assert "base_model" not in front and "license" not in front
    prose = "".join(body.split("```")[::2])
    assert [line for line in prose.splitlines() if line.startswith("#")] == ["# small", "## Use", "## Limits"]
    assert "\n\n\n" not in text


def test_a_dictionary_does_as_well_and_is_checked():
    info = {"name": "a", "base_model": "b/c", "recipe": "r", "bits": "W4A4", "attar_version": "1"}
    rows = {"plan": [{"role": "head", "bits": "bf16", "layers": 1}]}
    figures = {"figures": [{"name": "SSIM", "original": "1", "compressed": "0.9"}]}
    assert "| SSIM | 1 | 0.9 |" in model_card({**info, **rows, **figures})
    with pytest.raises(AttarError, match="licence"):
        model_card({**info, "licence": "mit"})
    with pytest.raises(AttarError, match="bits"):
        model_card({k: v for k, v in info.items() if k != "bits"})
