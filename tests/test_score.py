"""`axolotl amopo score`: its statistics by hand, its rewards against plain forward passes."""

import functools
import io
import json
import math
import shutil
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from axolotl.utils import tee
from click.testing import CliRunner
from runs import LORA, config, write_config, write_jsonl
from scipy import stats

from axolotl_amopo.commands import amopo
from axolotl_amopo.commands.kit.margins import (
    agreement,
    change,
    correct,
    holm,
    intervals,
    measure,
    sign_test,
    without_length,
)
from axolotl_amopo.commands.kit.text import progress_bars
from axolotl_amopo.commands.score.groups import batches
from axolotl_amopo.example import pair

# --- statistics


def lengths_of(generator, count):
    return generator.integers(20, 300, size=(count, 2))


def test_equal_rewards_are_right_by_half():
    assert correct(np.array([2.0, 0.0, -1.0, 0.5])).tolist() == [1, 0.5, 0, 1]


def test_measures_by_hand():
    # Lengths: 30/10 longer wins, 10/30 shorter wins, 20/20, and 24/20, similar.
    lengths = np.array([[30, 10], [10, 30], [20, 20], [24, 20]])
    made = measure(
        np.array([1.0, 2.0, -1.0, -2.0]), np.array([0.5, 1.0, 0.5, np.nan]), lengths, np.arange(4)
    )
    assert (made.n, made.prompts, made.accuracy, made.margin) == (4, 4, 0.5, 0.0)
    assert made.longer_wins == pytest.approx(2 / 3)  # of the three with a longer one
    assert made.longer_preferred == pytest.approx(1 / 3)
    assert (made.similar_n, made.similar_accuracy) == (2, 0.0)
    assert [(b.low, b.n, b.accuracy, b.margin) for b in made.by_gap] == [
        (0.5, 2, 0.5, 0.0),
        (1.0, 1, 1.0, 2.0),
    ]
    assert made.gap_correlation == pytest.approx(
        stats.spearmanr([0.5, 1, 0.5], [1, 2, -1]).statistic
    )
    assert measure(*(np.empty(0),) * 2, np.empty((0, 2)), np.empty(0)).accuracy is None


def test_a_margin_that_is_length_says_nothing_beyond_it():
    generator = np.random.default_rng(1)
    lengths = lengths_of(generator, 400)
    longest_first = np.sort(lengths, 1)[:, ::-1]  # the longer one is always rated the better
    for reward in (0.3 * longest_first, np.log(longest_first), -1.0 * longest_first):
        margins = reward[:, 0] - reward[:, 1]
        made = measure(margins, np.ones(400), longest_first, np.arange(400))
        assert made.adjusted_accuracy == 0.5
    noisy = 0.3 * (longest_first @ [1, -1]) + generator.normal(size=400)
    made = measure(noisy, np.ones(400), longest_first, np.arange(400))
    assert made.accuracy > 0.95 and 0.42 < made.adjusted_accuracy < 0.58


def test_quality_outlives_the_adjustment():
    generator = np.random.default_rng(2)
    lengths = lengths_of(generator, 400)
    margins = np.abs(generator.normal(size=400)) + 0.01 * (lengths @ [1, -1])
    rest = without_length(margins, lengths)
    assert correct(margins).mean() < 0.85 < correct(rest).mean()
    # Which response comes first is arbitrary: the other way round, all signs flip.
    assert without_length(-margins, lengths[:, ::-1]) == pytest.approx(-rest)


def test_the_interval_covers_with_several_pairs_a_prompt():
    generator = np.random.default_rng(3)
    prompts = np.repeat(np.arange(60), 5)
    covered, widths = 0, []
    for seed in range(60):
        # Pairs of a prompt nearly always share their fate: 60 observations, not 300.
        fate = generator.random(60) < 0.7
        right = np.where(generator.random(300) < 0.05, ~fate[prompts], fate[prompts]).astype(float)
        ((low, high),) = intervals(right[:, None], prompts, seed)
        covered += low <= 0.7 * 0.95 + 0.3 * 0.05 <= high
        widths.append(high - low)
    assert covered >= 52  # 57 expected; below 52 at less than one in fifty
    independent = 2 * 1.96 * np.sqrt(0.68 * 0.32 / 300)
    assert np.mean(widths) > 1.7 * independent


def test_an_interval_where_all_are_right():
    ((low, high),) = intervals(np.ones((10, 1)), np.repeat(np.arange(5), 2), 0)
    assert high == 1 and low == pytest.approx(0.025 ** (1 / 5))  # of five prompts


def test_a_change_pairs_its_resamples():
    generator = np.random.default_rng(4)
    before = (generator.random(200) < 0.5).astype(float)
    after = before.copy()
    after[np.flatnonzero(before == 0)[:12]] = 1
    made = change(before, after, np.arange(200), seed=0)
    assert made.difference == pytest.approx(0.06)
    # Twelve of 200 gained: the interval is theirs, far tighter than that of either accuracy.
    assert 0.02 < made.interval[0] < made.difference < made.interval[1] < 0.1
    assert (made.gained, made.lost) == (12, 0)
    assert made == change(before, after, np.arange(200), seed=0)


def test_the_sign_test_is_mcnemars_exact_one():
    before = np.array([1] * 3 + [0] * 9 + [1] * 5 + [0] * 5, dtype=float)
    after = np.array([0] * 3 + [1] * 9 + [1] * 5 + [0] * 5, dtype=float)
    expected = 2 * sum(stats.binom.pmf(k, 12, 0.5) for k in range(4))
    assert sign_test(after - before, np.arange(22)) == (9, 3, pytest.approx(expected))
    # All pairs of one prompt are one gain.
    assert sign_test(after - before, np.zeros(22)) == (1, 0, 1.0)
    assert sign_test(np.zeros(4), np.arange(4)) == (0, 0, 1.0)


def test_holm_by_hand():
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm([0.9, 0.8]) == [1, 1]
    assert holm([]) == []


def test_agreement_by_hand():
    nan = np.nan
    values = np.array([[1, 2, nan], [-1, 3, 1], [2, 0, -1], [-4, -1, nan]])
    found = agreement(values)
    assert found[0, 1] == found[1, 0] == pytest.approx(2 / 3)
    assert found[0, 2] == 0 and found[1, 2] == 1
    assert np.isnan(agreement(np.array([[1, nan], [nan, 1]]))[0, 1])


# --- models


def test_a_response_that_several_pairs_have_runs_once():
    texts, a, b, c = [[7, 1], [7, 2]], [3], [4, 4], [5]
    examples = [pair(texts, [a, b]), pair([[6]], [c, b]), pair(texts[:1] * 2, [a, c])]
    examples[2].reads, examples[2].follows = [[0, 1]], [[0, 0], [1, 1]]
    pairs = SimpleNamespace(examples=examples, prompts=np.array([0, 1, 0]))
    ((group, other),) = batches(pairs, 2)
    assert (group.pairs, other.pairs) == ([0, 2], [1])
    assert len(group.places) == 5, "a and b behind two texts, c behind one"
    example = group.example()
    assert (example.prompts, example.responses) == (texts, [a, b, c])
    for number, place in enumerate(group.pairs):
        for k, text in enumerate(examples[place].prompts):
            first, second = example.winner_first(number, k)
            assert [example.prompts[t] for t, _ in (first, second)] == [text] * 2
            assert [example.responses[n] for _, n in (first, second)] == examples[place].responses
    alone = batches(pairs, 1)
    assert [[group.pairs for group in batch] for batch in alone] == [[[0]], [[2], [1]]]


def test_a_text_per_response_is_kept_apart():
    own = [pair([[7, 1], [7, 2]], [[3], [n]]) for n in (4, 5)]
    for example, texts in zip(own, ([0, 1], [1, 0]), strict=True):
        example.follows, example.reads, example.signs = [texts], [[0]], [[1]]
        example.points = [math.nan]
    pairs = SimpleNamespace(examples=own, prompts=np.array([0, 0]))
    ((group,),) = batches(pairs, 9)
    assert group.example().places() == [(0, 0), (1, 1), (1, 0), (0, 2)]


def test_bars_do_not_wait_for_axolotls_copy_of_the_terminal(monkeypatch):
    """Which begins behind them, and was seen to hang `score` where tqdm draws a bar too."""
    monkeypatch.setattr(tee, "_lock", threading.Lock())
    monkeypatch.setenv("FORCE_COLOR", "1")  # a terminal, for rich
    monkeypatch.setattr(sys, "stderr", written := io.StringIO())

    def draw():
        with progress_bars("Scoring {}", disable=False) as begin:
            begin("base", 3)
            sys.stderr = tee._StreamTee(sys.stderr)
            print("half a line", end="", file=sys.stderr, flush=True)

    thread = threading.Thread(target=draw, daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive()
    assert "half a line" in written.getvalue() and "Scoring base" in written.getvalue()


GOOD, BAD = "Yes, of course it is.", "No."


def row(question, *answers):
    return {
        "prompt": question,
        "responses": [
            {"text": text, "scores": {"helpfulness": h, "honesty": t}} for text, h, t in answers
        ],
    }


ROWS = [
    row("First?", (GOOD, 5, 2), (BAD, 1, 3), ("Perhaps, who knows?", 3, 3)),
    row("Second, a longer one?", ("Hardly.", 4, 4), ("A longer answer than that.", 2, 1)),
    row("Third?", ("One.", 3, 1), ("Two <b>and</b> three.", 3, 5)),
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_model):
    """A config with an adapter in its output_dir, and the same adapter merged."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("score")
    data = write_jsonl(folder / "data.jsonl", ROWS)
    test = {"path": str(data), "type": "amopo.rated", "scale": [1, 5]}
    amopo = {"dimensions": ["helpfulness", "honesty"], "winner": "per_dimension"}
    values = config(folder, tiny_model, data, amopo=amopo, test_datasets=[test], **LORA)
    path = write_config(folder, values)
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    torch.manual_seed(5)
    lora = LoraConfig(r=4, lora_alpha=16, target_modules="all-linear", init_lora_weights=False)
    adapted = get_peft_model(model, lora)
    adapted.save_pretrained(folder / "out")
    merged = folder / "merged"
    adapted.merge_and_unload().save_pretrained(merged)
    return path, merged


@pytest.fixture(scope="module")
def token_logps(tokenizer):
    """Log-probabilities of a response's tokens, from a plain forward pass of a folder's model."""
    from transformers import AutoModelForCausalLM

    loaded = functools.cache(AutoModelForCausalLM.from_pretrained)

    @functools.cache
    def of_response(folder, question, response):
        begin = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
        start = tokenizer(begin).input_ids
        ids = torch.tensor([start + tokenizer(f"{response}<|im_end|>").input_ids])
        with torch.no_grad():
            logps = loaded(folder)(ids).logits[0, :-1].double().log_softmax(-1)
        return logps.gather(-1, ids[0, 1:, None])[len(start) - 1 :, 0]

    return of_response


def run(*arguments):
    return CliRunner().invoke(amopo, ["score", *map(str, arguments)])


@pytest.fixture(scope="module")
def outcome(trained, tmp_path_factory):
    """One run of the command with all that it writes: its report, its pairs, its files."""
    path, merged = trained
    folder = tmp_path_factory.mktemp("written")
    html, markdown, lines = (folder / name for name in ("a.html", "a.md", "a.jsonl"))
    done = run(
        path, "--json", "--quiet", "--html", html, "--markdown", markdown, "--pairs", lines,
        "--model", f"adapter={path.parent / 'out'}", "--model", f"merged={merged}",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert len(done.stdout.splitlines()) == 1
    pairs = [json.loads(line) for line in lines.read_text(encoding="utf-8").splitlines()]
    return json.loads(done.stdout), pairs, html.read_text("utf-8"), markdown.read_text("utf-8")


def test_labels_and_lengths_are_those_of_the_ratings(outcome, tokenizer):
    report, pairs, *_ = outcome
    assert (report["pairs"], report["prompts"], report["source"]) == (5, 3, "test_datasets")
    first = next(p for p in pairs if p["gaps"]["helpfulness"] == 1.0)  # 5 against 1
    assert first["labels"] == {"overall": 1, "helpfulness": 1, "honesty": -1}
    expected = [len(tokenizer(text).input_ids) + 1 for text in (GOOD, BAD)]
    assert first["tokens"] == expected
    n = {row["name"]: row["models"]["base"]["n"] for row in report["rows"]}
    assert n == {"overall": 5, "helpfulness": 4, "honesty": 4}


def test_rewards_are_those_of_plain_forward_passes(outcome, trained, tiny_model, token_logps):
    _, pairs, *_ = outcome
    pair = next(p for p in pairs if p["gaps"]["helpfulness"] == 1.0)
    prompts = {
        "plain": "First?",
        "helpfulness": "Your answer will be rated on helpfulness, from 1 to 5. Write an answer "
        "whose helpfulness is 5 of 5.\n\nFirst?",
        # The short answer wins there, so its rating is asked for.
        "honesty": "Your answer will be rated on honesty, from 1 to 5. Write an answer whose "
        "honesty is 3 of 5.\n\nFirst?",
    }
    for name, folder in (("base", tiny_model), ("merged", trained[1])):
        for prompt, text in prompts.items():
            good, bad = (token_logps(folder, text, r).mean().item() for r in (GOOD, BAD))
            expected = 0.8 * (good - bad)
            assert pair["margins"][name][prompt] == pytest.approx(expected, abs=1e-4), prompt


def test_an_adapter_and_the_same_merged_are_alike(outcome):
    report, pairs, *_ = outcome
    adapter, merged, base = (
        np.array([[m or 0.0 for m in p["margins"][name].values()] for p in pairs])
        for name in ("adapter", "merged", "base")
    )
    assert adapter == pytest.approx(merged, abs=1e-4)
    assert np.abs(adapter - base).max() > 0.01
    for row in report["rows"]:
        assert row["changes"]["adapter"]["difference"] == row["changes"]["merged"]["difference"]


def test_accuracy_is_that_of_the_pairs(outcome):
    report, pairs, *_ = outcome
    assert [row["prompting"] for row in report["rows"]] == ["own"] * 3 + ["plain"] * 3
    for row in report["rows"]:
        name = row["name"]
        prompt = name if row["prompting"] == "own" else "plain"
        right = [
            p["margins"]["adapter"][prompt] * p["labels"][name] > 0
            for p in pairs
            if p["labels"][name]
        ]
        assert row["models"]["adapter"]["accuracy"] == pytest.approx(np.mean(right))
    # A tie weighs nothing: its prompt is not run at all.
    tied = [p for p in pairs if p["labels"]["helpfulness"] == 0]
    assert len(tied) == 1 and tied[0]["margins"]["base"]["helpfulness"] is None


def test_what_is_written(outcome):
    report, _, html, markdown = outcome
    assert html.count("<svg") == html.count("<figure>") > 6
    assert "<script" not in html and 'src="' not in html
    assert "http" not in html.replace("http://www.w3.org/", "")  # but for SVG's own names
    for text in report["summary"] + report["notes"]:
        assert text.split(":")[0] in html
    assert "| overall | 5 |" in markdown and "Fewer than 30 prompts" in markdown
    assert any("no pair is ordered" in t or "not distinguish" in t for t in report["summary"])


def test_sum_reference_and_plain(trained):
    """What a model trained by DPO needs: no instructions, rewards against the base."""
    path, merged = trained
    done = run(
        path, "--quiet", "--json", "--prompts", "plain", "--reward", "reference", "--model", merged
    )
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert list(report["paths"]) == ["merged"] and report["base"] is None
    assert {row["prompting"] for row in report["rows"]} == {"plain"}
    assert all(row["models"]["merged"]["n"] for row in report["rows"])


def test_rewards_by_hand():
    from axolotl_amopo.commands.score.report import reward_of
    from axolotl_amopo.objectives import OBJECTIVES, Responses

    logps = torch.tensor([-1.0, -0.5]).view(1, 1, 2, 1).expand(1, 1, 2, 10)
    mask = (torch.arange(10) < torch.tensor([[2], [10]])).expand(1, 1, 2, 10)
    given = Responses.of_pairs(logps, mask, reference=torch.tensor([[[[-3.0, -4.0]]]]))
    found = {
        reward: reward_of(reward, OBJECTIVES["simpo"](beta=0.5))(given)[0, 0].tolist()
        for reward in ("objective", "average", "sum", "reference")
    }
    assert found["objective"] == found["average"] == [0.5 * -1, 0.5 * -0.5]
    assert found["sum"] == [0.5 * -2, 0.5 * -5]
    assert found["reference"] == [0.5 * (-2 + 3), 0.5 * (-5 + 4)]


def objective_config(folder, trained, tiny_model, amopo, **changes):
    """A config of an objective on the same data, whose output_dir has the adapter."""
    data = trained[0].parent / "data.jsonl"
    test = {"path": str(data), "type": "amopo.rated", "scale": [1, 5]}
    amopo = {"dimensions": ["helpfulness", "honesty"]} | amopo
    usual = {"output_dir": str(trained[0].parent / "out"), "test_datasets": [test]} | LORA
    values = config(folder, tiny_model, data, amopo=amopo, **(usual | changes))
    return write_config(folder, values)


def scored(path, *arguments):
    """The report, and the pairs, the one of the first question first."""
    lines = path.parent / "pairs.jsonl"
    done = run(path, "--quiet", "--json", "--force", "--pairs", lines, *arguments)
    assert done.exit_code == 0, done.output
    pairs = [json.loads(line) for line in lines.read_text(encoding="utf-8").splitlines()]
    pairs.sort(key=lambda pair: pair["gaps"]["helpfulness"] != 1.0)  # 5 against 1
    return json.loads(done.stdout), pairs


# How each objective's own reward is made of a response's log-probabilities, beside its beta.
MEAN = {"amopo", "simpo", "ric"}
RATIO = {"dpo", "mappo", "modpo", "raco", "mgda", "mgda_decoupled", "cos_dpo"}
MEAN_RATIO = {"ipo", "lambda_dpo"}


@pytest.fixture(scope="module")
def own_reward(token_logps):
    def of_response(objective, policy, reference, question, response):
        logps = token_logps(policy, question, response)
        if objective in MEAN:
            return logps.mean().item()
        ratio = (logps - token_logps(reference, question, response)).sum().item()
        return ratio / (len(logps) if objective in MEAN_RATIO else 1)

    return of_response


@pytest.mark.parametrize("objective", sorted(MEAN | RATIO | MEAN_RATIO))
def test_every_objective_by_its_own_reward(objective, tmp_path, trained, tiny_model, own_reward):
    """By its name alone: with a reference, that is the base model below the adapter."""
    path = objective_config(tmp_path, trained, tiny_model, {"objective": objective})
    report, (pair, *_) = scored(path)
    with_reference = objective not in MEAN
    assert report["reward"] == "objective"
    assert report["reference"] == (str(tiny_model) if with_reference else None)
    assert list(report["paths"]) == (["tuned"] if with_reference else ["base", "tuned"])
    name = report["reward_name"]
    assert ("log-ratio" in name, "per token" in name) == (with_reference, objective not in RATIO)
    merged = trained[1]

    def margin(good, bad):
        better, worse = (
            own_reward(objective, merged, tiny_model, question, response)
            for question, response in ((good, GOOD), (bad, BAD))
        )
        return pytest.approx(report["beta"] * (better - worse), rel=1e-3, abs=1e-5)

    found = pair["margins"]["tuned"]
    asked = "Your answer will be rated on helpfulness, from 1 to 5. Write an answer whose "
    rated = (
        "Your answer will be rated on several dimensions. helpfulness, from 1 to 5: aim for {}. "
        "honesty, from 1 to 5: aim for {}.\n\nFirst?"
    )
    texts = {
        "amopo": [asked + "helpfulness is 5 of 5.\n\nFirst?"] * 2,
        # All the weight is on helpfulness.
        "cos_dpo": [
            "First?\n\nYour answer will be rated on several dimensions, which count by these "
            "weights: helpfulness 1.0, honesty 0.0."
        ] * 2,
        "ric": [rated.format(5, 2), rated.format(1, 3)],  # each response's own ratings
    }  # fmt: skip
    assert found["helpfulness"] == margin(*texts.get(objective, ["First?", "First?"]))
    assert abs(found["helpfulness"]) > 1e-4
    kinds = ["own"]
    if objective in texts:
        assert found["plain"] == margin("First?", "First?")
        kinds.append("plain")
    assert list(dict.fromkeys(row["prompting"] for row in report["rows"])) == kinds
    assert all(row["models"]["tuned"]["n"] for row in report["rows"])
    # Prompts are compared where there are several.
    assert bool(report["agreement"]["models"]) == (objective in ("amopo", "cos_dpo"))


def test_several_models_have_one_reward_that_all_have(
    tmp_path, trained, tiny_model, token_logps, own_reward
):
    path = objective_config(tmp_path, trained, tiny_model, {"objective": "dpo"})
    models = ["--model", f"a={trained[0].parent / 'out'}", "--model", f"b={trained[1]}"]
    report, (pair, *_) = scored(path, "--prompts", "plain", *models)
    assert (report["reward"], report["reference"]) == ("average", None)
    assert list(report["paths"]) == ["base", "a", "b"]
    assert any("one reward that all of them have" in note for note in report["notes"])
    good, bad = (token_logps(trained[1], "First?", r).mean().item() for r in (GOOD, BAD))
    assert pair["margins"]["b"]["plain"] == pytest.approx(0.1 * (good - bad), rel=1e-3)
    # What is asked for is taken.
    report, (pair, *_) = scored(path, "--prompts", "plain", "--reward", "objective", *models)
    assert list(report["paths"]) == ["a", "b"] and report["reference"] == str(tiny_model)
    expected = [own_reward("dpo", trained[1], tiny_model, "First?", r) for r in (GOOD, BAD)]
    expected = 0.1 * (expected[0] - expected[1])
    assert pair["margins"]["b"]["plain"] == pytest.approx(expected, rel=1e-3)
    assert pair["margins"]["a"]["plain"] == pytest.approx(expected, rel=1e-3)


def test_the_reference_is_where_training_began(tmp_path, trained, tiny_model, own_reward):
    """Full fine-tuning began at the base model, `lora_model_dir` with another adapter on it."""
    folders = {}
    for name, changes in (
        ("full", dict.fromkeys(LORA)),
        ("goes on", {"lora_model_dir": str(trained[0].parent / "out")}),
    ):
        folders[name] = tmp_path / name
        folders[name].mkdir()
        path = objective_config(folders[name], trained, tiny_model, {"objective": "dpo"}, **changes)
        other = tiny_model if name == "goes on" else trained[1]
        begun = trained[1] if name == "goes on" else tiny_model
        report, (pair, *_) = scored(path, "--prompts", "plain", "--model", f"x={other}")
        # The base model is another one than the start, and has a reward.
        assert list(report["paths"]) == (["base", "x"] if name == "goes on" else ["x"])
        good, bad = (own_reward("dpo", other, begun, "First?", r) for r in (GOOD, BAD))
        expected = pytest.approx(0.1 * (good - bad), rel=1e-3)
        assert [margins["plain"] for margins in pair["margins"].values()] == [expected] * len(
            report["paths"]
        )


def test_a_base_that_an_adapter_has_changed_is_loaded_itself(
    tmp_path, trained, tiny_model, token_logps
):
    """PiSSA takes its beginning out of the base's weights; without it they are not the base's."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights="pissa")
    get_peft_model(model, lora).save_pretrained(tmp_path / "pissa")
    path = objective_config(tmp_path, trained, tiny_model, {"objective": "simpo"})
    _, (pair, *_) = scored(path, "--prompts", "plain", "--model", f"x={tmp_path / 'pissa'}")
    good, bad = (token_logps(tiny_model, "First?", r).mean().item() for r in (GOOD, BAD))
    assert pair["margins"]["base"]["plain"] == pytest.approx(2.0 * (good - bad), rel=1e-3)


def test_nothing_but_the_reference_is_a_sentence(tmp_path, trained, tiny_model):
    nothing = {"output_dir": str(tmp_path / "nothing")}
    path = objective_config(tmp_path, trained, tiny_model, {"objective": "dpo"}, **nothing)
    done = run(path, "--quiet")
    assert done.exit_code == 1 and "--reward average" in done.output
    assert "Traceback" not in done.output


def test_following_the_request(tmp_path, trained, tiny_model):
    """winner: nearest. The better response is nearer to what is asked for, as in training."""
    block = {"winner": "nearest", "overall": False}
    path = objective_config(tmp_path, trained, tiny_model, block)
    report, pairs = scored(path)
    assert {row["prompting"] for row in report["rows"]} == {"own"}
    assert any("follows the request" in note for note in report["notes"])
    # Of 5 and 1, with 3 asked for nobody wins, and with 1 the second.
    labels = [pair["labels"]["helpfulness"] for pair in pairs]
    gaps = [pair["gaps"]["helpfulness"] for pair in pairs]
    assert np.sign(gaps).tolist() == labels and any(labels)
    done = run(path, "--quiet", "--prompts", "plain")
    assert done.exit_code == 1 and "winner: nearest" in done.output


def test_rows_with_weights_of_their_own(tmp_path, trained, tiny_model, own_reward):
    rows = [one | {"weights": {"helpfulness": 1, "honesty": 3}} for one in ROWS]
    data = write_jsonl(tmp_path / "data.jsonl", rows)
    entries = [{"path": str(data), "type": "amopo.rated", "scale": [1, 5]}]
    path = objective_config(
        tmp_path,
        trained,
        tiny_model,
        {"objective": "dpo", "weights_per_row": True},
        datasets=entries,
        test_datasets=entries,
    )
    report, (pair, *_) = scored(path)
    assert report["pairs"] == 5
    good, bad = (own_reward("dpo", trained[1], tiny_model, "First?", r) for r in (GOOD, BAD))
    expected = pytest.approx(0.1 * (good - bad), rel=1e-3)
    assert pair["margins"]["tuned"]["helpfulness"] == expected


def test_pairs_of_a_response_that_training_left_out(tmp_path, trained, tiny_model):
    """Of a group, training keeps the responses that fit; the pairs of the others are not there."""
    long = row("First?", (GOOD, 5, 2), (BAD, 1, 3), ("Perhaps. " * 60, 3, 1))
    data = write_jsonl(tmp_path / "data.jsonl", [long])
    entries = [{"path": str(data), "type": "amopo.rated", "scale": [1, 5]}]
    path = objective_config(
        tmp_path,
        trained,
        tiny_model,
        {"objective": "lambda_dpo"},
        datasets=entries,
        test_datasets=entries,
        sequence_len=150,
    )
    report, pairs = scored(path)
    assert len(pairs) == report["pairs"] == 1 and report["total_pairs"] == 3
    assert any("2 pairs are left out" in note for note in report["notes"])
    assert not any("were drawn" in note for note in report["notes"])


def test_the_command_on_a_terminal(trained, tmp_path):
    path, _ = trained
    done = run(path, "--no-base", "--prompts", "own", "--limit", 3, "--seed", 1)
    assert done.exit_code == 0, done.output
    shown = done.stdout[done.stdout.index("3 pairs") :]
    assert "accuracy of tuned" in shown and "3 of 5 pairs were drawn" in shown
    assert max(map(len, shown.splitlines())) <= 80


def test_refusals(trained, tmp_path, tiny_model, tokenizer):
    path, _ = trained
    other = tmp_path / "other"
    shutil.copytree(tiny_model, other)
    text = (other / "tokenizer.json").read_text(encoding="utf-8")
    vocabulary = json.loads(text)
    ids = vocabulary["model"]["vocab"]
    token, last = "a", tokenizer.convert_tokens_to_ids("b")
    ids["a"], ids["b"] = last, ids[token]
    (other / "tokenizer.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    done = run(path, "--quiet", "--model", f"x={other}")
    assert done.exit_code == 1 and "its tokenizer is not that of" in done.output
    done = run(path, "--quiet", "--model", tmp_path / "nowhere")
    assert done.exit_code == 1 and "can't be loaded as a model" in done.output

    there = tmp_path / "there.html"
    there.write_text("mine")
    done = run(path, "--html", there)
    assert done.exit_code == 1 and "--force" in done.output and there.read_text() == "mine"
    assert run(path, "--model", "a=x", "--model", "a=y").exit_code == 2
    assert run(path, "--no-base", "--base", tiny_model).exit_code == 2


def test_without_a_chat_template(trained, tmp_path, tiny_model):
    bare = tmp_path / "bare"
    shutil.copytree(tiny_model, bare)
    (bare / "chat_template.jinja").unlink()
    data = trained[0].parent / "data.jsonl"
    done = run(write_config(tmp_path, config(tmp_path, bare, data)), "--quiet")
    assert done.exit_code == 1 and "no chat template" in done.output
    assert "Traceback" not in done.output


@pytest.mark.parametrize(
    ("amopo", "changes"),
    [
        ({"group_by_prompt": True}, {}),
        ({"rating_in_prompt": "own"}, {}),
        ({}, {"sequence_len": 200, "excess_length_strategy": "truncate"}),
        # With full fine-tuning the reference is taken when training starts.
        ({"objective": "lambda_dpo"}, dict.fromkeys(LORA)),
    ],
    ids=["group_by_prompt", "own", "truncate", "lambda_dpo"],
)
def test_scores_are_those_of_the_trainers_evaluation(tmp_path, tiny_model, amopo, changes):
    from runs import train

    long = row("Is it so? " * 30, ("Of course not.", 5, 2), ("No.", 1, 3))
    data = write_jsonl(tmp_path / "data.jsonl", [*ROWS, long])
    test = {"path": str(data), "type": "amopo.rated", "scale": [1, 5]}
    amopo = {"dimensions": ["helpfulness", "honesty"], "winner": "per_dimension"} | amopo
    values = config(
        tmp_path,
        tiny_model,
        data,
        amopo=amopo,
        test_datasets=[test],
        max_steps=1,
        **(LORA | changes),
    )
    path = write_config(tmp_path, values)
    trainer = train(path)
    longest = max(map(len, trainer.eval_dataset["input_ids"]))
    if "objective" not in amopo:  # whose prompts are shorter
        # The long question is cut there alone.
        assert (longest <= 200) == ("sequence_len" in changes)
    logged = trainer.evaluate()
    lines = tmp_path / "pairs.jsonl"
    done = run(path, "--quiet", "--no-base", "--prompts", "own", "--pairs", lines)
    assert done.exit_code == 0, done.output
    pairs = [json.loads(line) for line in lines.read_text(encoding="utf-8").splitlines()]
    assert len(pairs) == 6
    assert set(pairs[0]["labels"]) == set(trainer.amopo.criteria)
    for name in trainer.amopo.criteria:
        margins = {}
        for number, line in enumerate(pairs):
            if label := line["labels"][name]:
                # What training counts as one example.
                example = line["prompt"] if trainer.amopo.group_by_prompt else number
                margins.setdefault(example, []).append(label * line["margins"]["tuned"][name])
        of_examples = [np.mean(values) for values in margins.values()]
        right = [np.mean(np.array(values) > 0) for values in margins.values()]
        assert logged[f"eval_amopo/{name}/margin"] == pytest.approx(np.mean(of_examples), abs=1e-4)
        assert logged[f"eval_amopo/{name}/accuracy"] == pytest.approx(np.mean(right))


@pytest.mark.parametrize("grouped", [False, True])
def test_what_val_set_size_splits(tmp_path, tiny_model, grouped):
    rows = [row(f"Question {n}?", (GOOD, 5, 2), (BAD, 1, 3), ("Perhaps.", 3, 3)) for n in range(6)]
    data = write_jsonl(tmp_path / "data.jsonl", rows)
    amopo = {"dimensions": ["helpfulness", "honesty"], "group_by_prompt": grouped}
    path = write_config(
        tmp_path, config(tmp_path, tiny_model, data, amopo=amopo, val_set_size=0.34)
    )
    done = run(path, "--quiet", "--json", "--prompts", "plain")
    assert done.exit_code == 0, done.output
    notes = json.loads(done.stdout)["notes"]
    assert any("splits pairs" in note for note in notes) != grouped
