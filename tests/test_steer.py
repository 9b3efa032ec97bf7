"""`axolotl amopo steer`: what asking changes, by hand and through the whole command."""

import json
import resource
import shutil
from dataclasses import replace

import numpy as np
import pytest
from click.testing import CliRunner
from runs import steering, write_jsonl

from axolotl_amopo.commands import amopo
from axolotl_amopo.commands.kit.generator import TransformersEngine
from axolotl_amopo.commands.kit.launch import LOCK, own_folder
from axolotl_amopo.commands.kit.models import find_model
from axolotl_amopo.commands.steer.collect import STATE, Asked, Said, _read, check_same
from axolotl_amopo.commands.steer.measure import (
    Rated,
    SteerReport,
    measure,
    notes,
    rank_correlation,
)
from axolotl_amopo.errors import AMoPOError
from axolotl_amopo.steering.asks import asks_of, thinned
from axolotl_amopo.steering.steering import Weights

KINDS = ("sweep", "front")
NAMES = ["helpfulness", "is_safe", "toxicity"]


# What is asked for


def test_all_that_is_asked_for():
    asks = asks_of(steering(), NAMES, points=3)
    assert [ask.kind for ask in asks[:2]] == ["plain", "best"]
    swept = {name: [ask.number for ask in asks if ask.dimension == name] for name in NAMES}
    assert swept == {"helpfulness": [1, 3, 5], "is_safe": [0, 1], "toxicity": [-2, 0, 2]}
    front = [ask.settings for ask in asks if ask.kind == "front"]
    assert len(front) == 7 and all(isinstance(weights, Weights) for weights in front)
    assert all(sum(weights.values()) == pytest.approx(1) for weights in front)
    assert len(asks) == 2 + 3 + 2 + 3 + 7


def test_a_part_of_it_alone():
    kinds = [{ask.kind for ask in asks_of(steering(), NAMES, only=only)} for only in KINDS]
    assert kinds == [{"plain", "best", "sweep"}, {"plain", "best", "front"}]
    with pytest.raises(AMoPOError, match="no front to ask for"):
        asks_of(steering(), NAMES[:2], only="front")


def test_no_front_where_a_dimension_has_no_rater():
    kinds = [ask.kind for ask in asks_of(steering(), NAMES[:2])]
    assert "front" not in kinds and "sweep" in kinds


def test_a_model_without_numbers_is_asked_by_name():
    asks = asks_of(steering(rating_in_prompt="none"), NAMES)
    assert [(ask.dimension, ask.number) for ask in asks if ask.kind == "sweep"] == [
        (name, None) for name in NAMES
    ]
    assert not any(ask.kind == "front" for ask in asks)


def test_a_model_of_weights_is_asked_by_weights():
    weighted = steering(prompts=NAMES, one_prompt=True, weighted=True, rating_in_prompt="none")
    asks = asks_of(weighted, NAMES)
    numbers = [ask.number for ask in asks if ask.dimension == "is_safe"]
    assert numbers == [0, 0.2, 0.5, 0.8, 1] and not any(ask.kind == "best" for ask in asks)


def test_the_only_dimension_has_all_the_weight():
    alone = steering(
        prompts=["is_safe"],
        dimensions=[steering().dimension("is_safe")],
        one_prompt=True,
        weighted=True,
        rating_in_prompt="none",
    )
    asks = asks_of(alone, ["is_safe"])
    assert [(ask.kind, ask.settings) for ask in asks] == [
        ("plain", {}),
        ("sweep", {"is_safe": None}),
    ]


def test_a_model_without_instructions_is_asked_plainly():
    plain = steering(template="", overall_template="")
    assert [ask.kind for ask in asks_of(plain, NAMES)] == ["plain"]
    asks, said, ratings = answers(follows, asks=asks_of(plain, NAMES))
    told = " ".join(notes([measure("m", asks, said, ratings, SCALES)], 40))
    assert "trained without instructions" in told


def test_thinning_keeps_both_ends():
    assert thinned([1, 2, 3, 4, 5, 6], 3)[::2] == [1, 6]
    assert thinned([1, 2], 5) == [1, 2]


# What is measured

SCALES = [Rated("helpfulness", (1, 5)), Rated("toxicity", (-2, 2), lower=True)]
TWO = steering(
    prompts=["overall", "helpfulness", "toxicity"],
    dimensions=[steering().dimension("helpfulness"), steering().dimension("toxicity")],
)


def answers(rating, prompts=40, asks=None):
    """Answers to every ask, rated by a function of ask and prompt; as many words as asked for."""
    asks = asks or asks_of(TWO, ["helpfulness", "toxicity"])
    said = [
        Said(i, p, 0, " ".join(["w"] * int(3 + (asks[i].number or 0))), True)
        for i in range(len(asks))
        for p in range(prompts)
    ]
    return asks, said, [rating(asks[one.ask], one.prompt) for one in said]


def follows(ask, prompt):
    """Gives what is asked of helpfulness, and always the same toxicity."""
    asked = ask.number if ask.dimension == "helpfulness" else 3
    return {"helpfulness": asked + 0.1 * (prompt % 3), "toxicity": 1.0}


def test_a_model_that_follows_is_seen():
    made = measure("m", *answers(follows), SCALES)
    helpful, toxic = made.curves
    assert helpful.levels == [1, 2, 3, 4, 5] and helpful.monotone
    assert helpful.means == pytest.approx([level + 0.0975 for level in helpful.levels])
    assert helpful.rank_correlation > 0.98
    assert helpful.rank_interval[0] <= helpful.rank_correlation <= helpful.rank_interval[1]
    assert helpful.span.change == pytest.approx(4)
    assert (toxic.rank_correlation, toxic.span.change) == (0, 0)
    assert made.effects["helpfulness"]["toxicity"].change == 0
    assert made.effects["helpfulness"]["words"].change == 4
    assert made.effects["toxicity"]["helpfulness"].change == 0
    assert made.plain["helpfulness"].change == pytest.approx(3.0975)


def test_a_model_that_does_not_follow_has_an_interval_around_nothing():
    draws = np.random.default_rng(0)
    made = measure(
        "m",
        *answers(lambda ask, p: {"helpfulness": draws.uniform(1, 5), "toxicity": draws.normal()}),
        SCALES,
    )
    for curve in made.curves:
        assert curve.rank_interval[0] < 0 < curve.rank_interval[1]
        assert curve.span.interval[0] < 0 < curve.span.interval[1]


def test_intervals_count_questions_not_answers():
    """A question whose answers are all alike says as much as one answer."""
    draws = np.random.default_rng(1).normal(size=40)

    def of_prompt(ask, prompt):
        return {"helpfulness": 3 + draws[prompt % 4], "toxicity": 0.0}

    asks, said, ratings = answers(of_prompt, prompts=4)
    few = measure("m", asks, said, ratings, SCALES).plain["helpfulness"].interval
    repeated = [replace(one, sample=s) for one in said for s in range(10)]
    more = measure("m", asks, repeated, [r for r in ratings for _ in range(10)], SCALES)
    assert more.plain["helpfulness"].interval == pytest.approx(few)


def test_the_front_takes_lower_as_better_where_it_is():
    """All points alike: half of helpfulness, a quarter of the way to the most toxic."""
    made = measure("m", *answers(lambda a, p: {"helpfulness": 3, "toxicity": -1}), SCALES)
    assert made.front.volume == pytest.approx(0.5 * 0.75)
    assert made.front.interval == pytest.approx((0.375, 0.375))
    assert made.front.points[0] == pytest.approx([0.5, 0.75])
    assert "weights" in made.front.asked[-1]


def test_a_front_of_noise_alone_is_not_better_than_one_point():
    """All asks give the same on average: half of both, so the volume is a quarter."""
    inside = 0
    for seed in range(5):
        draws = np.random.default_rng(seed)

        def noise(ask, prompt, draws=draws):
            return {"helpfulness": draws.uniform(1, 5), "toxicity": draws.uniform(-2, 2)}

        asks = asks_of(TWO, ["helpfulness", "toxicity"], only="front")
        low, high = measure("m", *answers(noise, asks=asks), SCALES).front.interval
        inside += low <= 0.25 <= high
    assert inside >= 4


def test_the_front_is_of_the_models_own_dimensions():
    """Ratings of another dimension change no volume."""
    more = [*SCALES, Rated("style", (0, 1))]
    asks, said, ratings = answers(
        lambda a, p: {"helpfulness": 3, "toxicity": -1, "style": (p % 2) * 1.0}
    )
    made = measure("m", asks, said, ratings, more)
    assert made.front.dimensions == ["helpfulness", "toxicity"]
    assert made.front.volume == pytest.approx(0.5 * 0.75)
    assert "style" in made.plain and "style" in made.effects["helpfulness"]


def test_missing_ratings_count_for_nothing_and_are_told():
    def sometimes(ask, prompt):
        return follows(ask, prompt) | ({"helpfulness": None} if prompt == 0 else {})

    asks, said, ratings = answers(sometimes)
    made = measure("m", asks, said, ratings, SCALES)
    assert made.unrated == len(asks)
    assert made.curves[0].means[0] == pytest.approx(1 + 0.1 * sum(p % 3 for p in range(1, 40)) / 39)
    assert f"{len(asks)} ratings are missing" in " ".join(notes([made], 40))


def test_more_weight_of_a_dimension_asks_for_its_better_end():
    """Lower toxicity is better, so a model follows where more weight gives less of it."""
    weighted = TWO.model_copy(
        update={"prompts": ["helpfulness", "toxicity"], "one_prompt": True, "weighted": True}
    )
    asks = asks_of(weighted, ["helpfulness", "toxicity"], only="sweep")

    def less_with_weight(ask, prompt):
        return {"helpfulness": 3.0, "toxicity": 2 - 4 * (ask.number or 0)}

    _, toxic = measure("m", *answers(less_with_weight, asks=asks), SCALES).curves
    assert (toxic.rank_correlation, toxic.monotone) == (pytest.approx(1), True)
    assert toxic.rank_interval == pytest.approx((1, 1))
    assert toxic.span.change == -4 and toxic.means[0] > toxic.means[-1]


def test_a_dimension_of_which_one_level_alone_is_rated():
    def once(ask, prompt):
        rated = ask.kind == "sweep" and ask.number == 1
        return {"helpfulness": 2.0 if rated else None, "toxicity": 0.0}

    made = measure("m", *answers(once), SCALES)
    assert not made.curves[0].monotone and np.isnan(made.curves[0].rank_correlation)
    report = SteerReport(40, 1, ["helpfulness"], {}, [], {}, [made])
    told = json.loads(json.dumps(report.to_json(), allow_nan=False))["models"][0]
    assert told["curves"][0]["rank_correlation"] is None
    assert told["plain"]["helpfulness"] == {"change": None, "interval": [None, None]}
    assert told["front"]["volume"] is None


def test_a_front_without_a_rating_has_no_interval():
    made = measure("m", *answers(lambda a, p: {"helpfulness": 3, "toxicity": None}), SCALES)
    assert all(np.isnan(value) for value in (made.front.volume, *made.front.interval))


def test_what_a_reader_should_know():
    asks, said, ratings = answers(follows, prompts=4)
    cut = [Said(one.ask, one.prompt, 0, one.text, False) for one in said]
    told = " ".join(notes([measure("m", asks, cut, ratings, SCALES)], 4))
    assert "4 questions are few" in told and "100% of its answers were cut off" in told


def test_ranks_are_spearmans():
    from scipy.stats import spearmanr

    x, y = np.random.default_rng(0).integers(5, size=(2, 50)).astype(float)
    assert rank_correlation(x, y) == pytest.approx(spearmanr(x, y).statistic)
    y[0] = np.nan
    assert rank_correlation(x, y) == pytest.approx(spearmanr(x[1:], y[1:]).statistic)
    assert rank_correlation(x, np.ones(50)) == 0
    assert np.isnan(rank_correlation(x, np.full(50, np.nan)))  # a resample without ratings


def test_resamples_without_ratings_do_not_widen_intervals():
    """All ratings are of 1 question in 4; of 4, a third of the resamples lack it."""

    def of_one(ask, prompt):
        return {"helpfulness": ask.number if prompt == 0 else None, "toxicity": 0.0}

    asks = asks_of(TWO, ["helpfulness", "toxicity"], only="sweep")[2:7]
    asks = [asks_of(TWO, ["helpfulness"])[0], *asks]
    made = measure("m", *answers(of_one, prompts=4, asks=asks), SCALES)
    assert made.curves[0].rank_interval == pytest.approx((1, 1))


def test_answers_that_are_not_as_many_everywhere_are_refused():
    asks, said, ratings = answers(follows)
    with pytest.raises(ValueError, match="answers are not"):
        measure("m", asks, said[1:], ratings[1:], SCALES)


# Answers that a file keeps


def test_lines_of_answers_end_with_a_line_feed_alone(tmp_path):
    """Other ends of lines, and a character that a kill cut, are no reason to ask again."""
    path = tmp_path / "m.jsonl"
    lines = [
        json.dumps(
            {
                "response": f"one\u2028two\x85{prompt}",
                "amopo": {"finished": True},
                "steer": {"ask": ask, "prompt": prompt, "sample": 0},
            },
            ensure_ascii=False,
        )
        for ask in (0, 1)
        for prompt in (0, 1)
    ]
    whole = "\n".join(lines[:2]) + "\n"
    path.write_bytes((whole + lines[2] + "\n" + lines[3]).encode()[:-12] + "é".encode()[:1])
    found = _read(path, 2, 2)
    assert [(one.ask, one.text[-5:]) for one in found] == [(0, "two\x850"), (0, "two\x851")]
    assert path.read_text(encoding="utf-8") == whole


def test_a_full_disk_leaves_the_answers(tmp_path, monkeypatch):
    path = tmp_path / "m.jsonl"
    row = {"response": "a", "amopo": {"finished": True}}
    rows = [row | {"steer": {"ask": ask, "prompt": 0, "sample": 0}} for ask in (0, 1)]
    path.write_text("".join(json.dumps(one) + "\n" for one in rows) + "{", encoding="utf-8")
    before = path.read_bytes()

    def full(self, text, **options):
        self.write_bytes(b"")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(path), "write_text", full)
    with pytest.raises(OSError, match="No space"):
        _read(path, 1, 2)
    assert path.read_bytes() == before


# The command

RATERS = """
dimensions:
  helpfulness: {function: "steer_raters:vowels", scale: [0, 1]}
  toxicity: {formula: characters, scale: [0, 200], direction: lower}
  is_safe: {function: "steer_raters:first", scale: [0, 1]}
"""
FUNCTIONS = """
def vowels(item):
    return sum(letter in "aeiou" for letter in item.response) / max(1, len(item.response))

def first(item):
    return float(item.row["id"] % 2)
"""


def run(*arguments):
    return CliRunner().invoke(amopo, ["steer", *map(str, arguments)])


@pytest.fixture
def files(tmp_path):
    (tmp_path / "raters.yml").write_text(RATERS, encoding="utf-8")
    (tmp_path / "steer_raters.py").write_text(FUNCTIONS, encoding="utf-8")
    rows = [{"prompt": text, "id": i} for i, text in enumerate(["Why?", "Who was it?", "Where?"])]
    write_jsonl(tmp_path / "q.jsonl", rows)
    return tmp_path


def options(files, **changes):
    given = {
        "--raters": files / "raters.yml",
        "--input": files / "q.jsonl",
        "--output": files / "steered",
        "--max-new-tokens": 6,
        "--points": 2,
    } | changes
    return [text for pair in given.items() for text in pair]


def test_the_whole_command_and_going_on(files, adapter, monkeypatch):
    page = files / "page.html"
    done = run(adapter, *options(files), "--html", page, "--json")
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout.splitlines()[-1])
    assert [model["name"] for model in report["models"]] == ["adapter", "base"]
    assert (report["prompts"], report["lower"]) == (3, ["toxicity"])
    asks = 2 + 3 * 2 + 7
    for name in ("adapter", "base"):
        path = files / "steered" / "answers" / f"{name}.jsonl"
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        assert len(lines) == asks * 3
        assert lines[1]["prompt"] == "Who was it?" and lines[1]["id"] == 1
        words = [line["response"] for line in lines if not line["amopo"].get("settings", True)]
        plain = next(m for m in report["models"] if m["name"] == name)["plain"]
        mean = np.mean([min(len(word), 200) for word in words])
        assert plain["toxicity"]["change"] == pytest.approx(mean)
        assert plain["is_safe"]["change"] == pytest.approx(1 / 3)  # of the row, not the answer
    # The base answers for itself.
    own = (files / "steered" / "answers" / "adapter.jsonl").read_text(encoding="utf-8")
    assert [json.loads(line)["response"] for line in own.splitlines()] != [
        line["response"] for line in lines
    ]
    html = page.read_text(encoding="utf-8")
    assert html.count("<svg") == 3 + 2 + 3 and "helpfulness: rating obtained" in html

    # A kill in the middle of a line: the ask that it cut is answered again, and no other.
    whole = path.read_text(encoding="utf-8")
    path.write_text("".join(whole.splitlines(keepends=True)[:-1]) + '{"prom', encoding="utf-8")
    calls = []
    answer = TransformersEngine.generate
    monkeypatch.setattr(
        TransformersEngine, "generate", lambda *a: calls.append(len(a[1])) or answer(*a)
    )
    again = run(adapter, *options(files), "--json")
    assert again.exit_code == 0 and calls == [3], again.output
    assert json.loads(again.stdout.splitlines()[-1]) == report
    assert path.read_text(encoding="utf-8") == whole

    # Other questions in the same folder, or other tools beside them, are another measurement.
    rows = [json.loads(line) for line in (files / "q.jsonl").open(encoding="utf-8")]
    write_jsonl(files / "q.jsonl", [row | {"tools": [{"type": "function"}]} for row in rows])
    other = run(adapter, *options(files))
    assert other.exit_code == 1 and "other prompts" in other.output, other.output
    write_jsonl(files / "q.jsonl", [{"prompt": "How?", "id": 1}, {"prompt": "When?", "id": 2}])
    other = run(adapter, *options(files))
    assert other.exit_code == 1 and "other prompts" in other.output and "--force" in other.output
    assert path.read_text(encoding="utf-8") == whole
    forced = run(adapter, *options(files), "--force", "--no-base", "--only", "front")
    assert forced.exit_code == 0 and "2 questions are few" in forced.stdout, forced.output
    assert "helpfulness: rated 0 to 1, by function steer_raters:vowels" in forced.stdout
    assert max(map(len, forced.stdout.splitlines()[:-1])) <= 80  # the last one is a path
    assert not path.exists()


def test_models_join_those_that_are_there(files, adapter, base, tmp_path, monkeypatch):
    short = [*options(files), "--only", "sweep", "--json"]
    assert run(adapter, *short).exit_code == 0
    other = tmp_path / "other"
    shutil.copytree(adapter, other)
    calls = []
    answer = TransformersEngine.generate
    monkeypatch.setattr(
        TransformersEngine, "generate", lambda *a: calls.append(len(a[1])) or answer(*a)
    )
    done = run(adapter, *short, "--model", f"later={other}")
    assert done.exit_code == 0 and calls == [3] * 8, done.output  # the new one's alone
    models = json.loads(done.stdout.splitlines()[-1])["models"]
    assert [one["name"] for one in models] == ["adapter", "later", "base"]
    assert models[1]["plain"] == models[0]["plain"] != models[2]["plain"]

    # Trained again, it is another model.
    (other / "adapter_model.safetensors").touch()
    changed = run(adapter, *short, "--model", f"later={other}")
    assert changed.exit_code == 1 and "with another later" in changed.output
    assert run(adapter, *short).exit_code == 0


def test_a_full_disk_is_said_and_begun_again(files, adapter, monkeypatch):
    """Here before the first model is loaded: no file may become larger than its first bytes."""
    monkeypatch.setattr(TransformersEngine, "__init__", None)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, before[1]))
    try:
        done = run(adapter, *options(files))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert done.exit_code == 1 and "can't be written (File too large)" in done.output, done.output
    assert [one.name for one in (files / "steered").iterdir()] == [LOCK]


def test_names_are_those_of_files(files, adapter, tmp_path):
    """A model in a folder called base must not have its answers in the base's file."""
    own = tmp_path / "base"
    shutil.copytree(adapter, own)
    done = run(own, *options(files), "--dry-run")
    assert "tuned: 15 x 3 answers" in done.stdout and "base: 15 x 3" in done.stdout, done.output
    done = run(f"mine={own}", *options(files), "--dry-run")
    assert "mine: 15 x 3 answers" in done.stdout and "tuned" not in done.stdout, done.output
    done = run(f"base={own}", *options(files), "--dry-run")
    assert done.exit_code == 2 and "'base' is taken" in done.output, done.output
    for name in ("../elsewhere", "a/b", ".."):
        for models in ([f"{name}={adapter}"], [own, "--model", f"{name}={adapter}"]):
            done = run(*models, *options(files))
            assert done.exit_code == 1 and "can't be the name of a file" in done.output, done.output
    assert not (files / "steered").exists()


def test_two_at_once_are_refused(files, adapter):
    with own_folder(files / "steered", STATE):
        done = run(adapter, *options(files))
    assert done.exit_code == 1 and "another process is at work there" in done.output, done.output
    assert [one.name for one in (files / "steered").iterdir()] == [LOCK]


def test_other_words_of_the_instruction_are_another_measurement(adapter, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(adapter, copy)
    asks = asks_of(steering(), NAMES)

    def check(force=False):
        check_same(tmp_path / "kept", {"prompts": []}, [Asked("m", find_model(copy), asks)], force)

    check()
    answers = tmp_path / "kept" / "answers" / "m.jsonl"
    answers.touch()
    check()
    steering(template="Be {{ dimension }}.").save(copy)
    with pytest.raises(AMoPOError, match="with another m"):
        check()
    (tmp_path / "kept" / "steer.json").unlink()  # nobody knows what the answers are to
    check(force=True)
    assert not answers.exists()


def test_a_dry_run_loads_no_model(files, adapter, monkeypatch):
    monkeypatch.setattr(TransformersEngine, "__init__", None)
    done = run(adapter, *options(files), "--dry-run")
    assert done.exit_code == 0 and "adapter: 15 x 3 answers" in done.stdout, done.output
    assert "toxicity=-2" in done.stdout and not (files / "steered").exists()


@pytest.mark.parametrize(
    ("raters", "extra", "message"),
    [
        (RATERS.replace("toxicity:", "harm:").replace("helpfulness:", "help:").replace(
            "is_safe:", "safe:"), [], "name a rater's dimension as the model's"),
        (RATERS.replace(", direction: lower", ""), [], "write direction: lower"),
        (RATERS, ["--samples", 2], "2 times the same answer"),
        (RATERS, ["--model", "adapter=no"], "'adapter' is taken"),
        (RATERS, ["--model", "x=no"], "neither a model's folder nor a YAML"),
    ],
)  # fmt: skip
def test_refused_before_a_model_is_loaded(files, adapter, monkeypatch, raters, extra, message):
    monkeypatch.setattr(TransformersEngine, "__init__", None)
    (files / "raters.yml").write_text(raters, encoding="utf-8")
    done = run(adapter, *options(files), *extra)
    assert done.exit_code in (1, 2) and message in " ".join(done.output.split()), done.output
    assert "Traceback" not in done.output and not (files / "steered").exists()


def test_a_folder_with_other_things_is_left_alone(files, adapter):
    (files / "steered").mkdir()
    (files / "steered" / "thesis.txt").write_text("mine", encoding="utf-8")
    done = run(adapter, *options(files))
    assert done.exit_code == 1 and "holds thesis.txt" in done.output
    assert [one.name for one in (files / "steered").iterdir()] == ["thesis.txt"]


def test_a_dimension_unknown_to_the_model(adapter):
    with pytest.raises(AMoPOError, match="knows no dimension 'honesty'"):
        asks_of(steering(), ["honesty"])
