"""`experiments/world/`: the language, the engine on a tiny base model, plans and tables."""

import doctest
import itertools
import json
import math
import random
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

sys.path.insert(0, str(Path(__file__).parent.parent / "experiments"))
sys.path.insert(0, str(Path(__file__).parent.parent / "experiments" / "world"))

import base_model
import evidence
import experiment
import language
import measures
import preference
import rated
import results
import run
import summary

from axolotl_amopo.objectives import OBJECTIVES
from axolotl_amopo.steering import effect, front

WORLD = results.HERE
QUESTION = "ann blue vast shy river smith"
TINY = {
    "data": {"prompts": 12},
    "base": {"hidden_size": 32, "intermediate_size": 48, "layers": 1, "heads": 2, "steps": 40},
    "heldout_prompts": 4,
    "pairs_per_step": 4,
    "max_steps": 2,
}


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory):
    """A cache whose base model knows next to nothing, with answers that a good one would give."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base_model, "CACHE", tmp_path_factory.mktemp("world"))
        folder, numbers = (
            base_model.folder_of(experiment.read_settings(TINY).base),
            random.Random(0),
        )
        for seed, (count, held_out) in itertools.product((1, 2), ((12, False), (4, True))):
            questions = rated.draw_questions(count, seed, held_out=held_out)
            known = [
                (question, [language.draw_answer(question, numbers) for _ in range(4)])
                for question in questions
            ]
            file = rated.answers_file(folder, count, 4, seed, held_out=held_out)
            file.write_text(json.dumps(known), encoding="utf-8")
        yield


def settings(objective: str, **amopo: Any) -> dict[str, Any]:
    block = {"objective": objective, "dimensions": ["detail", "terse", "correct"]}
    return TINY | {"amopo": block | amopo}


def trained(given: dict[str, Any], steps: int = 1) -> tuple[torch.Tensor, dict[str, float]]:
    """The parameters after some steps, and what training returns."""
    run_settings = replace(experiment.read_settings(given), max_steps=steps)
    base = base_model.load_base(run_settings.base)
    known = rated.answered(base, base_model.folder_of(run_settings.base), 12, 4, 1, held_out=False)
    config = run_settings.config
    prompts = rated.rated_prompts(known, config.dimension_names, 0.0, 1)
    rows = rated.examples(prompts, config, base_model.chat(), 1)
    seen = preference.train(preference.Engine(base, rows[:2]), run_settings, rows, 1)
    return torch.cat([p.detach().flatten() for p in base.parameters()]), seen


@pytest.mark.parametrize("module", [language, effect, front, summary], ids=lambda m: m.__name__)
def test_examples_in_docstrings_hold(module) -> None:
    done = doctest.testmod(module)
    assert done.attempted and not done.failed


def test_what_is_drawn_is_of_the_grammar_and_spread_over_the_scales() -> None:
    numbers = random.Random(0)
    possible = {tuple(one.values()) for one in language.possible()}
    seen: dict[str, set[float]] = {name: set() for name in language.ATTRIBUTES}
    for _ in range(1000):
        question = language.draw_question(numbers)
        answer = language.draw_answer(question, numbers)
        assert language.parse(answer), answer
        found = language.attributes(question, answer)
        assert tuple((found | {"correct": 5.0}).values()) in possible, answer
        for name, value in found.items():
            seen[name].add(rated.rate(value))
    assert all(len(levels) > 3 and levels >= {1, 5} for levels in seen.values()), seen


@pytest.mark.parametrize(
    "text",
    [
        "",
        "ann is",
        "is blue",
        "ann is blue red",  # two of a kind
        "ann is vast blue",  # not in the order of the kinds
        "ann is blue perhaps",
        "ann is perhaps maybe blue",
        "ann is perhaps blue maybe vast perhaps shy river",  # seven words of facts and hedges
        "dear ann is blue",
        "hello ann is blue many",
        "ann is blue thanks thanks",
        "ann is blue ann",
    ],
)
def test_texts_outside_of_the_grammar_are_worth_nothing(text: str) -> None:
    assert language.parse(text) is None
    assert set(language.attributes(QUESTION, text).values()) == {1.0}


def test_attributes_by_hand() -> None:
    assert language.attributes(QUESTION, "ben is blue vast")["correct"] == 1.0  # it is about ann
    found = language.attributes(QUESTION, "ann looks maybe river smith many thanks")
    assert found["detail"] == 2 and found["courtesy"] == 3 and found["correct"] == 5
    assert found["caution"] == pytest.approx(1 + 4 / 3)
    assert found["terse"] == pytest.approx(5 - 4 * 4 / 9)


def test_what_conflicts_and_what_does_not() -> None:
    possible = language.possible()

    def most(*names: str) -> float:
        return max(min(one[name] for name in names) for one in possible)

    assert most("detail", "courtesy", "correct") == 5.0
    assert most("detail", "terse") < 4.0
    assert most("detail", "caution") < 4.0
    assert most("detail", "terse", "caution", "courtesy") < 3.0


def test_steering_of_arrays() -> None:
    flat = effect.steered([1, 5, 1, 5], [2, 2, 2, 2])
    assert flat.rank_correlation == 0 and flat.monotone and flat.span == 0
    against = effect.steered([1, 2, 3], [3, 2, 1])
    assert against.rank_correlation == -1 and not against.monotone and against.span == -2
    assert effect.steered([1, 5], [2, 3]).error == 1.5
    for asked, obtained in (([1], [1]), ([1, 2], [1]), ([1, 2], [1, math.nan])):
        with pytest.raises(ValueError):
            effect.steered(asked, obtained)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_hypervolume_is_what_counting_says(count: int) -> None:
    numbers = np.random.default_rng(count)
    points = numbers.random((6, count))
    inside = numbers.random((40000, count))
    below = (inside[:, None] <= points[None]).all(-1).any(-1)
    exact = front.hypervolume(points.tolist(), [0] * count, [1] * count)
    assert exact == pytest.approx(below.mean(), abs=0.01)


def test_generated_answers_have_the_probabilities_of_the_package_s_forward() -> None:
    base = base_model.load_base(experiment.read_settings(TINY).base)
    questions = rated.draw_questions(12, 1, held_out=True)
    asked = [*questions, f"detail 4 {QUESTION}"]
    prompts = [base_model.chat().prompt_ids(rated.messages(text)) for text in asked]
    drawn = base_model.generate(base, prompts, seed=3)
    assert drawn == base_model.generate(base, prompts, seed=3)
    assert drawn != base_model.generate(base, prompts, seed=4)
    assert len({len(one.ids) for one in drawn[:12]}) > 2  # some end while others run
    found = measures.answer_logps(base, prompts, [one.ids for one in drawn])
    assert found == pytest.approx([one.logp for one in drawn], abs=1e-3)


def test_ratings_are_rounded_attributes_but_for_the_noise() -> None:
    known = [rated.Answered(QUESTION, ["ann is blue", "ann is perhaps blue shy"] * 200)]

    def ratings(noise: float) -> list[float]:
        (prompt,) = rated.rated_prompts(known, ["detail", "terse"], noise, seed=1)
        return [value for one in prompt.responses for value in one.ratings.values()]

    exact = ratings(0.0)
    assert exact[:4] == [1.0, 5.0, 2.0, 4.0]
    changed = [a != b for a, b in zip(exact, ratings(0.5), strict=True)]
    assert sum(changed) / len(changed) == pytest.approx(0.4, abs=0.06)  # a fifth says the same
    more = [a != b for a, b in zip(exact, ratings(0.8), strict=True)]
    assert all(b for a, b in zip(changed, more, strict=True) if a)


def test_signs_of_the_examples_are_those_of_the_attributes() -> None:
    answers = ["ann is blue", "ann is vast shy river", "ann is green"]
    prompts = rated.rated_prompts(
        [rated.Answered(QUESTION, answers)], ["detail", "terse", "correct"], 0.0, seed=1
    )
    config = preference.block(settings("dpo")["amopo"])
    rows = rated.examples(prompts, config, base_model.chat(), seed=1)
    words = [base_model.text_of(row.responses[0]) for row in rows]
    found = {
        (words[i], base_model.text_of(row.responses[1])): row.signs[0] for i, row in enumerate(rows)
    }
    assert found[answers[0], answers[2]] == [0, 0, 1]  # the mean decides who is first
    assert found[answers[1], answers[2]] == [1, -1, 1]
    assert set(base_model.text_of(rows[0].prompts[0]).split()) >= set(QUESTION.split())


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_trains(objective: str) -> None:
    base = base_model.load_base(experiment.read_settings(TINY).base)
    before = torch.cat([p.detach().flatten() for p in base.parameters()])
    after, seen = trained(settings(objective), steps=2)
    assert math.isfinite(seen["loss"]) and seen["tokens"] > 0
    assert after.isfinite().all() and (after != before).any()


def test_the_first_loss_is_that_of_a_policy_that_is_its_reference() -> None:
    _, seen = trained(settings("dpo", dimensions=["detail"], min_gap=0.2))
    assert seen["loss"] == pytest.approx(math.log(2), abs=1e-5)
    _, seen = trained(settings("lambda_dpo"))
    assert seen["loss"] == pytest.approx(math.log(4), abs=1e-5)


def test_combined_gradients_with_nothing_to_correct_are_the_weighted_sum() -> None:
    plain, _ = trained(settings("dpo"))
    combined, _ = trained(settings("raco", c=0.0) | {"rl_beta": 0.1})
    torch.testing.assert_close(combined, plain, atol=1e-5, rtol=0)
    corrected, _ = trained(settings("raco", c=0.9) | {"rl_beta": 0.1})
    assert (corrected - plain).abs().max() > 1e-4


def test_asks_are_those_of_training() -> None:
    def instructions(objective: str, **amopo: Any) -> dict[str, str]:
        config = preference.block(settings(objective, **amopo)["amopo"])
        steering = measures.steering_of(config)
        return {ask: steering.instruction(to) for ask, to in measures.asks(config).items()}

    assert instructions("dpo") == {"plain": "", "best": ""}
    amopo = instructions("amopo")
    assert amopo["best"] == "all detail 5 terse 5 correct 5" and amopo["terse=2"] == "terse 2"
    assert amopo["front 0"] == "all detail 5 terse 1 correct 1"
    assert amopo["front 6"] == "all detail 3 terse 3 correct 3"
    assert instructions("ric")["terse=2"] == "all detail 5 terse 2 correct 5"
    weights = instructions("cos_dpo")
    assert weights["terse=0.2"] == "all detail 0.4 terse 0.2 correct 0.4"
    assert weights["front 3"] == "all detail 0.5 terse 0.5 correct 0.0"
    none = instructions("amopo", rating_in_prompt="none")
    assert none == {
        "plain": "", "best": "all detail terse correct",
        "detail": "detail", "terse": "terse", "correct": "correct",
    }  # fmt: skip


def test_a_plan_runs_goes_on_and_repeats(tmp_path: Path, capsys) -> None:
    plan = {
        "question": "Does it run?",
        "baseline": "base",
        "measures": ["score", "words"],
        "seeds": [1, 2],
        "common": settings("dpo"),
        "variants": {"base": {"max_steps": 0}, "amopo": {"amopo": {"objective": "amopo"}}},
    }
    path, rows = tmp_path / "plan.yml", tmp_path / "rows.jsonl"
    path.write_text(yaml.safe_dump(plan), encoding="utf-8")
    command = [str(path), "--results", str(rows)]
    assert run.main([*command, "--shard", "1/2"]) == 0
    assert len(rows.read_text().splitlines()) == 2
    with rows.open("a") as file:
        file.write('{"key": "cut o')  # a run that was killed while it wrote
    assert run.main(command) == 0
    kept = results.read_results(rows)
    assert len(kept) == 4 and len(rows.read_text().splitlines()) == 5
    assert run.main(command) == 0 and results.read_results(rows) == kept

    key, row = next((k, r) for k, r in kept.items() if r["settings"]["max_steps"])
    assert key == results.key_of(row["settings"], row["seed"])
    assert run.main(["--row", key, "--results", str(rows)]) == 0
    row["measures"]["score"] += 0.01
    rows.write_text(json.dumps(row) + "\n", encoding="utf-8")
    assert run.main(["--row", key, "--results", str(rows)]) == 1
    assert "score:" in capsys.readouterr().out

    plan["variants"]["amopo"]["amopo"]["gama"] = 1
    path.write_text(yaml.safe_dump(plan), encoding="utf-8")
    assert run.main(command) == 2
    assert "gama" in capsys.readouterr().err


def test_a_grid_and_tuned_settings(tmp_path: Path) -> None:
    plan = {
        "seeds": [1],
        "tuned": "tuned.yml",
        "variants": {
            "dpo": {"amopo": {"objective": "dpo"}, "grid": {"rl_beta": [0.1, 0.2]}},
            "amopo": {"learning_rate": 0.5},
        },
    }
    (tmp_path / "plan.yml").write_text(yaml.safe_dump(plan), encoding="utf-8")
    tuned = {"dpo": {"learning_rate": 0.1, "rl_beta": 9.0}, "amopo": {"learning_rate": 0.2}}
    (tmp_path / "tuned.yml").write_text(yaml.safe_dump(tuned), encoding="utf-8")
    assert results.read_plan(tmp_path / "plan.yml").variants == {
        "dpo rl_beta=0.1": {"learning_rate": 0.1, "rl_beta": 0.1, "amopo": {"objective": "dpo"}},
        "dpo rl_beta=0.2": {"learning_rate": 0.1, "rl_beta": 0.2, "amopo": {"objective": "dpo"}},
        "amopo": {"learning_rate": 0.5},
    }


def test_settings_that_break_on_a_seed_are_not_chosen(tmp_path: Path) -> None:
    rates = {"steady": 0.1, "steadier": 0.2, "breaks": 0.3}
    variants = {name: settings("dpo") | {"learning_rate": rate} for name, rate in rates.items()}
    plan = results.Plan(tmp_path / "p.yml", "Which?", [], [1, 2], variants, {})
    scores = {"steady": (3.0, 3.5), "steadier": (3.3, 3.1), "breaks": (5.0, 2.0)}
    rows = {
        name: {seed: {"measures": {"score": score}} for seed, score in enumerate(of)}
        for name, of in scores.items()
    }
    assert summary.choose(plan, rows) == {"dpo": {"learning_rate": 0.2}}


def test_tables_by_hand(tmp_path: Path) -> None:
    plan = results.Plan(
        tmp_path / "p.yml", "Which?", ["score"], [1, 2, 3],
        {"a": settings("dpo"), "b": settings("simpo"), "c": settings("amopo")},
        {"b": "a", "c": "a"},
    )  # fmt: skip

    def of(*scores: float) -> dict[int, Any]:
        return {
            seed: {"measures": {"score": score}, "seconds": {"train": 1.0}, "means": {}}
            for seed, score in enumerate(scores, start=1)
        }

    rows = {"a": of(1, 2, 3), "b": of(2, 3.1, 3.9), "c": of(1, 2)}
    one, other = summary.differences(plan, rows)
    # Differences 1, 1.1, 0.9: mean 1, deviation 0.1, t(2) at 97.5 % is 4.303.
    assert one.mean.value == pytest.approx(1.0) and one.mean.count == 3
    assert one.mean.half == pytest.approx(4.3027 * 0.1 / 3**0.5, rel=1e-4)
    assert one.p == pytest.approx(0.00331, rel=1e-2) and one.corrected == one.p
    assert other.mean.value == 0 and math.isnan(other.p)
    text = summary.section(plan, rows)
    assert "8 of 9 runs" in text and "| b | a | score | 1.000 ± 0.248 | 3 |" in text
    assert len(summary.draw(plan, rows, tmp_path / "plots")) == 1
    assert summary.choose(plan, rows)["simpo"] == {}
    lines = evidence.table(plan, rows, ["score"]).splitlines()
    p = f"p {one.corrected:.3g}"
    assert lines[3].startswith("| b | 3 | 3.000 ± ")
    assert lines[3].endswith(f" | 1.000 ± 0.248, {p} |")
    assert lines[-1] == "(Differences: from `a`. 8 of 9 runs, `plans/p.yml`.)"


def test_the_page_of_evidence_says_what_the_rows_say(capsys) -> None:
    assert evidence.main(["--check"]) == 0, capsys.readouterr().out


def test_large_numbers_are_shown_whole() -> None:
    assert str(summary.Mean(55786.6, 247.51, 5)) == "55,787 ± 248"
    assert str(summary.Mean(0.0312, 0.0061, 5)) == "0.031 ± 0.006"


def test_the_plans_can_be_run_and_the_rows_are_theirs() -> None:
    plans = [
        results.read_plan(path)
        for path in sorted(WORLD.glob("plans/*.yml"))
        if path.name == "tune.yml" or (WORLD / "tuned.yml").is_file()
    ]
    keys = {key for key, *_ in run.planned(plans)}
    rows = results.read_results()
    for key, row in rows.items():
        assert key == results.key_of(row["settings"], row["seed"])
    assert rows.keys() <= keys
