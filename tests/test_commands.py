"""axolotl's commands on `rl: amopo`, from the shell; few, because each takes half a minute."""

import csv
import itertools
import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import click
import fire
import pytest
import runs
import torch
import yaml
from axolotl.cli import main as axolotl
from click.testing import CliRunner
from test_report import healthy, written

from axolotl_amopo.commands import amopo
from axolotl_amopo.commands.kit.options import library_output, write_json
from axolotl_amopo.config.overrides import apply_overrides

DIMENSIONS = ("overall", "helpfulness", "honesty")


@pytest.fixture(scope="module")
def data():
    return runs.QUICKSTART / "train.jsonl"


def evaluated(data: Path, **changes):
    """Settings for a run with an evaluation set of its own."""
    held_out = data.with_name("heldout.jsonl")
    return {
        "test_datasets": [{"path": str(held_out), "type": "amopo.rated", "scale": [1, 5]}],
        "val_set_size": None,
    } | changes


def test_preprocess_train_evaluate_merge_and_answer(tmp_path, tiny_model, data):
    values = runs.config(tmp_path, tiny_model, data, **runs.LORA, **evaluated(data))
    path = str(runs.write_config(tmp_path, values | {"eval_steps": 2}))

    done = runs.command("axolotl", "preprocess", path, cwd=tmp_path)
    assert re.search(r"train.jsonl: 56 rows, 56 prompts, \d+ pairs made", done.stdout + done.stderr)
    prepared = {p.name for p in (tmp_path / "prepared").iterdir() if p.is_dir()}
    assert len(prepared) == 2  # training and evaluation

    done = runs.command("axolotl", "train", path, "--learning-rate", "0.002", cwd=tmp_path)
    log = done.stdout + done.stderr
    assert {p.name for p in (tmp_path / "prepared").iterdir() if p.is_dir()} == prepared
    assert "Loading prepared dataset from disk" in log
    (train, *_), (held_out, *_) = (
        [line for line in log.splitlines() if "| loss " in line and ("held out" in line) == is_eval]
        for is_eval in (False, True)
    )
    logged = (tmp_path / "out" / "_amopo_log.jsonl").read_text(encoding="utf-8")
    for name in DIMENSIONS:
        assert f"| {name}: margin " in train and f"| {name}: margin " in held_out
        for metric in ("loss", "margin", "accuracy", "weight", "prob"):
            assert f'"amopo/{name}/{metric}"' in logged
            assert f'"eval_amopo/{name}/{metric}"' in logged
    assert "| learning rate 0.002 |" in log
    assert "ppl" not in log
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()

    runs.command(
        "axolotl", "evaluate", path, "--lora-model-dir", values["output_dir"], cwd=tmp_path
    )
    with open(tmp_path / "out" / "eval_summary.csv", newline="") as file:
        summary = {row["metric"]: row for row in csv.DictReader(file)}
    assert float(summary["amopo/honesty/accuracy"]["validation"]) <= 1
    assert float(summary["loss"]["validation"]) > 0

    runs.command(
        "axolotl", "merge-lora", path, "--lora-model-dir", values["output_dir"], cwd=tmp_path
    )
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert (tmp_path / "out" / "merged" / "amopo_steering.json").is_file()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "merged")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out" / "merged")
    original = AutoModelForCausalLM.from_pretrained(tiny_model)
    weights = original.state_dict()
    assert any(not torch.equal(weights[name], w) for name, w in merged.state_dict().items())
    question = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hello?"}], add_generation_prompt=True, return_tensors="pt"
    )
    answer = merged.generate(**question, max_new_tokens=4, do_sample=False)
    assert answer.shape[1] > question["input_ids"].shape[1]


def test_full_training_and_overrides_of_the_block(tmp_path, tiny_model, data):
    """In a real run of `axolotl amopo train`, beside axolotl's own options."""
    path = str(runs.write_config(tmp_path, runs.config(tmp_path, tiny_model, data)))
    overrides = ("--amopo.gamma", "0.25", "--amopo.rating-in-prompt=none", "--max-steps", "2")
    done = runs.command("axolotl", "amopo", "train", path, *overrides, cwd=tmp_path)
    log = done.stdout + done.stderr
    assert "gamma 0.25" in log
    assert '"rating_in_prompt": "none"' in log
    assert "2/2" in log
    assert (tmp_path / "out" / "model.safetensors").is_file()


OVERRIDES = {
    "gamma": 1.5,
    "rating_in_prompt": "none",
    "share_prompt": "auto",
    "order_by": None,
    "overall": False,
    "dimensions": [{"name": "a b", "scale": [0, 4]}, "c, d", "null"],
    "instruction": 'Be {{ dimension }}: "it" isn\'t --easy=1, # no\nDoubt.',
}
PASSED_ON = [
    *itertools.product(("train", "evaluate", "inference"), ("accelerate", "torchrun", "python")),
    ("preprocess", None),
    ("merge-lora", None),
]


@pytest.mark.parametrize(("name", "launcher"), PASSED_ON)
def test_overrides_reach_what_loads_the_config(name, launcher, tmp_path, monkeypatch):
    """Every command, through every launcher: by value and type, and beside axolotl's own."""
    received = []

    def do_cli(config=None, **options):
        received.append(options)

    def launch(arguments, **_):
        assert ("--quiet" in arguments) == (launcher == "accelerate")
        after = arguments[arguments.index("-m") + 2 :]  # what fire gets in the launched process
        fire.Fire(do_cli, command=after)

    monkeypatch.setattr("axolotl.cli.utils.train.os.execvpe", lambda *call: launch(call[1]))
    monkeypatch.setattr("axolotl.cli.main.subprocess.run", launch)
    monkeypatch.setattr(f"axolotl.cli.{name.replace('-', '_')}.do_cli", do_cli)
    monkeypatch.setattr(os, "environ", os.environ.copy())  # the commands change it
    config = tmp_path / "config.yml"
    config.write_text("rl: amopo\ndatasets: [{path: a/b, type: amopo.helpsteer}]\n")
    arguments = [str(config), "--learning-rate", "1e-5"]
    for key, value in OVERRIDES.items():
        arguments += [f"--amopo.{key.replace('_', '-')}", yaml.safe_dump(value)]
    arguments += ["--launcher", launcher] if launcher else []
    axolotl.cli.main(["amopo", name, *arguments], standalone_mode=False)
    (options,) = received
    cfg = {"amopo": {"winner": "per_dimension"} | {"overrides": options["amopo__overrides"]}}
    apply_overrides(cfg)
    assert cfg == {"amopo": {"winner": "per_dimension"} | OVERRIDES}
    assert float(options["learning_rate"]) == 1e-5


@pytest.mark.parametrize(
    ("text", "option", "said"),
    [
        ("rl: amopo\nstrict: true\n", [], "--amopo.gamma: strict: true drops options"),
        ("rl: amopo\n", ["--cloud"], "--amopo.gamma: --cloud takes the YAML alone"),
    ],
    ids=["strict", "cloud"],
)
def test_overrides_that_axolotl_would_lose_are_refused(text, option, said, tmp_path):
    config = tmp_path / "config.yml"
    config.write_text(text)
    option += [str(config)] if option else []
    with pytest.raises(click.UsageError, match=said):
        axolotl.cli.main(
            ["amopo", "train", str(config), "--amopo.gamma", "1", *option], standalone_mode=False
        )


def test_what_a_launched_process_says_is_enough(tmp_path, monkeypatch):
    """Its launcher's own exception adds nothing, unless there is no launcher."""

    def fail(*_, **__):
        raise subprocess.CalledProcessError(1, "accelerate")

    monkeypatch.setattr("axolotl.cli.main.subprocess.run", fail)
    monkeypatch.setattr("axolotl.cli.evaluate.do_cli", fail)
    config = tmp_path / "config.yml"
    config.write_text("rl: amopo\ndatasets: [{path: a/b, type: amopo.helpsteer}]\n")
    evaluate = ["evaluate", str(config)]
    done = CliRunner().invoke(amopo, evaluate)
    assert done.exit_code == 1 and isinstance(done.exception, SystemExit)
    done = CliRunner().invoke(amopo, [*evaluate, "--launcher", "python"])
    assert isinstance(done.exception, subprocess.CalledProcessError)


# `axolotl-amopo`, and JSON.


def test_configs_as_json_alone(tmp_path):
    done = runs.command("axolotl-amopo", "configs", "--json", cwd=tmp_path)
    assert {"name", "what", "hardware"} == set(json.loads(done.stdout)[0])


@pytest.mark.parametrize("name", ["plan", "inspect"])
def test_stdout_is_json_alone(name, tmp_path, tiny_model, data):
    """And the same is in the file, which is not overwritten."""
    path = str(runs.write_config(tmp_path, runs.config(tmp_path, tiny_model, data)))
    whole = ("axolotl-amopo", name, path, "--json", "--output", "facts.json")
    done = runs.command(*whole, cwd=tmp_path)
    facts = json.loads(done.stdout)
    assert set(facts) >= {"plan": {"total", "changes"}, "inspect": {"train_rows"}}[name]
    assert json.loads((tmp_path / "facts.json").read_text()) == facts
    again = runs.command(*whole, cwd=tmp_path, check=False)
    assert again.returncode == 1 and again.stdout == ""
    assert again.stderr == "Error: facts.json is there already; name another, or add --force.\n"


def test_what_else_is_printed_goes_to_stderr(capfd):
    """By Python, by libraries below it, by processes, and by loggers that are made meanwhile."""
    print("a banner")
    with library_output(quiet=False, as_json=True):
        print("print")
        os.write(1, b"a library\n")
        subprocess.run(["echo", "a process"], check=True)
        log = logging.StreamHandler(sys.stdout)
    log.emit(logging.makeLogRecord({"msg": "a log, later"}))
    write_json({"a": 1}, as_json=True)
    printed = capfd.readouterr()
    assert printed.out == 'a banner\n{"a": 1}\n'
    for said in ("print", "a library", "a process", "a log, later"):
        assert said in printed.err


def test_a_report_has_its_json_beside_the_page(tmp_path):
    run = written(tmp_path / "run", healthy())
    done = CliRunner().invoke(amopo, ["report", str(run), "--json"])
    facts = json.loads(done.stdout)
    assert json.loads((run / "_amopo_report" / "report.json").read_text()) == facts
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "report.json").write_text("mine")
    done = CliRunner().invoke(amopo, ["report", str(run), "--output", str(tmp_path / "mine")])
    assert done.exit_code == 1 and "--force" in done.output
    assert (tmp_path / "mine" / "report.json").read_text() == "mine"


def test_inference_with_the_trained_config(tmp_path, tiny_model, data):
    """On a CPU too, where axolotl's defaults for LoRA would fail."""
    values = runs.config(tmp_path, tiny_model, data, **runs.LORA, bf16=None)
    values.pop("output_dir")
    done = subprocess.run(
        [sys.executable, "-m", "axolotl.cli.inference", str(runs.write_config(tmp_path, values))],
        input="Hello?",
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    answer = done.stdout.rpartition("Hello?")[2]
    assert len(answer.strip()) > 20  # gibberish, from random weights


def test_resume_after_sigkill_continues_the_same_run(tmp_path, tiny_model, data):
    """Losses, weights and draws go on as if nothing had happened."""

    def settings(folder):
        folder.mkdir()
        values = runs.config(
            folder,
            tiny_model,
            data,
            **runs.LORA,
            lora_dropout=0.1,
            max_steps=16,
            save_strategy="steps",
            save_steps=4,
            gradient_accumulation_steps=2,
        )
        return runs.write_config(folder, values)

    whole = runs.train(settings(tmp_path / "whole"))

    killed = settings(tmp_path / "killed")
    out = tmp_path / "killed" / "out"
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "axolotl.cli.train", str(killed)],
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        deadline = time.monotonic() + 200
        manifest = out / "checkpoint-4" / "amopo_manifest.json"
        while not (manifest.exists() and '"save"' in manifest.read_text()):  # it is complete
            assert process.poll() is None, (tmp_path / "log").read_text()[-3000:]
            assert time.monotonic() < deadline
            time.sleep(0.02)
        time.sleep(0.2)  # some steps beyond the checkpoint
        os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (out / "checkpoint-16").exists()

    resumed = runs.train(killed, resume_from_checkpoint=str(out / "checkpoint-4"))
    names = [f"amopo/{name}/weight" for name in DIMENSIONS] + ["loss", "grad_norm"]

    def history(trainer):
        return {
            entry["step"]: [entry[name] for name in names]
            for entry in trainer.state.log_history
            if "loss" in entry
        }

    assert list(history(resumed)) == list(range(1, 17))
    assert history(resumed) == history(whole)


def test_prepared_rows_are_made_anew_when_what_shapes_them_changes(tmp_path, tiny_model, data):
    """And only then: the loss' own settings leave them as they are."""
    copy = tmp_path / "data.jsonl"
    copy.write_bytes(data.read_bytes())
    values = runs.config(tmp_path, tiny_model, copy)
    path = runs.write_config(tmp_path, values)

    def folders(**changes):
        runs.prepare(runs.write_config(tmp_path, values | changes, "changed.yml"))
        return {p.name for p in (tmp_path / "prepared").iterdir() if p.is_dir()}

    runs.prepare(path)
    seen = folders()
    assert len(seen) == 1
    block = values["amopo"]
    entry = values["datasets"][0]
    same = [
        {"amopo": block | {"gamma": 0.1, "weighting": "mean"}},
        {"learning_rate": 1.0},
        {"rl_beta": 0.1},
    ]
    for changes in same:
        assert folders(**changes) == seen, changes
    shaping = [
        {"amopo": block | {"dimensions": ["helpfulness", "safety"]}},
        {"amopo": block | {"dimensions": [{"name": "helpfulness", "description": "useful"}]}},
        {"amopo": block | {"winner": "per_dimension"}},
        {"amopo": block | {"instruction": "Be {{ dimension }}."}},
        {"amopo": block | {"overall": False}},
        {"datasets": [entry | {"scale": [0, 5]}]},
        {"sequence_len": 300},
        {"sequence_len": 300, "excess_length_strategy": "truncate"},
        {"chat_template": "llama3"},
    ]
    for changes in shaping:
        now = folders(**changes)
        assert len(now) == len(seen) + 1, changes
        seen = now
    copy.write_text(copy.read_text().replace("toaster", "kettle"))
    now = folders()
    assert len(now) == len(seen) + 1, "the data's content"
    seen = now

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    seen = folders(tokenizer_config=str(tmp_path / "tokenizer"))
    tokenizer.chat_template = tokenizer.chat_template.replace("\n", "\n\n")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    assert len(folders(tokenizer_config=str(tmp_path / "tokenizer"))) == len(seen) + 1


def test_a_command_begins_without_axolotl(monkeypatch):
    """As in vLLM's own environment, where `generate` runs."""
    monkeypatch.setitem(sys.modules, "axolotl.utils", None)  # an import of it fails
    monkeypatch.setattr("axolotl_amopo.commands.kit.options.find_spec", lambda name: None)
    done = CliRunner().invoke(amopo, ["generate"])
    assert done.exit_code == 2 and "Name either --prompt TEXT" in done.output, done.output
