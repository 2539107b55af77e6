"""Plans as files: written, edited, read, and refused."""

import pytest

from attar.budget.plan_file import FORMAT, plan_text, read_plan
from attar.errors import AttarError

MODEL = {"transformer": "Wan 12"}
GOOD = "format: 1\nmodel: {transformer: Wan 12}\nlayers: {transformer: {a.b: {weights: 3}}}\n"


def written(tmp_path, text):
    path = tmp_path / "plan.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_what_is_written_is_read(tmp_path):
    rows = {
        "transformer": [
            ("blocks.0.q", {"weights": 3}, "self_attn.q: ü # 4"),
            ("blocks.0.k", {"weights": 8, "acts": 6}, ""),
            ("blocks.0.v", {"weights": 8, "acts": [8, 6]}, "by groups of steps"),
        ],
        "transformer_2": [("a", {"acts": 2}, "x")],
    }
    text = plan_text({**MODEL, "transformer_2": "Wan 34"}, {"budget": "3bits", "mean_bits": 2.9}, rows)
    plan = read_plan(written(tmp_path, text))
    assert plan.overrides() == {
        "transformer.blocks.0.q": {"weights": 3},
        "transformer.blocks.0.k": {"weights": 8, "acts": 6},
        "transformer.blocks.0.v": {"weights": 8, "acts": [8, 6]},
        "transformer_2.a": {"acts": 2},
    }
    plan.check({"transformer": "Wan 12", "transformer_2": "Wan 34"})
    assert all(line.startswith("#") for line in text.splitlines()[:3]) and f"format: {FORMAT}" in text


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "no plan"),
        ("- a\n", "no plan"),
        ("name: recipe\n", "no plan"),
        ("format: [\n", "cannot be read"),
        ("\x00", "cannot be read"),
        (GOOD.replace("format: 1", "format: 2"), "format 2"),
        (GOOD + "bits: 3\n", "unknown key 'bits'"),
        ("format: 1\nlayers: {}\n", "needs model and layers"),
        (GOOD.replace("{weights: 3}", "3"), "nothing readable of transformer.a.b"),
        (GOOD.replace("{a.b: {weights: 3}}", "3"), "nothing readable of transformer"),
        (GOOD + "chosen: {branch_rank: some}\n", "branch_rank is 'some'"),
        (GOOD + "chosen: {branch_rank: true}\n", "branch_rank is True"),
    ],
)
def test_what_is_no_plan(tmp_path, text, says):
    with pytest.raises(AttarError, match=says) as caught:
        read_plan(written(tmp_path, text))
    assert "plan.yaml" in str(caught.value)


def test_a_plan_beside_branches_is_refused_without_them(tmp_path):
    plan = read_plan(written(tmp_path, GOOD + "chosen: {branch_rank: 8}\n"))
    plan.check_branch(8)
    for rank, says in ((None, "the recipe has none at these bits"), (32, "the recipe has some of rank 32")):
        with pytest.raises(AttarError, match=f"branches of rank 8, and {says}"):
            plan.check_branch(rank)
    for text in (GOOD, GOOD + "chosen: {budget: 3bits}\n"):
        read_plan(written(tmp_path, text)).check_branch(8)


def test_a_plan_that_is_not_there_or_not_text(tmp_path):
    with pytest.raises(AttarError, match="no such plan file"):
        read_plan(tmp_path / "nothing.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(AttarError, match="cannot be read"):
        read_plan(tmp_path / "binary.yaml")
    with pytest.raises(AttarError, match="cannot be read"):
        read_plan(tmp_path)


def test_a_plan_of_another_model(tmp_path):
    plan = read_plan(written(tmp_path, GOOD))
    plan.check(MODEL)
    with pytest.raises(
        AttarError, match=r"another model \(transformer: Wan 12; this one is transformer: Flux 9\)"
    ):
        plan.check({"transformer": "Flux 9"})
    with pytest.raises(AttarError, match="no component 'x'"):
        read_plan(written(tmp_path, GOOD.replace("{transformer: {a", "{x: {a"))).check(MODEL)
