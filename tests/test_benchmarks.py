"""`benchmarks/`, as far as a machine without a GPU goes: their numbers, and that each runs."""

import json
import math
import sys
from functools import partial

import pytest
import runs

BENCHMARKS = runs.ROOT / "benchmarks"

BARE = f"""
import importlib.metadata
import runpy
import sys
found = importlib.metadata.version  # the package is a checkout, and not installed
importlib.metadata.version = lambda name: 1 / 0 if "amopo" in name else found(name)
for absent in ("axolotl", "trl", "datasets", "bitsandbytes", "pydantic", "deepspeed", "rich"):
    sys.modules[absent] = None  # importing it fails
for slow in ("scipy", "sklearn", "torchao"):  # which others import where they find them
    sys.modules[slow] = None
sys.path[:0] = [{str(runs.ROOT)!r}, {str(BENCHMARKS)!r}]
runpy.run_path({str(BENCHMARKS / "gpu_model.py")!r}, run_name="__main__")

import torch
import computations
torch.manual_seed(0)
hidden, weight = torch.randn(6, 5, requires_grad=True), torch.randn(40, 5, requires_grad=True)
computations.slice_of = lambda _: 16  # a last slice that is shorter
computations.HeadProducts.apply(hidden, weight).backward()
logits = hidden @ weight.t()
torch.testing.assert_close(hidden.grad, logits @ weight)
torch.testing.assert_close(weight.grad, logits.t() @ hidden)
"""


DRY = "--dry-run --shapes 40/12 --layers 1 --repeats 1 --tflops 1 --output"
SMALL = "--shapes 24/10 --prompts 3 --instruction 8 --repeats 1 --train lora --output"
PAIRS = "published unshared tree default one-prompt after dpo floor floor-head"
GROUPS = "--groups 3 5 --sample-pairs 3 --max-tokens 150"


def rows_of(path):
    """The rows of all tables, by title and name."""
    tables = json.loads(path.read_text(encoding="utf-8"))["tables"]
    if isinstance(tables, list):
        tables = {table["title"]: table["results"] for table in tables}
    return {(title, name): row for title, rows in tables.items() for name, row in rows.items()}


def test_the_part_below_axolotl_needs_torch_transformers_accelerate_and_peft_alone(tmp_path):
    runs.command(sys.executable, "-c", BARE, *DRY.split(), str(tmp_path), cwd=tmp_path)
    rows = rows_of(tmp_path / "gpu_model.json")
    assert not [row for row in rows.values() if "failed" in row], rows
    for model in ("7b-lora", "1.5b-full"):
        assert rows[f"{model}: proof", "sdpa"]["layout"] == "packed"
        assert rows[f"{model}: proof", "eager"]["layout"] == "tree"
        numbers = {name: row for (title, name), row in rows.items() if f"{model}: numb" in title}
        assert numbers.keys() >= {"plain", "published", "packed", "tree", "after", "one-prompt"}
        for name, row in numbers.items():  # in bf16
            assert 1e-4 < row["gradient_l2_difference"] < 0.05, name
            assert row["value_difference"] < 0.01, name
        speed = {name: row for (title, name), row in rows.items() if f"{model}: speed" in title}
        assert speed.keys() >= {"published", "floor", "floor-head", "packed", "after"}
        for row in speed.values():
            assert 0 < row["mfu"] <= row["hfu"] * 1.001 and row["pairs_per_second"] > 0
        # 8 x 52 tokens against 4 x (40 + 2 x 12).
        assert speed["published"]["run_tokens"] == 416 and speed["packed"]["run_tokens"] == 256
        assert rows[f"{model}: cudnn", "prompt 48"].keys() >= {"first True", "False"}
    page = (tmp_path / "gpu_model.md").read_text(encoding="utf-8")
    assert "| one-prompt |" in page and "without flex: " in page


def step(forks, folder, model, *options):
    """Rows of `benchmarks/step.py` on a small shape, in a process that has its imports."""
    arguments = ["--model", str(model), *SMALL.split(), str(folder), *options]
    forks(1, folder, "runs", "script", str(BENCHMARKS / "step.py"), *arguments)
    return rows_of(folder / "step.json")


def test_a_pair_has_the_plain_numbers_in_every_variant(forks, tmp_path, tiny_model):
    names = PAIRS.split()
    rows = step(forks, tmp_path, tiny_model, "--variants", *names)
    rows = {name: row for (_, name), row in rows.items()}
    assert list(rows) == names and not [row for row in rows.values() if "failed" in row], rows
    for name in names[:6]:
        assert rows[name]["value_difference"] < 1e-5, name
        assert rows[name]["gradient_l2_difference"] < 1e-5, name
    assert rows["unshared"]["run_tokens"] == rows["published"]["run_tokens"] == 6 * 34
    assert rows["default"]["run_tokens"] == rows["floor-head"]["run_tokens"] == 3 * 44
    assert rows["floor"]["floor_share"] == rows["floor-head"]["floor_head_share"] == 1
    page = (tmp_path / "step.md").read_text(encoding="utf-8")
    assert "| floor/it | floor+head/it |" in page and "| one-prompt (packed) |" in page


def test_a_group_costs_the_mean_of_its_pairs(forks, tmp_path, tiny_model):
    rows = step(forks, tmp_path, tiny_model, *GROUPS.split())
    assert not [row for row in rows.values() if "failed" in row], rows
    together = {place: row for place, row in rows.items() if place[1].startswith("group")}
    assert {name for _, name in together} == {"group", "group in parts"}
    for place, row in together.items():
        assert row["value_difference"] < 1e-6, place
        if "3 pairs" in place[0]:  # none is left out
            assert row["gradient_l2_difference"] < 1e-5, place
    for (title, name), row in rows.items():
        assert ("3 of them one by one, extrapolated" in title) == ("10 pairs" in title)
        sampled = "10 pairs" in title and name.startswith("group")
        assert row["pairs_run"] == (10 if sampled else 3), name

    def tokens(mode):
        title = f"lora: prompt 24, response 10, 3 prompts, 5 responses, rating in prompt: {mode}, "
        title += "10 pairs (3 of them one by one, extrapolated)"
        return rows[title, "group"]["tokens_per_pair"]

    # Three prompts, each with five responses.
    assert tokens("none") == pytest.approx(3 * (24 + 5 * 10) / 10)
    assert tokens("none") < tokens("own") and tokens("none") < tokens("chosen, 5 levels")
    assert tokens("chosen, 5 levels") < tokens("chosen")


def test_tools_are_measured_beyond_their_bare_start(tmp_path):
    script = str(BENCHMARKS / "tools.py")
    options = ["--model", "none", "--only", "configs", "--rounds", "1", "--output", str(tmp_path)]
    done = runs.command(sys.executable, script, *options, cwd=tmp_path)
    rows = json.loads((tmp_path / "tools.json").read_text(encoding="utf-8"))["rows"]
    assert list(rows) == ["nothing", "configs"] and rows["nothing"]["cpu_beyond"] is None
    for kind in ("wall", "cpu"):
        assert rows["nothing"][kind] >= 0 and rows["configs"][kind] > 0
        beyond = rows["configs"][kind] - rows["nothing"][kind]
        assert rows["configs"][f"{kind}_beyond"] == pytest.approx(beyond)
    assert "| configs " in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["tools.json"]


def test_a_dry_run_through_axolotl_plans_every_case_and_trains_one(forks, tmp_path):
    arguments = ["--dry-run", "--cases", "lora", "fsdp2", "--steps", "2", "--sequence-len", "128"]
    run = partial(forks, 1, tmp_path, "runs", "script", str(BENCHMARKS / "gpu.py"), *arguments)
    run("--output", str(tmp_path))
    report = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))
    trained, sharded = report["cases"]["lora"], report["cases"]["fsdp2"]
    assert trained["good"] is True
    assert len(trained["losses"]) == 2 and all(map(math.isfinite, trained["losses"]))
    assert sharded["skipped"] == "needs a GPU" and "losses" not in sharded
    assert sharded["plan"]["sharding"]["name"] == "fsdp2"
    # The pairs are those that a plan's memory is of: none was too long, or much shorter.
    log = (tmp_path / "gpu-lora.log").read_text(encoding="utf-8")
    assert "2 pairs made, 2 kept; nothing left out" in log
    table = (tmp_path / "gpu.md").read_text(encoding="utf-8")
    assert "| fsdp2 |" in table and "none: a dry run" in table
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]
    with pytest.raises(AssertionError, match="holds results; name another --output, or --force"):
        run("--output", str(tmp_path))
