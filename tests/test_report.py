"""`axolotl amopo report`: what it reads, its numbers and plots against the log, and each finding on
a log that has it and on healthy ones that don't. All curves are made up here."""

import itertools
import json
import math
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner
from runs import write_jsonl

from axolotl_amopo.commands import amopo
from axolotl_amopo.commands.report.findings import (
    SAMPLE_METRICS,
    findings,
    interval,
    outcome,
)
from axolotl_amopo.commands.report.page import differing_settings
from axolotl_amopo.commands.report.plots import MOST_POINTS, Board, Plot, thin
from axolotl_amopo.commands.report.report import write_report
from axolotl_amopo.errors import AMoPOError, DataError
from axolotl_amopo.training.runs import LOG, explain_numbers, read_run, series

PROMPTS = ["overall", "helpfulness", "honesty", "safety"]
BEGUN = 1_000_000.0
STEP_SECONDS = 10.0
ABOUT = {
    "model": "some/model",
    "adapter": "lora",
    "prompts": PROMPTS,
    "amopo": {"gamma": 2.0, "weighting": "gaussian", "winner": "overall"},
    "objective": {
        "method": "AMoPO",
        "reference": False,
        "per_token": True,
        "per": "comparison",
        "target_margin": 2.0,
        "pushes_down": 1.0,
        "adaptive": True,
        "settings": ["offset", "scalarization", "anchor", "contrast"],
    },
    "rl_beta": 0.8,
    "max_steps": 200,
    "train_pairs": 3000,
    "eval_pairs": 400,
    "config": "rl: amopo\nlearning_rate: 5.0e-06\n",
}


def healthy(seed=0, steps=200, prompts=PROMPTS, every=20, noise=0.3, about=None):
    """A log's lines: margins and accuracies rise, chosen rewards stay, weights spread a little."""
    random = np.random.default_rng(seed)
    run = ABOUT | {"prompts": list(prompts), "max_steps": steps} | (about or {})
    share = 1 / len(prompts)

    def metrics(step, noise):
        learned = 1 - math.exp(-3 * step / steps)
        values, weighted = {}, 0.0
        for k, name in enumerate(prompts):
            tilt = 2 * k / (len(prompts) - 1) - 1 if len(prompts) > 1 else 0
            margin = 0.2 + 1.3 * learned + 0.1 * k + random.normal(0, noise)
            chosen = -1.0 + 0.1 * learned + random.normal(0, noise)
            loss = math.log1p(math.exp(2 - margin))
            weight = share * (1 + (0.1 + 0.1 * learned) * tilt)
            weighted += weight * loss
            values |= {
                f"amopo/{name}/loss": loss,
                f"amopo/{name}/margin": margin,
                f"amopo/{name}/accuracy": min(
                    1, 0.56 + 0.2 * learned + random.normal(0, noise) / 5
                ),
                f"amopo/{name}/weight": weight,
                f"amopo/{name}/weight_std": 0.08 + abs(random.normal(0, noise)) / 30,
                f"amopo/{name}/prob": 0.4 + 0.1 * learned,
                f"amopo/{name}/reward_chosen": chosen,
                f"amopo/{name}/reward_rejected": chosen - margin,
            }
        for total, metric in (
            ("rewards/chosen", "reward_chosen"),
            ("rewards/rejected", "reward_rejected"),
            ("rewards/margins", "margin"),
            ("rewards/accuracies", "accuracy"),
        ):
            values[total] = float(np.mean([values[f"amopo/{n}/{metric}"] for n in prompts]))
        return {"loss": weighted, "rewards/longer_wins": 0.5 + random.normal(0, noise) / 5} | values

    lines = [{"begin": 0, "time": BEGUN, "run": run}]
    for step in range(steps + 1):
        stamp = {"step": step, "epoch": step / steps, "time": BEGUN + STEP_SECONDS * step}
        if step:
            rate = 5e-6 * min(1, step / 10) * (1 - step / (steps + 1))
            extra = {"grad_norm": 2 + random.normal(0, noise), "learning_rate": rate}
            lines.append(stamp | extra | metrics(step, noise))
        if every and step % every == 0:
            values = metrics(step, 0)
            lines.append(stamp | {f"eval_{key}": value for key, value in values.items()})
    lines.append(stamp | {"train_runtime": STEP_SECONDS * steps, "train_loss": 1.0})
    return lines


def edited(lines, change):
    """Lines with `change(entry, kind, progress)` applied to each; kind is "train" or "eval"."""
    steps = max(line.get("step", 0) for line in lines)
    for line in lines:
        if "loss" in line or "eval_loss" in line:
            change(line, "eval" if "eval_loss" in line else "train", line["step"] / steps)
    return lines


def add(metric, amount):
    """Adds `amount(progress)` to a metric of training and evaluation."""

    def change(line, kind, progress):
        key = metric if kind == "train" else f"eval_{metric}"
        line[key] += amount(progress)

    return change


def written(folder, lines):
    folder.mkdir(exist_ok=True, parents=True)
    write_jsonl(folder / LOG, lines)
    return folder


def read(folder, lines, now=BEGUN * 2):
    return read_run(written(folder, lines), now=now)


def codes(run):
    return {finding.code for finding in findings(run)}


def about(**block):
    """What a real run's log says of its objective, for runs of `PROMPTS`."""
    from axolotl_amopo.config.block import INTERNAL, AMoPOConfig
    from axolotl_amopo.training.run_log import describe_objective

    names = PROMPTS[1:]
    if isinstance(block.get("weights"), list):
        block["weights"] = dict(zip(names, block["weights"], strict=True))
    config = AMoPOConfig(dimensions=names, **block)
    return {
        "prompts": config.criteria,
        "amopo": config.model_dump(mode="json", exclude=INTERNAL),
        "objective": describe_objective(config),
        "rl_beta": config.make_objective().beta,
    }


def run_of(seed=0, *, every=20, noise=0.3, **block):
    """A healthy log of any objective: what `healthy` logs, with what its losses make otherwise."""
    facts = about(**block)
    objective = facts["objective"]
    lines = healthy(seed, prompts=facts["prompts"], every=every, noise=noise, about=facts)
    random = np.random.default_rng(seed)
    small = facts["rl_beta"] if objective["reference"] and objective["per_token"] else 1.0

    def change(line, kind, progress):
        prefix = "eval_" if kind == "eval" else ""
        learned = 1 - math.exp(-3 * progress)
        if objective["reference"]:  # rewards begin at 0, exactly
            for name in ("rewards/", *(f"amopo/{name}/" for name in facts["prompts"])):
                of, part = f"{prefix}{name}", "" if name == "rewards/" else "reward_"
                margin = "margins" if name == "rewards/" else "margin"
                gained = learned + random.normal(0, noise * progress * (kind == "train"))
                values = {f"{of}{part}chosen": 0.3 * gained, f"{of}{part}rejected": -gained}
                line |= {key: small * value for key, value in values.items()}
                line[f"{of}{margin}"] = small * 1.3 * gained
            if not progress:
                for key in [k for k in line if k.endswith(("/accuracy", "accuracies", "_wins"))]:
                    line[key] = 0.0  # equal rewards
        if not objective["adaptive"]:
            for name in facts["prompts"]:
                line[f"{prefix}amopo/{name}/weight"] = 1 / len(facts["prompts"])
                line[f"{prefix}amopo/{name}/weight_std"] = 0.0
        if objective["per"] == "response":
            for name in facts["prompts"]:
                for metric in ("loss", "weight", "weight_std"):
                    del line[f"{prefix}amopo/{name}/{metric}"]
            line[f"{prefix}loss"] = 3.0 - learned + random.normal(0, 0.1) * (kind == "train")
        if "gradients" in facts["amopo"] and kind == "train":
            line |= gradients_of(facts["prompts"], lambda: 0.4 + random.normal(0, 0.1))

    return edited(lines, change)


def gradients_of(prompts, cosine, shares=None):
    """What the log has where a step is made of several gradients."""
    shares = shares or [1 / len(prompts)] * len(prompts)
    logged = {f"gradients/{n}/share": share for n, share in zip(prompts, shares, strict=True)}
    pairs = itertools.combinations(prompts, 2)
    return logged | {f"gradients/{one}-{other}/cosine": cosine() for one, other in pairs}


# What goes wrong: a name, what the log becomes, and the codes and severities to be found.


def nan_loss(lines):
    lines[100]["loss"] = math.nan
    return lines


def null_metric(lines):
    lines[100]["amopo/safety/margin"] = None
    return lines


def fp16_skips(lines):
    lines[3]["grad_norm"] = math.inf
    return lines


def spikes(lines):
    training = [line for line in lines if "loss" in line]
    for i in (12, 130):
        training[i]["loss"] = 12.0
    return lines


def diverges(lines):
    def change(line, kind, progress):
        line["loss" if kind == "train" else "eval_loss"] = 1.5 + 2 * progress

    return edited(lines, change)


def overfits(lines):
    def change(line, kind, progress):
        if kind == "eval":
            line["eval_loss"] += max(0, progress - 0.4)

    return edited(lines, change)


def chosen_falls(lines):
    for name in ("rewards/chosen", "amopo/overall/reward_chosen"):
        lines = edited(lines, add(name, lambda progress: -1.5 * progress))
    return lines


def same_weights(lines):
    def change(line, kind, progress):
        for name, weight in zip(PROMPTS, (0.252, 0.248, 0.252, 0.248), strict=True):
            line[f"{'eval_' * (kind == 'eval')}amopo/{name}/weight"] = weight

    return edited(lines, change)


def by_chance(lines):
    def change(line, kind, progress):
        line[f"{'eval_' * (kind == 'eval')}amopo/honesty/accuracy"] = 0.52

    return edited(lines, change)


def below_chance(lines):
    def change(line, kind, progress):
        line[f"{'eval_' * (kind == 'eval')}amopo/honesty/accuracy"] = 0.3

    return edited(lines, change)


def safety_pays(lines):
    return edited(lines, add("amopo/safety/margin", lambda progress: -2.0 * progress))


def safety_pays_in_accuracy(lines):
    return edited(lines, add("amopo/safety/accuracy", lambda progress: -0.4 * progress))


def longer(lines):
    return edited(lines, add("rewards/longer_wins", lambda progress: 0.25 * progress))


def frozen(lines):
    first = next(line for line in lines if "eval_loss" in line)

    def change(line, kind, progress):
        if kind == "eval":
            line |= {key: value for key, value in first.items() if key.startswith("eval_")}

    return edited(lines, change)


def killed(lines):
    return [line for line in lines if line.get("step", 0) <= 120]


def ended_early(lines):
    lines[0]["run"]["max_steps"] = 1000
    return lines


WRONG = [
    (nan_loss, {"not-finite": "problem"}),
    (null_metric, {"not-finite": "problem"}),
    (fp16_skips, {"not-finite": "warning"}),
    (spikes, {"loss-spikes": "warning"}),
    (diverges, {"loss-rose": "problem"}),
    (overfits, {"overfitting": "warning"}),
    (chosen_falls, {"chosen-falls": "warning"}),
    (same_weights, {"weights-uniform": "warning"}),
    (by_chance, {"chance": "warning"}),
    (below_chance, {"below-chance": "problem"}),
    (safety_pays, {"sacrificed": "warning"}),
    (safety_pays_in_accuracy, {"below-chance": "problem", "sacrificed": "warning"}),
    (longer, {"length-grows": "warning"}),
    (frozen, {"nothing-moved": "problem"}),
    (killed, {"stopped-early": "warning"}),
    (ended_early, {"stopped-early": "warning"}),
]


@pytest.mark.parametrize(
    ("change", "expected"), WRONG, ids=lambda value: getattr(value, "__name__", "")
)
def test_a_finding_is_found(tmp_path, change, expected):
    run = read(tmp_path / "run", change(healthy()))
    found = {finding.code: finding for finding in findings(run)}
    assert {code: finding.severity for code, finding in found.items()} == expected
    for finding in found.values():
        assert re.search(r"\d", finding.text) and finding.advice[-1] in ".?"
        assert len(finding.text) < 400


@pytest.mark.parametrize("every", [20, 200, 0], ids=["evaluations", "two", "training-only"])
def test_a_healthy_run_raises_no_alarm(tmp_path, every):
    for seed in range(15):
        run = read(tmp_path / "run", healthy(seed, every=every))
        assert codes(run) == set(), (seed, findings(run))
        assert outcome(run)[0].startswith("Improved: overall (margin +"), outcome(run)


def test_findings_without_evaluation(tmp_path):
    for change, code in (
        (safety_pays, "sacrificed"),
        (longer, "length-grows"),
        (diverges, "loss-rose"),
        (chosen_falls, "chosen-falls"),
        (same_weights, "weights-uniform"),
    ):
        run = read(tmp_path / "run", change(healthy(every=0)))
        assert code in codes(run), code


def test_few_entries_say_so_and_nothing_else(tmp_path):
    for steps in (1, 3, 8):
        lines = [line for line in healthy(noise=1.0, every=0) if line.get("step", 0) <= steps]
        lines[0]["run"]["max_steps"] = steps
        end = {"step": steps, "time": BEGUN, "train_runtime": 1.0}
        assert codes(read(tmp_path / "run", [*lines, end])) == {"few-entries"}


def test_uniform_on_purpose_is_no_warning(tmp_path):
    for block in ({"weighting": "uniform"}, {"objective": "simpo"}):
        lines = same_weights(healthy(about=about(**block)))
        assert codes(read(tmp_path / "run", lines)) == set()
    worst = about(scalarization="worst")  # whose weights are alike where the losses are
    assert codes(read(tmp_path / "run", same_weights(healthy(about=worst)))) == set()


def test_masked_dimensions(tmp_path):
    """Absent from some steps, with weights that don't add up to 1: no alarm but a note."""

    def change(line, kind, progress):
        prefix = "eval_" if kind == "eval" else ""
        for name in PROMPTS:
            line[f"{prefix}amopo/{name}/weight"] = 0.26
        if kind == "train" and line["step"] % 3:
            for key in [key for key in line if key.startswith("amopo/safety/")]:
                del line[key]

    run = read(tmp_path / "run", edited(healthy(), change))
    assert codes(run) == {"weights-masked"}
    assert len(series(run.train, "amopo/safety/margin")[0]) == 200 // 3


def test_unshared_prompts_are_a_note(tmp_path):
    sharing = {"layout": "sequences", "own_logits": True, "why_own_logits": "it scales them"}
    line = {"step": 0, "time": BEGUN, "run": {"sharing": sharing | {"why_unshared": "a state"}}}
    begin, *entries = healthy()
    run = read(tmp_path / "run", [begin, line, *entries])
    assert run.about["model"] == "some/model" and len(run.train) == 200
    found = {finding.code: finding for finding in findings(run)}
    assert found.keys() == {"prompts-not-shared", "own-logits"}
    assert {finding.severity for finding in found.values()} == {"note"}
    assert found["prompts-not-shared"].text.endswith("its own: a state.")
    assert found["own-logits"].text.endswith("logits: it scales them.")
    for quiet in ({"layout": "packed", "why_unshared": ""}, {"layout": "sequences"}):
        line["run"]["sharing"] = quiet
        assert codes(read(tmp_path / "run", [begin, line, *entries])) == set()


def test_few_pairs_are_a_note(tmp_path):
    run = read(tmp_path / "run", healthy(about={"eval_pairs": 12}))
    [finding] = findings(run)
    assert (finding.code, finding.severity) == ("chance", "note")
    assert "of 12 pairs" in finding.text


def test_the_interval_is_wilsons():
    from scipy.stats import binomtest

    for count, k in ((24, 16), (400, 208), (10, 10), (7, 0)):
        expected = binomtest(k, count).proportion_ci(method="wilson")
        assert interval(k / count, count) == pytest.approx(tuple(expected), abs=1e-4)


def test_a_resumed_run_supersedes_what_came_after_its_checkpoint(tmp_path):
    first = [line for line in healthy(1) if line.get("step", 0) <= 150]
    second = [line for line in healthy(2) if 100 < line.get("step", 0) <= 130]
    second.append({"step": 130, "time": BEGUN + 1300, "train_runtime": 300.0})
    for line in second:
        line["time"] += 10_000
    again = {"begin": 100, "time": BEGUN + 11_000, "run": {"adapter": "none"}}
    file = written(tmp_path / "run", [*first, again, *second]) / LOG
    run = read_run(file.parent)
    steps, losses = series(run.train, "loss")
    expected = [line["loss"] for line in [*first, *second] if "loss" in line]
    assert steps.tolist() == list(range(1, 131))
    assert losses.tolist() == expected[:100] + expected[150:]
    assert [entry["step"] for entry in run.evals] == [0, 20, 40, 60, 80, 100, 120]
    assert (run.resumed, run.status, run.step) == ([100], "finished", 130)
    assert (run.about["adapter"], run.about["model"]) == ("none", "some/model")
    # 150 steps until it was stopped, and 30 after it was resumed; not the pause between.
    assert run.seconds == pytest.approx(1500 + 300)
    # Stopped again at once: the first end counts no more.
    with file.open("a", encoding="utf-8") as log:
        log.write(json.dumps({"begin": 130, "time": BEGUN + 20_000, "run": {}}) + "\n")
    assert read_run(file.parent).status == "stopped"


def test_a_run_from_the_start_replaces_all(tmp_path):
    first = healthy(1)
    again = [line for line in healthy(2, every=0) if line.get("step", 0) <= 50]
    run = read(tmp_path / "run", [*first, *again])
    assert (len(run.train), run.evals, run.status) == (50, [], "stopped")


def test_half_lines(tmp_path):
    lines = [json.dumps(line) for line in healthy()]
    file = written(tmp_path / "run", []) / LOG
    begin = json.dumps({"begin": 40, "time": BEGUN, "run": {}})
    file.write_text("\n".join([*lines[:60], lines[60][:50], begin, lines[60], lines[61][:30]]))
    assert read_run(file.parent).resumed == [40]
    file.write_text("\n".join([*lines[:60], lines[60][:50], *lines[61:]]))
    with pytest.raises(DataError, match=re.escape(f"{file}, line 61: is not JSON")):
        read_run(file.parent)
    file.write_text("\n".join([*lines[:3], "[1]", *lines[3:]]))
    with pytest.raises(DataError, match="line 4: is no JSON object"):
        read_run(file.parent)
    file.write_text("\n".join([*lines[:3], '{"loss": 1}', *lines[3:]]))
    with pytest.raises(DataError, match="line 4: has neither a step nor a begin"):
        read_run(file.parent)


def test_a_run_in_progress(tmp_path):
    lines = killed(healthy())
    last = BEGUN + STEP_SECONDS * 120
    run = read(tmp_path / "run", lines, now=last + 300)
    assert codes(run) == {"in-progress"} and "step 120 of 200" in findings(run)[0].text
    assert read(tmp_path / "run", lines, now=last + 700).status == "stopped"
    # An evaluation of half an hour was no end either.
    lines[-1]["time"] += 1800
    assert read(tmp_path / "run", lines, now=last + 1800 + 1900).status == "in progress"
    # Nothing has moved after a few steps of warmup; that is no finding yet.
    early = [line for line in frozen(healthy(every=10)) if line.get("step", 0) <= 30]
    assert codes(read(tmp_path / "run", early, now=BEGUN + 400)) == {"in-progress"}


def state(folder, lines, step, max_steps):
    folder.mkdir(parents=True)
    history = [line for line in lines if "loss" in line or "eval_loss" in line]
    content = {"global_step": step, "max_steps": max_steps, "log_history": history}
    (folder / "trainer_state.json").write_text(json.dumps(content, sort_keys=True))


def test_without_a_log_the_newest_checkpoint_is_read(tmp_path):
    lines = healthy(steps=20, every=10)
    for line in lines:
        line.pop("time", None)
        if "eval_loss" in line:
            line |= {"eval_runtime": 36.07, "eval_samples_per_second": 0.665}
    state(tmp_path / "run" / "checkpoint-9", lines[:5], 9, 20)
    state(tmp_path / "run" / "checkpoint-20", lines, 20, 20)
    run = read_run(tmp_path / "run")
    assert (run.name, run.step, run.status, run.seconds) == ("run", 20, "finished", None)
    assert run.prompts == PROMPTS and run.eval_pairs == 24
    assert len(run.train) == 20 and len(run.evals) == 3
    state(tmp_path / "other" / "checkpoint-20", lines, 20, 30)
    assert codes(read_run(tmp_path / "other", now=2e10)) >= {"stopped-early"}


def test_bad_input_is_a_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    other = [{"step": s, "loss": 1.0, "rewards/margins": 0.1} for s in range(3)]
    (tmp_path / "damaged" / "checkpoint-3").mkdir(parents=True)
    (tmp_path / "damaged" / "checkpoint-3" / "trainer_state.json").write_text("{")
    for folder, message in (
        (tmp_path / "file", "is a file, not a folder"),
        (tmp_path / "absent", "is no folder"),
        (tmp_path / "empty", "has neither _amopo_log.jsonl nor a checkpoint"),
        (tmp_path / "damaged", "trainer_state.json: is not what a trainer writes"),
        (written(tmp_path / "dpo", other), "has no amopo/... metrics"),
        (written(tmp_path / "begun", healthy()[:1]), "nothing has been logged yet"),
        (written(tmp_path / "none", []), "nothing has been logged yet"),
    ):
        with pytest.raises(AMoPOError, match=re.escape(message)):
            read_run(folder)
        done = invoke(folder)
        assert done.exit_code == 1 and message in " ".join(done.output.split())
        assert "Traceback" not in done.output and len(done.output.splitlines()) == 1


# Objectives.

OBJECTIVES = [
    "amopo", "simpo", "dpo", "ipo", "mappo", "modpo", "lambda_dpo", "raco", "mgda",
    "mgda_decoupled", "cos_dpo", "ric",
]  # fmt: skip


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_healthy_run_of_any_objective(tmp_path, objective):
    """Its numbers are as its losses make them; none of that is an alarm."""
    for every in (20, 200, 0):
        for seed in range(3):
            run = read(tmp_path / "run", run_of(seed, every=every, objective=objective))
            assert codes(run) == set(), (seed, every, findings(run))
            first, *others = outcome(run)
            assert first.startswith("Improved: " if objective != "ric" else ("Ev", "Tr")), first
            adaptive = ["Weights at the end"] if objective == "amopo" else []
            shares = ["Shares of the gradients"] if "g" in objective or objective == "raco" else []
            assert [text.partition(":")[0] for text in others] == [
                f"{text} in the step at the end" if text in shares else text
                for text in adaptive + shares
            ]


def test_before_the_first_step_nothing_is_ordered(tmp_path):
    """With a reference: 0 of 400 pairs right, and the longer one never ahead, say nothing."""
    lines = run_of(objective="dpo")
    run = read(tmp_path / "run", lines)
    change = run.change("amopo/honesty/accuracy")
    assert change.before is None and change.after > 0.6
    assert run.change("amopo/honesty/margin").before == 0.0
    assert run.change("rewards/longer_wins").before is None
    assert "accuracy 7" in outcome(run)[0] and "0% to" not in outcome(run)[0]
    # Rounding, as of sums that were taken in other batches, makes a coin's throws of them.
    begun = next(line for line in lines if "eval_loss" in line)
    begun |= {f"eval_amopo/{name}/accuracy": 0.9 for name in PROMPTS[1:]}
    begun |= {"eval_rewards/chosen": 1e-4, "eval_rewards/rejected": -1e-4}
    assert read(tmp_path / "run", lines).change("amopo/honesty/accuracy").before is None
    # So far only that was evaluated.
    early = [line for line in lines if line.get("step", 0) <= 2]
    assert "below-chance" not in codes(read(tmp_path / "run", early, now=BEGUN + 30))
    # A learning rate that warms up from 0 leaves the first steps there as well.
    training = run_of(objective="dpo", every=0)
    for line in training[1:4]:
        line |= {key: 0.0 for key in line if key.startswith(("amopo/", "rewards/"))}
    run = read(tmp_path / "run", training)
    assert len(series(run.train, "amopo/honesty/accuracy")[0]) == 197


@pytest.mark.parametrize("objective", ["dpo", "ipo", "modpo", "lambda_dpo", "raco", "cos_dpo"])
def test_a_reference_that_is_another_model(tmp_path, objective):
    facts = about(objective=objective)
    apart = facts["rl_beta"] * (0.05 if facts["objective"]["per_token"] else 2.0)

    def found(lines):
        return {f.code: f.severity for f in findings(read(tmp_path / "run", lines))}

    def shifted(lines, by):
        return edited(lines, add("rewards/chosen", lambda progress: by * (progress <= 1 / 200)))

    lines = shifted(run_of(objective=objective), apart)
    assert found(lines)["another-start"] == "problem"
    # Without an evaluation before it, the first step's own numbers say so.
    assert "another-start" in found(shifted(run_of(objective=objective, every=0), apart))
    late = [line for line in lines if line.get("step", 9) > 1]
    assert "another-start" not in found([lines[0], *late])
    # Another model is another one.
    begun = lines[0] | {"run": facts | {"amopo": {"reference": "other/model"}}}
    assert "another-start" not in found([begun, *lines[1:]])
    # Rounding in 16 bits does not.
    assert "another-start" not in found(shifted(run_of(objective=objective), apart / 10))


def test_gradients_that_conflict(tmp_path):
    def finding(cosine, **block):
        values = iter(itertools.cycle(cosine))

        def change(line, kind, progress):
            if kind == "train":
                line |= gradients_of(PROMPTS[1:], lambda: 0.5)
                line["gradients/helpfulness-safety/cosine"] = next(values)

        run = read(tmp_path / "run", edited(run_of(**block), change))
        found = {finding.code: finding for finding in findings(run)}
        assert found.keys() <= {"gradients-conflict"}
        return found.get("gradients-conflict")

    found = finding([-0.6, -0.35, 0.2], objective="raco")
    assert found.severity == "note"
    assert "helpfulness and safety in 67% (mean cosine -0.25)" in found.text
    assert "honesty" not in found.text
    assert "gradients: cagrad" in found.advice and "amopo.weights" in found.advice
    found = finding([-0.6], objective="mgda")
    assert "gradients: mgda" in found.advice and "amopo.weights" not in found.advice
    assert finding([-0.9, 0.2, 0.3], objective="raco") is None
    assert finding([-0.01], objective="raco") is None


def test_one_dimension_with_all_the_solved_weight(tmp_path):
    def found(shares, **block):
        def change(line, kind, progress):
            if kind == "train":
                line |= gradients_of(PROMPTS[1:], lambda: 0.5, shares)

        run = read(tmp_path / "run", edited(run_of(**block), change))
        return {finding.code: finding for finding in findings(run)}, outcome(run)[-1]

    alone, said = found([0.01, 0.98, 0.01], objective="mgda")
    assert alone["one-gradient"].severity == "warning"
    assert "honesty makes the steps nearly alone: it has 98.0%" in alone["one-gradient"].text
    assert said == "Shares of the gradients in the step at the end: 0.980 (honesty) to 0.010 " + (
        "(helpfulness)."
    )
    assert found([0.1, 0.8, 0.1], objective="mgda")[0] == {}
    # What the user asked for is no finding.
    assert found([0.01, 0.98, 0.01], objective="raco", weights=[1, 98, 1])[0] == {}


def test_answers_that_collapse(tmp_path):
    def found(last, **block):
        def change(line, kind, progress):
            if kind == "eval":
                for name, ends in {"overall": last, "none": (40, 0.02, 0.2)}.items():
                    values = (
                        one + progress * (other - one)
                        for one, other in zip((40, 0.02, 0.2), ends, strict=True)
                    )
                    for what, value in zip(SAMPLE_METRICS, values, strict=True):
                        line[f"eval_samples/{name}/{what}"] = value

        run = read(tmp_path / "run", edited(run_of(**block), change))
        found = {finding.code: finding for finding in findings(run)}
        assert found.keys() <= {"samples-collapse"}
        assert [plot.name for plot in Board([run], ["a"]).plots()].count("samples") == 1
        return found.get("samples-collapse")

    one = found((120, 0.7, 0.9), objective="dpo")
    assert one.severity == "problem" and "Raise rl_beta" in one.advice
    assert "at step 200 (in brackets at step 0): asked for overall, they repeat 70% of" in one.text
    assert "4-grams (2%) and are cut off in 90% (20%)." in one.text and "none" not in one.text
    one = found((4, 0.0, 0.0), objective="amopo")
    assert one.severity == "warning" and "they have 4 tokens (40)." in one.text
    assert "Lower gamma" in one.advice
    assert found((20, 0.15, 0.5), objective="dpo") is None
    assert found((90, 0.1, 0.6), objective="dpo") is None


def test_margins_stay_behind_by_design(tmp_path):
    """MaPPO: both rewards rise, the rejected one more, and the loss falls all the same."""

    def drift(line, kind, progress):
        prefix = "eval_" if kind == "eval" else ""
        for name in PROMPTS[1:]:
            line[f"{prefix}amopo/{name}/margin"] = -0.4 * progress
            line[f"{prefix}amopo/{name}/reward_rejected"] += 1.5 * progress

    run = read(tmp_path / "run", edited(run_of(objective="mappo"), drift))
    assert codes(run) == set()
    assert outcome(run)[0].startswith("Improved: helpfulness (loss -")
    run = read(tmp_path / "run", edited(run_of(objective="dpo"), drift))
    assert outcome(run)[0].startswith("Fell: helpfulness (margin -0.40")


def test_what_is_no_pair_has_no_findings_of_pairs(tmp_path):
    """RiC: chosen rewards fall, orders are a coin's throws; what counts is its loss."""

    def change(line, kind, progress):
        prefix = "eval_" if kind == "eval" else ""
        line[f"{prefix}rewards/chosen"] -= 2.0 * progress
        line[f"{prefix}amopo/honesty/accuracy"] = 0.3
        line[f"{prefix}amopo/safety/margin"] -= 2.0 * progress

    run = read(tmp_path / "run", edited(run_of(objective="ric"), change))
    assert codes(run) == set()
    assert outcome(run)[0].startswith("Evaluation loss: 3.000 to 2.0")
    worse = edited(run_of(objective="ric"), add("loss", lambda progress: 2.0 * progress))
    assert codes(read(tmp_path / "run", worse)) == {"loss-rose"}


def test_an_untrained_criterion_need_not_be_learned(tmp_path):
    """MODPO's other dimensions are margins, and a weight of 0 is the user's word."""

    def lines(weight):
        def change(line, kind, progress):
            prefix = "eval_" if kind == "eval" else ""
            line[f"{prefix}amopo/safety/accuracy"] = 0.3 if line["step"] else 0.0
            line[f"{prefix}amopo/safety/weight"] = weight

        return edited(run_of(objective="dpo"), change)

    assert "below-chance" not in codes(read(tmp_path / "run", lines(0.0)))
    assert "below-chance" in codes(read(tmp_path / "run", lines(0.2)))


def test_advice_names_keys_that_the_objective_has(tmp_path):
    def advice(code, change, **block):
        run = read(tmp_path / "run", change(run_of(**block)))
        return next(finding.advice for finding in findings(run) if finding.code == code)

    def falls(lines):
        return edited(lines, add("rewards/chosen", lambda progress: -1.5 * progress))

    assert "Lower gamma" in advice("chosen-falls", falls, objective="amopo")
    assert "amopo.anchor" in advice("chosen-falls", falls, objective="amopo")
    for block in ({"objective": "dpo"}, {"objective": "mappo"}, {"objective": "raco"}):
        text = advice("chosen-falls", falls, **block)
        assert "gamma" not in text and "Raise rl_beta" in text
        assert ("anchor" in text) == (block["objective"] != "raco")
    assert "anchor" not in advice("chosen-falls", falls, objective="dpo", anchor=0.1)
    assert "gamma" in advice("chosen-falls", falls, objective="mappo", form="simpo")

    def pays(lines):
        return edited(lines, add("amopo/safety/margin", lambda progress: -3.0 * progress))

    text = advice("sacrificed", pays, objective="amopo")
    assert "winner: per_dimension" in text and "weighting: static" in text
    text = advice("sacrificed", pays, objective="dpo")
    assert "winner" not in text and "amopo.weights" in text and "gradients: cagrad" in text
    assert "gradients" not in advice("sacrificed", pays, objective="raco")
    assert "weight" not in advice("sacrificed", pays, objective="mgda")

    assert "lower gamma" in advice("length-grows", longer, objective="simpo")
    # Its gamma is that of another form.
    text = advice("length-grows", longer, objective="mappo", every=0)
    assert "gamma" not in text and "length_normalised: true" in text
    nearest = {"objective": "amopo", "winner": "nearest"}
    assert "ask for" in advice("below-chance", below_chance, **nearest)
    text = advice("below-chance", below_chance, objective="simpo", winner="per_dimension")
    assert "direction: lower" in text and "winner" not in text and "gap_scale" not in text
    assert "a larger gap_scale" in advice("below-chance", below_chance, objective="mappo")


def test_small_rewards_are_measured_by_themselves(tmp_path):
    """lambda-DPO at its beta of 0.1 moves margins of log-ratios per token by hundredths."""

    def scaled(factor):
        def change(line, kind, progress):
            for key in line:
                if key.endswith(("margin", "margins", "chosen", "rejected")):
                    line[key] *= factor

        return codes(read(tmp_path / "run", edited(run_of(objective="lambda_dpo"), change)))

    assert scaled(0.05) == set()
    assert scaled(1e-3) == {"nothing-moved"}


def test_the_page_of_any_objective(tmp_path, monkeypatch):
    """No empty columns, no curves that say nothing, and a word on what the numbers are."""

    def page(**block):
        folder = written(tmp_path / "run", run_of(**block))
        done = invoke(folder, "--force")
        assert done.exit_code == 0, done.output
        report = folder / "_amopo_report"
        parsed = Parsed((report / "index.html").read_text(encoding="utf-8"))
        plots = [plot.name for plot in Board([read_run(folder)], ["a"]).plots()]
        return parsed, plots, " ".join(done.output.split())

    monkeypatch.setattr(Plot, "png", lambda plot: b"")
    parsed, plots, said = page(objective="ric")
    assert parsed.tables[0][0] == ["prompt", "accuracy", "margin"]
    assert "weight" not in plots and "share" not in plots and "loss" in plots
    for text in (parsed.words, said):
        assert "RiC compares nothing" in " ".join(text.split())
        assert "mean log-probability per token" in " ".join(text.split())

    parsed, plots, said = page(objective="raco")
    assert "weight" not in plots  # they are the user's, and in the table
    assert {"share", "cosine"} < set(plots)
    assert "rl_beta times its log-ratio to the reference" in said
    cells = {row[0]: row[1:] for row in parsed.tables[0][2:]}
    assert cells["honesty"][0] == "-" and cells["honesty"][1].endswith("%")
    assert cells["honesty"][2] == "+0.00" and cells["honesty"][4:] == ["0.333", "0.333"]
    board = Board([read_run(tmp_path / "run")], ["a"])
    drawn = {plot.name: plot.figure for plot in board.plots()}
    assert len(drawn["cosine"].axes[0].lines) == 2 * 3 + 1  # raw and smoothed of three, and 0
    margin, accuracy = drawn["change"].axes
    # An accuracy has no beginning: a full dot for each of three, no line and no hollow one.
    assert len(margin.lines) == 3 * 3 and len(accuracy.lines) == 3 + 1

    for text, block in (
        ("pushes a rejected response down less", {"objective": "mappo"}),
        ("all responses of a prompt at once", {"objective": "lambda_dpo"}),
        ("how often the model follows the request", {"objective": "amopo", "winner": "nearest"}),
        ("means over the prompts", {"objective": "cos_dpo"}),
    ):
        assert text in explain_numbers(read(tmp_path / "other", run_of(**block)))


# The page.


class Parsed(HTMLParser):
    """Words, the cells of tables row by row, the findings' codes, and ids."""

    def __init__(self, text):
        super().__init__()
        self.words, self.tags, self.tables, self.codes, self.ids = "", set(), [], [], []
        self.in_svg = self.in_cell = False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.add(tag)
        self.in_svg |= tag == "svg"
        assert "src" not in attrs and attrs.get("href", "#").startswith("#")  # nothing is fetched
        self.ids += [attrs["id"]] if "id" in attrs else []
        self.codes += [attrs["data-code"]] if "data-code" in attrs else []
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self.in_cell = True

    def handle_endtag(self, tag):
        self.in_svg &= tag != "svg"
        self.in_cell &= tag not in ("td", "th")

    def handle_data(self, data):
        if self.in_svg:
            return
        self.words += data
        if self.in_cell:
            self.tables[-1][-1][-1] += data.strip()


def invoke(*arguments):
    return CliRunner().invoke(amopo, ["report", *map(str, arguments)])


@pytest.fixture
def two_plots(monkeypatch):
    """Draws two plots alone, where a test looks at other things."""
    plots = Board.plots
    monkeypatch.setattr(Board, "plots", lambda self: itertools.islice(plots(self), 2))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The command on a run with trouble: its lines, the folder, and what it printed."""
    folder = tmp_path_factory.mktemp("report") / "run"
    lines = longer(safety_pays(healthy(about={"max_steps": 200, "name": "<b>a $run$</b>"})))
    written(folder, lines)
    return SimpleNamespace(lines=lines, folder=folder, done=invoke(folder, "--json"))


def test_the_page_has_the_numbers_of_the_log(made):
    assert made.done.exit_code == 0, made.done.output
    parsed = Parsed((made.folder / "_amopo_report" / "index.html").read_text(encoding="utf-8"))
    assert "script" not in parsed.tags and "<b>a $run$</b>" in parsed.words
    evals = [line for line in made.lines if "eval_loss" in line]
    rows = {row[0]: row[1:] for row in parsed.tables[0][2:]}
    assert list(rows) == PROMPTS
    for name, cells in rows.items():
        values = [
            first_or_last[f"eval_amopo/{name}/{metric}"]
            for metric in ("accuracy", "margin", "weight")
            for first_or_last in (evals[0], evals[-1])
        ]
        shapes = ("{:.1%}", "{:.1%}", "{:+.2f}", "{:+.2f}", "{:.3f}", "{:.3f}")
        assert cells == [shape.format(v) for shape, v in zip(shapes, values, strict=True)]
    assert parsed.codes == ["sacrificed", "length-grows"]
    assert "safety paid for the others" in parsed.words
    assert len(parsed.ids) == len(set(parsed.ids))
    assert "3000 pairs to train on, 400 pairs to evaluate with" in parsed.words


def test_the_json_is_strict_and_has_the_numbers(made):
    def refuse(constant):
        raise AssertionError(constant)

    report = json.loads(made.done.stdout.splitlines()[-1], parse_constant=refuse)
    [run] = report["runs"]
    evals = [line for line in made.lines if "eval_loss" in line]
    assert run["prompts"]["safety"]["margin"] == {
        "before": evals[0]["eval_amopo/safety/margin"],
        "after": evals[-1]["eval_amopo/safety/margin"],
    }
    assert (run["step"], run["status"], run["basis"]) == (200, "finished", "evaluation")
    assert {f["code"]: f["severity"] for f in run["findings"]} == {
        "sacrificed": "warning",
        "length-grows": "warning",
    }


def test_from_python(made, tmp_path, two_plots):
    report = write_report([made.folder], tmp_path / "report")
    assert report.page == tmp_path / "report" / "index.html" and report.page.is_file()
    [one] = report.runs
    assert one.prompts["safety"]["margin"] == one.run.change("amopo/safety/margin")
    assert [finding.code for finding in one.findings] == ["sacrificed", "length-grows"]
    assert report.severities == {"warning"}
    assert report.to_json()["runs"] == json.loads(made.done.stdout.splitlines()[-1])["runs"]


def test_training_alone_gives_means_of_its_ends(tmp_path, two_plots):
    lines = healthy(every=0)
    run = read(tmp_path / "run", lines)
    margins = [line["amopo/safety/margin"] for line in lines if "loss" in line]
    change = run.change("amopo/safety/margin")
    assert change.before == pytest.approx(np.mean(margins[:20]))
    assert change.after == pytest.approx(np.mean(margins[-20:]))
    done = invoke(written(tmp_path / "run", lines))
    assert "first and the last 20 of 200 training entries" in " ".join(done.output.split())


def test_plots_show_the_log(made):
    run = read_run(made.folder)
    board = Board([run], ["a"])
    colours = {}
    names = []
    for plot in board.plots():
        names.append(plot.name)
        svg = ET.parse(made.folder / "_amopo_report" / f"{plot.name}.svg").getroot()
        assert svg.attrib["aria-label"] == plot.title
        assert plot.title in " ".join(svg.itertext())
        assert (made.folder / "_amopo_report" / f"{plot.name}.png").stat().st_size > 5000
        if plot.name not in ("margin", "accuracy", "prob"):
            continue
        [axis] = plot.figure.axes
        for name in PROMPTS:
            key = f"amopo/{name}/{plot.name}"
            lines = [line for line in axis.lines if line.get_color() == board.colours[name]]
            raw, smoothed, evaluated = lines
            values = [line[key] for line in made.lines if key in line]
            assert list(raw.get_ydata()) == values and len(smoothed.get_ydata()) == 200
            assert np.std(np.diff(smoothed.get_ydata())) < np.std(np.diff(values)) or name == "prob"
            evals = [line for line in made.lines if f"eval_{key}" in line]
            assert list(evaluated.get_ydata()) == [line[f"eval_{key}"] for line in evals]
            assert list(evaluated.get_xdata()) == [line["step"] for line in evals]
            colours.setdefault(name, set()).add(raw.get_color())
    assert names == [
        "change", "loss", "margin", "accuracy", "weight", "prob", "rewards", "longer_wins",
        "learning_rate", "grad_norm",
    ]  # fmt: skip
    assert len({colour for [colour] in colours.values()}) == len(PROMPTS)


def test_plots_are_drawn(tmp_path, made):
    """The pixels of a prompt's colour stand where its margins are."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    board = Board([read_run(made.folder)], ["a"])
    plot = next(plot for plot in board.plots() if plot.name == "margin")
    canvas = FigureCanvasAgg(plot.figure)
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[..., :3].astype(int)
    [axis] = plot.figure.axes
    colour = [int(board.colours["safety"][i : i + 2], 16) for i in (1, 3, 5)]
    last = [line for line in axis.lines if line.get_color() == board.colours["safety"]][-1]
    x, y = axis.transData.transform((last.get_xdata()[-1], last.get_ydata()[-1]))
    row, column = len(pixels) - round(y), round(x)
    near = pixels[row - 3 : row + 4, column - 3 : column + 4]
    assert (np.abs(near - colour).sum(-1) < 30).any()


def test_ten_dimensions_and_one(tmp_path):
    ten = ["overall", *(f"dimension_{i}_$x$_<i>" for i in range(10))]
    for prompts in (ten, ["helpfulness"]):
        run = read(tmp_path / "run", healthy(prompts=prompts))
        board = Board([run], ["a"])
        assert len({(board.colours[n], board.markers[n]) for n in prompts}) == len(prompts)
        assert len({board.colours[n] for n in prompts}) == len(prompts)
        assert "weights-uniform" not in codes(run)
        done = invoke(tmp_path / "run", "--quiet", "--force")
        assert done.exit_code == 0 and done.output == ""
        text = (tmp_path / "run" / "_amopo_report" / "index.html").read_text(encoding="utf-8")
        assert len(Parsed(text).tables[0]) == len(prompts) + 2
        labels = ET.parse(tmp_path / "run" / "_amopo_report" / "change.svg").getroot().itertext()
        assert set(prompts) <= {label.strip() for label in labels}


def test_long_logs_keep_their_spikes():
    values = np.random.default_rng(0).normal(size=100_000)
    values[54_321], values[777] = 50, np.nan
    steps, kept = thin(np.arange(100_000), values)
    assert len(kept) <= MOST_POINTS and 54_321 in steps and np.nanmax(kept) == 50
    assert np.all(np.diff(steps) > 0)


# Several runs, and the folder.


def test_several_runs(tmp_path):
    other = {
        "amopo": {"gamma": 1.0, "weighting": "gaussian"},
        "config": "rl: amopo\nlearning_rate: 1.0e-06\n",
    }
    a = written(tmp_path / "a" / "out", healthy(1))
    b = written(tmp_path / "b" / "out", healthy(2, about=other))
    done = invoke(a, b, "--output", tmp_path / "both", "--json")
    assert done.exit_code == 0, done.output
    names = [run["name"] for run in json.loads(done.stdout.splitlines()[-1])["runs"]]
    assert names == [str(a), str(b)]
    parsed = Parsed((tmp_path / "both" / "index.html").read_text(encoding="utf-8"))
    numbers, settings = parsed.tables
    assert len(numbers) == 2 + 2 * len(PROMPTS)
    assert ["amopo.gamma", "2.0", "1.0"] in settings
    assert ["learning_rate", "5e-06", "1e-06"] in settings
    assert "rl_beta" not in str(settings)
    runs = {folder.parent.name: read_run(folder) for folder in (a, b)}
    assert list(differing_settings(runs)) == ["learning_rate", "amopo.gamma", "amopo.winner"]
    board = Board(list(runs.values()), list(runs))
    plot = next(plot for plot in board.plots() if plot.name == "margin")
    styles = {line.get_linestyle() for line in plot.figure.axes[0].lines}
    assert styles == {"-", "--"}
    assert invoke(a, a, "--output", tmp_path / "twice").exit_code == 1


def test_the_default_for_several_runs_is_here(tmp_path, monkeypatch, two_plots):
    monkeypatch.chdir(tmp_path)
    folders = [written(tmp_path / name, healthy(every=0)) for name in "ab"]
    assert invoke(*folders, "--quiet").exit_code == 0
    assert (tmp_path / "_amopo_report" / "index.html").is_file()
    assert not (tmp_path / "a" / "_amopo_report").exists()


def test_only_its_own_page_is_written_anew(tmp_path, two_plots):
    run = written(tmp_path / "run", killed(healthy()))
    page = run / "_amopo_report" / "index.html"
    assert invoke(run, "--quiet").exit_code == 0
    assert "step 120 of 200" in page.read_text(encoding="utf-8")
    written(run, healthy())
    assert invoke(run, "--quiet").exit_code == 0
    assert "step 200 of 200" in page.read_text(encoding="utf-8")
    # Moved with its report, it is still the same run.
    moved = run.rename(tmp_path / "moved")
    page = moved / "_amopo_report" / "index.html"
    assert invoke(moved, "--quiet").exit_code == 0

    other = written(tmp_path / "other", healthy(3))
    before = page.read_bytes()
    done = invoke(other, "--output", page.parent)
    assert done.exit_code == 1 and "--force" in done.output and page.read_bytes() == before
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "loss.png").write_text("my plot")
    done = invoke(other, "--output", mine)
    assert done.exit_code == 1 and (mine / "loss.png").read_text() == "my plot"
    assert invoke(other, "--output", mine, "--force", "--quiet").exit_code == 0
    assert (mine / "loss.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "file").write_text("mine")
    done = invoke(other, "--output", tmp_path / "file", "--force")
    assert done.exit_code == 1 and "can't be written" in done.output
    assert (tmp_path / "file").read_text() == "mine"


def test_the_terminal(made, tmp_path, two_plots):
    lines = invoke(made.folder, "--output", tmp_path / "shown").stdout.splitlines()
    assert len(lines) > 10 and lines[-1].startswith("Written: ")
    assert all(len(line) <= 80 for line in lines if not line.startswith("Written: "))
    text = " ".join(" ".join(lines).split())
    assert "warning safety paid for the others" in text and "Fell: safety" in text
    assert "<b>a $run$</b>" in text
    names = ["overall", "a_dimension_with_a_very_long_name_[bold]", "x"]
    wide = written(tmp_path / "wide", healthy(prompts=names, every=0))
    done = invoke(wide, "--output", tmp_path / "out")
    assert all(len(line) <= 80 for line in done.stdout.splitlines() if "Written" not in line)


def test_exit_codes(made, tmp_path, two_plots):
    out = ["--output", tmp_path / "out", "--quiet"]
    assert invoke(made.folder, *out, "--fail-on", "warning").exit_code == 3
    assert invoke(made.folder, *out, "--fail-on", "problem").exit_code == 0
    bad = written(tmp_path / "bad", nan_loss(healthy()))
    assert invoke(bad, "--quiet", "--fail-on", "warning").exit_code == 3
    assert invoke().exit_code == 2
    help_text = invoke("--help").output
    assert "axolotl amopo report outputs/" in help_text
    assert all(len(line) <= 80 for line in help_text.splitlines())


def test_it_starts_without_torch_and_axolotl():
    code = (
        "import sys; import axolotl_amopo.commands, axolotl_amopo.commands.report.command; "
        "import axolotl_amopo.commands.report.report, axolotl_amopo.commands.report.text; "
        "print({'torch', 'axolotl', 'transformers', 'datasets', 'pandas', 'matplotlib.pyplot'}"
        " & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_a_real_run_that_diverges(tmp_path, tiny_model):
    """transformers logs a NaN loss as 0: nothing but the finding may come of it."""
    from runs import config, train, write_config

    answers = [("Yes.", 5, 2), ("No, not at all.", 1, 3)]
    rows = [
        {
            "prompt": f"Question {number}?",
            "responses": [
                {"text": text, "scores": {"helpfulness": h, "honesty": t}} for text, h, t in answers
            ],
        }
        for number in range(8)
    ]
    values = config(
        tmp_path,
        tiny_model,
        write_jsonl(tmp_path / "data.jsonl", rows),
        learning_rate=1e30,
        val_set_size=2,
        eval_strategy="epoch",
    )
    train(write_config(tmp_path, values))
    run = read_run(tmp_path / "out")
    assert [math.isnan(entry["loss"]) for entry in run.train] == [False, True, True]
    assert math.isnan(run.evals[-1]["loss"])
    assert "amopo/helpfulness/accuracy" not in run.evals[-1]
    worst = findings(run)[0]
    assert (worst.code, worst.severity) == ("not-finite", "problem")
    assert "first at step 2" in worst.text
    assert not {"below-chance", "loss-rose", "sacrificed"} & {f.code for f in findings(run)}
    assert outcome(run) == ["Nothing to compare: margins or losses are NaN at an end of the log."]
