"""`axolotl amopo compare`: its statistics by hand, and real runs on the tiny model."""

import copy
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import runs
import yaml
from click.testing import CliRunner
from datasets import Dataset
from scipy import stats

from axolotl_amopo.commands import amopo
from axolotl_amopo.commands.compare.comparison import (
    Folds,
    changed,
    fold_entry,
    read_comparison,
)
from axolotl_amopo.commands.compare.recorder import Recorder
from axolotl_amopo.commands.compare.statistics import Study, columns_of, correct_p, measures
from axolotl_amopo.errors import AMoPOError, ConfigError

# --- compare.yml


def test_changed_keys():
    base = {"a": 1, "amopo": {"gamma": 2.0, "dimensions": ["x"]}, "lora_r": 4}
    made = changed(base, {"amopo.gamma": 0.5, "amopo": {"overall": False}, "lora_r": None})
    assert made == {"a": 1, "amopo": {"gamma": 0.5, "dimensions": ["x"], "overall": False}}
    assert base["amopo"] == {"gamma": 2.0, "dimensions": ["x"]}  # as it was
    assert changed({}, {"trl.beta": 1})["trl"] == {"beta": 1}
    with pytest.raises(ConfigError, match=r"a\.b: 'a' is not a block"):
        changed(base, {"a.b": 1})


def compare_file(folder: Path, base: dict, **changes) -> Path:
    values = {
        "base": base,
        "variants": {"amopo": {}, "simpo": {"amopo.objective": "simpo"}},
        "baseline": "amopo",
        "folds": 2,
        "output": str(folder / "compared"),
    } | changes
    values = {key: value for key, value in values.items() if value is not None}
    return runs.write_config(folder, values, "compare.yml")


def small(**changes) -> dict:
    return runs.config(Path("x"), Path("model"), "data.jsonl", **changes)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"folds": None}, "nothing says which prompts are held out"),
        ({"baseline": "ampo"}, "is none of amopo, simpo, untuned. Did you mean 'amopo'?"),
        ({"variant": {}}, "variant: unknown key. Did you mean 'variants'?"),
        ({"variants": {"amopo": {"amopo.gama": 1}}}, "variants.amopo: amopo.gama: unknown key"),
        ({"variants": {"amopo": {"seed": 1}}}, "the comparison sets seed itself"),
        ({"variants": {"amopo": {"rl": "grpo"}}}, "'grpo' can't be compared; write amopo, dpo"),
        (
            {"variants": {"amopo": {"rl": "dpo", "learning_rat": 1}}},
            "learning_rat: unknown key. Did you mean 'learning_rate'?",
        ),
        ({"variants": {"amopo": {"hub_model_id": "me/it"}}}, "uploaded under that name"),
        (
            {"variants": {"amopo": {"amopo.gamma": 1}, "dpo": {"amopo.objective": "dpo"}},
             "base": small(amopo={"dimensions": ["a"], "gamma": 1})},
            "amopo.gamma: belongs to objectives amopo, simpo",
        ),
        ({"base": small(learning_rate=None)}, "base: has no learning_rate"),
        ({"existing": {"amopo": "x"}}, "the name 'amopo' is there twice"),
        ({"existing": {"other": "./nowhere"}}, "there is no folder './nowhere'"),
        ({"comparisons": ["men"]}, "Did you mean 'mean'?"),
        ({"seeds": [1, 1]}, "one is there twice"),
        ({"folds": {"count": 1}}, "folds.count: input should be greater than or equal to 2"),
        ({"variants": {"a/b": {}}}, "variants"),
    ],
)  # fmt: skip
def test_refusals(tmp_path, changes, expected):
    base = changes.pop("base", None) or small()
    path = compare_file(tmp_path, base, **changes)
    done = CliRunner().invoke(amopo, ["compare", str(path)])
    assert done.exit_code == 1 and expected in done.output, done.output
    assert not (tmp_path / "compared").exists()


def test_the_configs_of_runs(tmp_path):
    base = small(eval_steps=2, amopo={"dimensions": ["a", "b"], "winner": "nearest"})
    variants = {"amopo": {}, "cos": {"amopo": {"objective": "cos_dpo", "winner": None}},
                "theirs": {"rl": "simpo"}}  # fmt: skip
    made = read_comparison(compare_file(tmp_path, base, variants=variants, seeds=[1, 2]))
    assert any("NLL" in note for note in made.notes)
    assert any("eval_steps: no effect" in note for note in made.notes)
    planned = made.runs()
    assert len(planned) == 2 * (1 + 2 * 3)
    assert [run.name for run in planned[:7]] == ["untuned", *["amopo", "cos", "theirs"] * 2]
    first, cos, theirs = planned[1:4]
    training = made.training(first, made.folder(first))
    assert training["seed"] == 1 and "eval_steps" not in training
    assert training["datasets"][0]["path"].endswith("folds/1/train-0.jsonl")
    assert training["datasets"][0]["scale"] == [1, 5]
    scoring = made.scoring(first, made.folder(first))
    assert scoring["test_datasets"][0]["path"].endswith("folds/1/heldout-0.jsonl")
    # All are scored on the same pairs, each under the prompts that it was trained with.
    assert scoring["amopo"]["winner"] == "overall"
    assert scoring["amopo"]["rating_in_prompt"] == "chosen"
    assert made.scoring(cos, made.folder(cos))["amopo"]["objective"] == "cos_dpo"
    assert made.scoring(theirs, made.folder(theirs))["amopo"]["instruction"] == ""
    assert "amopo" not in made.training(theirs, made.folder(theirs))
    digests = {made.run_digest(run) for run in planned}
    assert len(digests) == len(planned)


def test_every_objective_can_be_scored(tmp_path):
    from axolotl_amopo.config.before_launch import check_before_launch
    from axolotl_amopo.objectives import OBJECTIVES

    base = small(amopo={"dimensions": ["a", "b"], "pairs": "best_worst"})
    whole = ("lambda_dpo", "ric")  # which take all responses of a prompt
    variants = {
        name: {"amopo.objective": name} | ({"amopo.pairs": "all"} if name in whole else {})
        for name in OBJECTIVES
    }
    made = read_comparison(compare_file(tmp_path, base, variants=variants))
    blocks = {}
    for run in made.runs()[: 1 + len(variants)]:
        scoring = made.scoring(run, made.folder(run))
        blocks[run.name] = scoring["amopo"]
        check_before_launch(scoring, with_data=False)
    assert {block["pairs"] for block in blocks.values()} == {"best_worst"}
    assert blocks["ric"]["rating_in_prompt"] == "own" and blocks["ric"]["prompts"] == "one"
    assert "instruction" not in blocks["amopo"] and blocks["dpo"]["instruction"] == ""


def test_an_entry_of_a_fold_reads_as_the_data_does():
    entry = {"path": "org/data", "name": "x", "split": "train[:9]", "type": "amopo.rated",
             "scale": [1, 5], "weight": 0.5}  # fmt: skip
    assert fold_entry(entry, Path("f.jsonl")) == {
        "path": "f.jsonl", "ds_type": "json", "split": "train", "type": "amopo.rated",
        "scale": [1, 5],
    }  # fmt: skip


def test_prompts_are_dealt_out():
    from axolotl_amopo.commands.compare.data import deal

    keys = [bytes([n]) * 16 for n in range(11)]
    parts = deal(keys + keys, Folds(count=3))
    assert sorted(map(len, parts)) == [3, 4, 4]
    assert sorted(key for part in parts for key in part) == keys
    assert parts == deal(keys[::-1], Folds(count=3))
    assert parts != deal(keys, Folds(count=3, seed=1))


# --- statistics


def scored(margins: list, labels: list, prompts=None, tokens=None) -> dict:
    """A run's pairs with the dimensions x and y; margins are those of every prompt."""
    count = len(margins)
    return {
        "names": ["overall", "x", "y"],
        "where": [f"row {n}" for n in range(count)],
        "prompt": prompts or list(range(count)),
        "tokens": tokens or [[10, 10]] * count,
        "labels": labels,
        "own": [[margin] * 3 if isinstance(margin, float) else margin for margin in margins],
        "plain": [margin if isinstance(margin, float) else margin[0] for margin in margins],
    }


def line(name, found, fold=None, seed=1, **cost) -> dict:
    cost = {"steps": 4, "pairs": 8, "tokens": 100, "seconds": 1, "peak_bytes": 1} | cost
    return {"name": name, "fold": fold, "seed": seed, "run": f"{name}/{fold}-{seed}",
            "scored": found, "cost": cost, "keys": {}}  # fmt: skip


def test_measures_by_hand():
    # x and y agree on the first two pairs, disagree on the third; the fourth ties on y.
    labels = [[1, 1, 1], [1, 1, 1], [1, 1, -1], [1, 1, 0]]
    margins = [[1.0, 1.0, 1.0], [-1.0, -1.0, 1.0], [2.0, 2.0, -0.5], [1.0, -1.0, None]]
    columns = columns_of(scored(margins, labels), ["overall", "x", "y"], "own")
    made = measures(np.nanmean(columns.values, 0), ["overall", "x", "y"])
    assert made["overall"] == 0.75
    assert made["x"] == 0.5 and made["y"] == 1
    assert made["mean"] == 0.75 and made["worst"] == 0.5
    assert made["conflicting"] == 1  # both ratings of the third pair
    plain = columns_of(scored(margins, labels), ["overall", "x", "y"], "plain")
    assert plain.values[2, 3] == 0.5  # one margin can't be right for both
    assert np.isnan(columns.values[0, 3])


def test_length_is_taken_out_as_score_does():
    lengths = [[30, 10], [10, 30], [25, 5], [8, 20], [40, 9]]
    margins = [0.1 * (a - b) for a, b in lengths]
    labels = [[1, 1, 1]] * 5
    columns = columns_of(scored(margins, labels, tokens=lengths), ["overall", "x", "y"], "own")
    assert (columns.values[:, 4:] == 0.5).all()  # the margin is length, and nothing else
    assert columns.values[:, 1].tolist() == [1, 0, 1, 0, 1]


def test_an_interval_where_all_are_right():
    study = Study([line("a", many(np.ones(5), np.arange(5)))], "a")
    (low, high) = next(t for t in study.tables("own") if t.measure == "x").cells["a"].interval
    assert high == 1 and low == pytest.approx(0.025 ** (1 / 5))


def many(right: np.ndarray, prompts: np.ndarray) -> dict:
    margins = [1.0 if one else -1.0 for one in right]
    return scored(margins, [[1, 1, 1]] * len(margins), prompts=prompts.tolist())


def test_a_difference_is_tested_by_prompt():
    generator = np.random.default_rng(0)
    before = generator.random(40) < 0.5
    after = before.copy()
    after[np.flatnonzero(~before)[:8]] = True
    after[np.flatnonzero(before)[:1]] = False

    def change(prompts):
        study = Study([line("a", many(before, prompts)), line("b", many(after, prompts))], "a")
        table = next(t for t in study.tables("plain") if t.measure == "mean")
        assert table.pairs == 40 and table.prompts == len(set(prompts.tolist()))
        return table.cells["b"].change

    one_each = change(np.arange(40))
    assert one_each.difference == pytest.approx(7 / 40)
    # Swapping prompts is McNemar's test where each prompt has one pair.
    assert one_each.p == pytest.approx(stats.binomtest(8, 9).pvalue, abs=0.01)
    low, high = one_each.interval
    assert 0.02 < low < 7 / 40 < high < 0.33
    # The same pairs in four prompts are four observations.
    assert change(np.repeat(np.arange(4), 10)).p > 0.1


def test_seeds_are_averaged_and_folds_put_together():
    prompts, labels = [0, 1], [[1, 1, 1]] * 2
    lines = []
    for fold, (first, second) in enumerate([([1.0, 1.0], [1.0, -1.0]), ([-1.0, -1.0], [1.0, 1.0])]):
        lines += [line("a", scored([1.0, -1.0], labels, prompts), fold, seed) for seed in (1, 2)]
        lines.append(line("b", scored(first, labels, prompts), fold, 1))
        lines.append(line("b", scored(second, labels, prompts), fold, 2))
    study = Study(lines, "a")
    assert study.prompt_count == 4  # a fold's prompts are its own
    cell = next(t for t in study.tables("own") if t.measure == "mean").cells["b"]
    assert cell.value == pytest.approx((2 + 1 + 0 + 2) / 8)
    # Seed 1 has 2 of 4 right, seed 2 has 3.
    assert cell.run_deviation == pytest.approx(np.std([0.5, 0.75], ddof=1))
    assert cell.change.difference == pytest.approx(5 / 8 - 1 / 2)


def test_pairs_are_matched_whatever_their_order():
    found = scored([1.0, -1.0, 1.0], [[1, 1, 1], [1, 1, -1], [1, -1, 1]])
    order = [1, 0]
    turned = {
        key: value if key == "names" else [value[n] for n in order] for key, value in found.items()
    }
    turned["prompt"] = [7, 9]
    study = Study([line("a", found), line("b", turned)], "a")
    assert any("1 pairs were not scored in every run" in note for note in study.notes)
    table = next(t for t in study.tables("own") if t.measure == "mean")
    assert table.cells["b"].change.interval == (0, 0)  # the same pairs are right, prompt by prompt
    with pytest.raises(AMoPOError, match="different pairs"):
        Study([line("a", found), line("b", found | {"where": ["x"] * 3})], "a")


def test_named_comparisons_are_corrected_together():
    generator = np.random.default_rng(1)
    arms = {name: generator.random(30) < share for name, share in
            (("a", 0.4), ("b", 0.9), ("c", 0.8))}  # fmt: skip
    study = Study([line(n, many(right, np.arange(30))) for n, right in arms.items()], "a")
    tables = study.tables("own") + study.tables("plain")
    assert correct_p(tables, ["mean"]) == 4
    for table in tables:
        for name in ("b", "c"):
            change = table.cells[name].change
            assert (change.p_holm is not None) == (table.measure == "mean")
    smallest = min(t.cells["b"].change.p for t in tables if t.measure == "mean")
    corrected = [t.cells["b"].change.p_holm for t in tables if t.measure == "mean"]
    assert min(corrected) == pytest.approx(min(1, 4 * smallest))


def test_other_budgets_are_marked():
    found = many(np.ones(4), np.arange(4))
    lines = [
        line("a", found),
        line("b", found, tokens=104),
        line("c", found, tokens=106, steps=5),
        line("d", found, pairs=9),
    ]
    costs = Study(lines, "a").costs()
    assert costs["b"].differs == [] and costs["c"].differs == ["steps", "tokens"]
    assert costs["d"].differs == ["pairs"]


def test_pairs_are_counted_where_an_example_has_several():
    rows = {"comparisons": [[0, 1, 0, 2, 1, 2], [0, 1, 0, 0, 1, 1]]}
    trainer = SimpleNamespace(model=None, train_dataset=Dataset.from_dict(rows))
    assert Recorder(trainer)._pairs_per_example() == 2.0  # three, and one beside two alone
    trainer.train_dataset = Dataset.from_dict({"chosen": ["a", "b"]})  # axolotl's own
    assert Recorder(trainer)._pairs_per_example() == 1.0


# --- runs


ANSWERS = ("Yes, of course it is.", "No.", "Perhaps, who knows?")


def rated(question: int) -> dict:
    scores = [(5, 2), (1, 3), (3, 4)]
    return {
        "prompt": f"Is {question} a number that people like?",
        "responses": [
            {"text": f"{text} {question}", "scores": {"helpfulness": h, "honesty": t}}
            for text, (h, t) in zip(ANSWERS, scores, strict=True)
        ],
    }


# Runs in a process that has imported axolotl: see `fork_server`. What the check runs as commands is
# axolotl's own command line, in a fork instead of a process that imports everything anew.
SCRIPT = """
import sys

from axolotl_amopo.commands.compare import forks, work


def command(*arguments):
    from axolotl.cli.main import cli

    launcher = ["--launcher", "python"] if arguments[0] == "train" else []
    options = {"standalone_mode": False}
    forks.call(lambda: cli.main([*arguments, *launcher], prog_name="axolotl", **options))


work._command = command
from axolotl_amopo.commands import amopo

try:
    amopo(sys.argv[1:], prog_name="axolotl-amopo")
except SystemExit as end:
    print("exit code", end.code)
"""


def invoke(forks, folder: Path, *arguments: str, code: int = 0) -> str:
    """Run `axolotl-amopo compare` and return what it printed."""
    script = folder / "script.py"
    script.write_text(SCRIPT, encoding="utf-8")
    (folder / "0.log").unlink(missing_ok=True)
    forks(1, folder, "runs", "script", str(script), "compare", *arguments)
    printed = (folder / "0.log").read_text(encoding="utf-8")
    assert printed.rstrip().endswith(f"exit code {code}"), printed[-4000:]
    return printed


@pytest.fixture(scope="module")
def compared(forks, tiny_model, tmp_path_factory):
    """A comparison in two folds, with one model that can't be loaded."""
    folder = tmp_path_factory.mktemp("compare")
    data = runs.write_jsonl(folder / "data.jsonl", [rated(n) for n in range(8)])
    (folder / "broken").mkdir()
    (folder / "broken" / "config.json").write_text("{}")
    base = runs.config(folder, tiny_model, data, max_steps=2, **runs.LORA)
    path = compare_file(
        folder, base, variants={"amopo": {}, "theirs": {"rl": "dpo", "rl_beta": 0.1}},
        existing={"model": str(tiny_model), "broken": str(folder / "broken")},
        measure={"batch_pairs": 4, "pairs": "all", "untuned": False},
    )  # fmt: skip
    return path, folder


def results(folder: Path) -> dict[str, dict]:
    text = (folder / "compared" / "results.jsonl").read_text(encoding="utf-8")
    return {one["run"]: one for one in map(json.loads, text.splitlines())}


@pytest.fixture(scope="module")
def first(compared, forks):
    """What the command printed and wrote, its page included."""
    path, folder = compared
    forks_folder = folder / "process"
    forks_folder.mkdir()
    options = ("--no-check", "--html", str(folder / "page.html"))
    printed = invoke(forks, forks_folder, str(path), *options, code=3)  # one model failed
    return printed, results(folder)


def test_every_run_is_made_but_the_one_that_fails(first, compared):
    printed, lines = first
    names = {"model", "amopo", "theirs"}
    assert {one["name"] for one in lines.values()} == names and len(lines) == 2 * 3
    assert "broken/fold-1: FAILED" in printed and "can't be loaded as a model" in printed
    assert "about" in printed and "left" in printed
    for one in lines.values():
        assert len(one["scored"]["where"]) == 4 * 2  # four prompts; one of three pairs ties
        assert ("steps" in one["cost"]) == (one["seed"] is not None)
    amopo_run, theirs = lines["amopo/fold-1-seed-7"], lines["theirs/fold-1-seed-7"]
    assert amopo_run["cost"]["steps"] == theirs["cost"]["steps"] == 2
    assert [step for step, _ in amopo_run["cost"]["losses"]] == [1, 2]
    assert amopo_run["cost"]["tokens"] > theirs["cost"]["tokens"] > 0


def test_folds_part_prompts(compared, first):
    folder = compared[1] / "compared" / "folds"
    prompts = {
        (fold, part): {
            json.loads(row)["prompt"]
            for row in (folder / fold / f"{part}-0.jsonl").read_text("utf-8").splitlines()
        }
        for fold in "12"
        for part in ("train", "heldout")
    }
    for fold in "12":
        assert not prompts[fold, "train"] & prompts[fold, "heldout"]
        assert len(prompts[fold, "train"] | prompts[fold, "heldout"]) == 8
    assert not prompts["1", "heldout"] & prompts["2", "heldout"]


def test_axolotls_own_method_sees_the_same_pairs(compared, first):
    """The pairs that were exported, as the plugin prepares them for SimPO without instructions."""
    folder = compared[1] / "compared" / "runs" / "theirs" / "fold-1-seed-7"
    rows = [json.loads(row) for row in (folder / "train_pairs.jsonl").read_text().splitlines()]
    source = compared[1] / "compared" / "folds" / "1" / "train-0.jsonl"
    overall = {text: sum(s) for text, s in zip(ANSWERS, [(5, 2), (1, 3), (3, 4)], strict=True)}
    expected = set()
    for text in source.read_text("utf-8").splitlines():
        row = json.loads(text)
        texts = [response["text"] for response in row["responses"]]
        for a in texts:
            for b in texts:
                if overall[a.rsplit(" ", 1)[0]] > overall[b.rsplit(" ", 1)[0]]:
                    expected.add((row["prompt"], a, b))
    found = {
        (row["messages"][0]["content"], row["chosen"]["content"], row["rejected"]["content"])
        for row in rows
    }
    assert found == expected and len(rows) == len(expected)
    config = yaml.safe_load((folder / "config.yml").read_text("utf-8"))
    assert config["rl"] == "dpo" and config["datasets"][0]["type"] == "chat_template.default"


def test_the_report_is_of_the_lines(compared, first):
    folder = compared[1]
    report = json.loads((folder / "compared" / "report.json").read_text("utf-8"))
    lines = first[1]
    by_hand = []
    for fold in "12":
        found = lines[f"theirs/fold-{fold}-seed-7"]["scored"]
        for labels, margin in zip(found["labels"], found["plain"], strict=True):
            k = found["names"].index("honesty")
            by_hand.append((np.sign(labels[k] * margin) + 1) / 2)
    table = next(
        t for t in report["tables"] if (t["measure"], t["prompting"]) == ("honesty", "plain")
    )
    assert table["cells"]["theirs"]["value"] == pytest.approx(np.mean(by_hand))
    assert report["named"] == 2 * 2  # both kinds of prompts, two others than the baseline
    assert "tokens" in report["costs"]["theirs"]["differs"]
    page = (folder / "page.html").read_text("utf-8")
    assert page.count("<svg") == page.count("<figure>") > 4 and "<script" not in page
    assert "theirs" in page and "broken/fold-1 failed" in page


def test_it_goes_on_and_repeats_nothing(compared, first, forks):
    path, folder = compared
    made = folder / "compared" / "runs"
    before = {file: file.stat().st_mtime_ns for file in made.rglob("trained.json")}
    whole = json.loads((made / "amopo" / "fold-1-seed-7" / "run.json").read_text("utf-8"))
    # As if killed while one run was scored and another trained; a third is not of this shard.
    for name in ("run.json", "scored.json"):
        (made / "amopo" / "fold-1-seed-7" / name).unlink()
    for name in ("run.json", "trained.json", "scored.json"):
        (made / "theirs" / "fold-2-seed-7" / name).unlink()
    (made / "model" / "fold-1" / "run.json").unlink()
    values = yaml.safe_load(path.read_text("utf-8"))
    del values["existing"]["broken"]
    runs.write_config(folder, values, "compare.yml")
    printed = invoke(forks, folder / "process", str(path), "--only", "amopo/fold-2*", "--no-check")
    assert "1 of 1 runs are complete already" in printed
    assert not (made / "amopo" / "fold-1-seed-7" / "run.json").exists()
    done = CliRunner().invoke(amopo, ["compare", str(path), "--only", "ampo/*"])
    assert done.exit_code == 1 and "no run has that name; write one such as model/" in done.output
    options = ("--no-check", "--shard", "2/2", "--jobs", "2")
    printed = invoke(forks, folder / "process", str(path), *options)
    assert "1 of 3 runs are complete already" in printed and "6 of 6 runs;" in printed
    after = {file: file.stat().st_mtime_ns for file in made.rglob("trained.json")}
    again = {str(file.parent.relative_to(made)) for file in before if after[file] != before[file]}
    assert again == {"theirs/fold-2-seed-7"}
    assert not (made / "model" / "fold-1" / "run.json").exists()
    rescored = json.loads((made / "amopo" / "fold-1-seed-7" / "run.json").read_text("utf-8"))
    assert rescored["scored"]["own"] == whole["scored"]["own"]
    old, new = (lines["theirs/fold-2-seed-7"] for lines in (first[1], results(folder)))
    assert old["scored"]["plain"] == new["scored"]["plain"]  # the same seed, the same run


def test_tables_are_made_again_from_the_lines_alone(compared, first, tmp_path):
    path, folder = compared
    copied = tmp_path / "compared"
    copied.mkdir()
    for name in ("results.jsonl", "compare.json"):
        shutil.copy(folder / "compared" / name, copied)
    values = yaml.safe_load(path.read_text("utf-8")) | {"output": str(copied)}
    moved = runs.write_config(tmp_path, values, "compare.yml")
    done = CliRunner().invoke(amopo, ["compare", str(moved), "--report-only"])
    assert done.exit_code == 0, done.output
    shown = [row for row in done.stdout.splitlines() if not row.startswith("Written: ")]
    assert max(map(len, shown)) <= 80
    old, new = (
        json.loads((where / "report.json").read_text("utf-8"))
        for where in (folder / "compared", copied)
    )
    assert old["tables"] == new["tables"] and old["costs"] == new["costs"]
    runs.write_config(tmp_path, values | {"measure": {"prompts": "own"}}, "compare.yml")
    done = CliRunner().invoke(amopo, ["compare", str(moved), "--report-only"])
    assert done.exit_code == 1 and "made with another config" in done.output


def test_what_is_there_is_not_mixed_or_overwritten(compared, first, tmp_path):
    from axolotl_amopo.commands.compare.compare import check_digests, claim

    def changed_by(**change):
        values = copy.deepcopy(yaml.safe_load(compared[0].read_text("utf-8"))) | change
        return read_comparison(runs.write_config(tmp_path, values, "other.yml"))

    same = changed_by()
    claim(same)
    check_digests(same, same.runs())
    more = changed_by(seeds=[7, 8])
    check_digests(more, more.runs())  # what is new is only added
    other = changed_by(measure={"limit": 3})
    with pytest.raises(ConfigError, match=r"amopo/fold-1-seed-7, .* another config"):
        check_digests(other, other.runs())
    with pytest.raises(ConfigError, match="holds something else than a comparison"):
        claim(changed_by(output=str(compared[1])))
    with pytest.raises(ConfigError, match="is a file"):
        claim(changed_by(output=str(compared[0])))


def test_a_dry_run_shows_the_runs_and_plans(compared, forks, tmp_path):
    values = yaml.safe_load(compared[0].read_text("utf-8"))
    values |= {"output": str(tmp_path / "nothing"), "existing": {}}
    path = runs.write_config(tmp_path, values, "compare.yml")
    printed = invoke(forks, tmp_path, str(path), "--dry-run")
    assert "amopo: 2 runs" in printed and "FLOP per step" in printed
    assert "plan knows rl: amopo alone" in printed
    assert not (tmp_path / "nothing").exists()
    # What axolotl refuses is said of the variant, before anything runs.
    values["variants"] = {"simpo": {"rl": "simpo", "warmup_ratio": 0.1}} | values["variants"]
    runs.write_config(tmp_path, values, "compare.yml")
    printed = invoke(forks, tmp_path, str(path), code=1)
    assert "simpo: axolotl refuses it: " in printed and "warmup_ratio is not supported" in printed
    assert not (tmp_path / "nothing").exists()


def test_a_fork_agrees_with_the_real_commands(forks, tiny_model, tmp_path):
    """With test_datasets and seeds; one held-out prompt is trained on too."""
    data = runs.write_jsonl(tmp_path / "data.jsonl", [rated(n) for n in range(4)])
    heldout = runs.write_jsonl(tmp_path / "heldout.jsonl", [rated(n) for n in range(3, 6)])
    test = {"path": str(heldout), "type": "amopo.rated", "scale": [1, 5]}
    base = runs.config(tmp_path, tiny_model, data, max_steps=2, test_datasets=[test], **runs.LORA)
    path = compare_file(
        tmp_path, base, variants={"amopo": {}}, folds=None, measure={"prompts": "own"}
    )
    printed = invoke(forks, tmp_path, str(path))
    assert "1 of 1 checked runs agree with the real commands" in printed
    assert "1 of 3 held-out prompts are trained on too" in printed
    run = tmp_path / "compared" / "runs" / "amopo" / "seed-7"
    checked = json.loads((run / "checked.json").read_text("utf-8"))
    trained = json.loads((run / "trained.json").read_text("utf-8"))
    assert checked["losses"] == pytest.approx(np.array(trained["losses"]), rel=1e-5)
    from axolotl_amopo.commands.compare.work import differences

    found = json.loads((run / "scored.json").read_text("utf-8"))
    assert differences(trained, found, checked) == []
    checked["losses"][1][1] += 0.01
    checked["own"][0][0] += 0.1
    loss, margin = differences(trained, found, checked)
    assert "the loss at step 2" in loss and "margins (own prompts)" in margin
