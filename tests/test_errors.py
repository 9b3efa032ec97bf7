"""Errors of ours: one sentence, exit code 1, no traceback; and what is found before a launch."""

import json
import os
import shutil
import subprocess
import sys

import click
import pytest
import runs
import yaml
from click.testing import CliRunner
from test_bad_input import CONFIGS, ENTRIES, FILES, GOOD, ROWS
from test_report import healthy, written

from axolotl_amopo.commands import amopo
from axolotl_amopo.config.axolotl_keys import schema_keys
from axolotl_amopo.config.before_launch import (
    check_before_launch,
    integration_keys,
    option_keys,
    with_options,
)
from axolotl_amopo.config.block import AMoPOConfig
from axolotl_amopo.config.overrides import passed_on
from axolotl_amopo.errors import TRACEBACK, AMoPOError, ConfigError
from axolotl_amopo.plugin import AMoPOPlugin
from axolotl_amopo.steering.steering import Steering

# The hook.


@pytest.fixture
def end_with(tmp_path):
    """Runs a module with our hook, as axolotl runs its own, that an exception ends."""

    def run(error: str, before: str = "", **environment: str):
        lines = [
            "import sys",
            "from axolotl_amopo.errors import *",
            before,
            "print_sentences()",
            "print_sentences()",
            "print('logged before')",
            f"raise {error}",
        ]
        (tmp_path / "ended.py").write_text("\n".join(lines))
        return subprocess.run(
            [sys.executable, "-m", "ended"],
            cwd=tmp_path,
            env=os.environ | {"PYTHONUNBUFFERED": ""} | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE if before else subprocess.STDOUT,
            text=True,
            timeout=60,
            check=False,
        )

    return run


@pytest.mark.parametrize("kind", ["AMoPOError", "ConfigError", "DataError"])
def test_an_error_of_ours_is_its_sentence(kind, end_with):
    """Last of all, also where stdout, which Python holds back, goes to the same file."""
    done = end_with(f"{kind}('beta: is too high.')")
    assert done.stdout == "logged before\nError: beta: is too high.\n"
    assert done.returncode == 1


def test_a_switch_brings_the_traceback_back(end_with):
    done = end_with("DataError('no rows.')", **{TRACEBACK: "1"})
    assert "Traceback" in done.stdout and "DataError: no rows.\n" in done.stdout
    assert done.returncode == 1
    assert "Traceback" not in end_with("DataError('no rows.')", **{TRACEBACK: "0"}).stdout


def test_other_exceptions_go_on_to_the_hook_that_was_there(end_with):
    done = end_with("ValueError('a bug')")
    assert "Traceback" in done.stdout and "ValueError: a bug\n" in done.stdout
    before = "sys.excepthook = lambda kind, *_: print('hooked', kind.__name__, file=sys.stderr)"
    assert end_with("ValueError('a bug')", before).stderr == "hooked ValueError\n"
    assert end_with("DataError('no rows.')", before).stderr == "Error: no rows.\n"


@pytest.mark.parametrize(
    ("cfg", "hooked"),
    [({"rl": "amopo", "amopo": {"gama": 1}}, True), ({"rl": "dpo"}, False), ({"amopo": {}}, False)],
    ids=["amopo", "dpo", "the block alone"],
)
def test_only_a_run_of_ours_is_hooked(cfg, hooked, monkeypatch):
    def before(*_):
        raise AssertionError

    monkeypatch.setattr(sys, "excepthook", before)
    plugin = AMoPOPlugin()
    monkeypatch.setattr(plugin, "_is_first", lambda: True)
    try:
        plugin.register(cfg)
    except ConfigError:
        assert hooked
    assert (sys.excepthook is not before) == hooked


# Commands of ours.


def test_a_command_says_it_as_click_does(tmp_path, monkeypatch):
    missing = ["report", str(tmp_path / "nowhere")]
    done = CliRunner().invoke(amopo, missing)
    assert done.exit_code == 1 and done.stdout == ""
    assert done.stderr.startswith("Error: ") and done.stderr.count("\n") == 1
    monkeypatch.setenv(TRACEBACK, "1")
    assert isinstance(CliRunner().invoke(amopo, missing).exception, AMoPOError)


# Before a launch.


@pytest.fixture
def raw(tmp_path):
    data = runs.write_jsonl(tmp_path / "data.jsonl", [GOOD])
    return runs.config(tmp_path, tmp_path / "no model", data)


def refused(values: dict, parts: list[str]) -> None:
    with pytest.raises(AMoPOError) as error:
        check_before_launch(values)
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize("name", CONFIGS)
def test_bad_config(name, raw):
    changes, parts = CONFIGS[name]
    refused(raw | changes, parts)


@pytest.mark.parametrize("name", ENTRIES)
def test_bad_entry(name, raw):
    changes, parts = ENTRIES[name]
    entry = {k: v for k, v in (raw["datasets"][0] | changes).items() if v is not None}
    refused(raw | {"datasets": [entry]}, parts)
    if "no such file" in name:  # which may be there where the run is
        check_before_launch(raw | {"datasets": [entry]}, with_data=False)


@pytest.mark.parametrize("name", ["empty file", "not UTF-8", "broken JSON", "not an object"])
def test_bad_file(name, raw, tmp_path):
    content, parts = FILES[name]
    (tmp_path / "data.jsonl").write_bytes(content)
    refused(raw, [str(tmp_path / "data.jsonl"), *parts])
    held_out = {"test_datasets": raw["datasets"]}
    good = runs.write_jsonl(tmp_path / "good.jsonl", [GOOD])
    refused(raw | held_out | {"datasets": [raw["datasets"][0] | {"path": str(good)}]}, parts)


@pytest.mark.parametrize(
    "content",
    [
        '{"a": 1}\n\n{"a": 2}\n',
        '[{"a": 1},\n {"a": 2}]\n',
        '{"a":\n 1}\n{"a":\n 2}\n',
        "\ufeff{}\n",
    ],
    ids=["empty line", "one list", "objects over lines", "byte order mark"],
)
def test_what_datasets_loads_is_left_to_it(content, raw, tmp_path):
    (tmp_path / "data.jsonl").write_text(content, encoding="utf-8")
    check_before_launch(raw)


def test_key_twice(raw, tmp_path):
    path = runs.write_config(tmp_path, raw)
    path.write_text(path.read_text() + "learning_rate: 1e-6\n")
    refused(raw | {"axolotl_config_path": str(path)}, ["the key 'learning_rate' is there twice"])


def test_what_is_good_passes(raw):
    check_before_launch(raw)
    check_before_launch({"rl": "dpo", "amopo": {"gama": 1}})
    for path in (runs.ROOT / "example_configs").glob("*.yml"):
        check_before_launch(yaml.safe_load(path.read_text(encoding="utf-8")), with_data=False)


def test_it_knows_the_keys_of_the_schema():
    """axolotl's options hold them but for four; its plugins' keys are in their source."""
    assert option_keys() <= schema_keys()
    assert schema_keys() - option_keys() <= integration_keys() | {"amopo"}


def test_keys_of_plugins_are_not_misspelt(raw):
    """Each resembles a key of axolotl's."""
    named = {"plugins": ["axolotl.integrations.lm_eval.LMEvalPlugin"], "lm_eval_batch_size": 4}
    check_before_launch(raw | named)
    check_before_launch(raw | {"plugins": ["somebodys.Plugin"], "learning_rates": [1e-4]})
    with pytest.raises(ConfigError, match="learning_rates"):
        check_before_launch(raw | named | {"learning_rates": [1e-4]})


def test_options_count_as_axolotl_takes_them(raw):
    refused(with_options(raw, {"rl_beta": "0"}), ["rl_beta"])
    refused(with_options(raw, {"sample_packing": "true"}), ["sample_packing"])
    refused(with_options(raw, {"trl__beta": "0.1"}), ["trl"])
    refused(with_options(raw, passed_on({"gama": 1})), ["amopo.gama"])
    good = {"sample_packing": "no", "rl_beta": "1e-1", "reward_model": "none", "trl": None}
    check_before_launch(with_options(raw | {"sample_packing": True, "rl_beta": 0}, good))
    strict = with_options(raw | {"strict": True}, {"trl__beta": "1", "rl_beta": "0"})
    check_before_launch(strict)


def test_every_config_of_a_sweep_is_checked(raw, tmp_path, capsys):
    path = runs.write_config(tmp_path, raw)
    sweep = runs.write_config(tmp_path, {"amopo.gamma": [1.0, 2.0, -3.0]}, "sweep.yml")
    arguments = ["train", str(path), "--sweep", str(sweep)]
    with pytest.raises(click.ClickException, match=r"amopo.gamma: .*-3"):
        amopo.main(arguments, standalone_mode=False)
    assert capsys.readouterr().out == ""


IMPORTED = """
import json
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from axolotl_amopo.commands import amopo
from axolotl_amopo.config.files import read_yaml

config, run_dir, model = sys.argv[1:]
heavy = ["axolotl", "torch", "transformers", "datasets", "peft", "trl", "scipy", "pandas"]
heavy += ["matplotlib", "gradio", "axolotl.integrations.base", "axolotl.utils.schemas.config"]
helped = [name for name, command in amopo.commands.items() if command.add_help_option]
commands = [["--help"], *([name, "--help"] for name in helped), ["configs"], ["report", run_dir]]
commands += [["template", model, "--output", f"{run_dir}/made.jinja"]]
found = {}
for arguments in commands:
    with redirect_stdout(StringIO()):
        amopo.main(arguments, standalone_mode=False)
    found[" ".join(arguments[:2])] = [module for module in heavy if module in sys.modules]
from axolotl_amopo.config.before_launch import check_before_launch
check_before_launch(read_yaml(Path(config)))
found["before a launch"] = [module for module in heavy if module in sys.modules]
print(json.dumps(found))
"""


def test_it_imports_nothing_that_takes_long(raw, tmp_path, tiny_model):
    """One command after the other in one process, as `axolotl-amopo` runs each."""
    path = runs.write_config(tmp_path, raw)
    run_dir, model = written(tmp_path / "run", healthy(steps=4)), tmp_path / "model"
    shutil.copytree(tiny_model, model)
    Steering.from_config(AMoPOConfig(dimensions=["a"]), {"a": (0.0, 4.0)}).save(model)
    arguments = [str(one) for one in (path, run_dir, model)]
    done = runs.command(sys.executable, "-c", IMPORTED, *arguments, cwd=tmp_path)
    found = json.loads(done.stdout.splitlines()[-1])
    last, template, report = (found.popitem()[1] for _ in range(3))
    assert {"--help", "plan --help", "score --help", "configs"} < found.keys()
    assert not any(found.values()), found
    assert report == ["matplotlib"]
    # A tokenizer needs transformers, which imports others where it finds them.
    assert not {*template} & {"axolotl", "datasets", "peft", "trl", "gradio"}
    slow = {"datasets", "peft", "trl", "axolotl.integrations.base"}
    assert not {*last} & {*slow, "axolotl.utils.schemas.config"}


# Whole commands; few, because each takes half a minute.

# changes to the config, rows beside a good one, and the sentence
TYPO = ({"amopo": {"gama": 1}}, [], "amopo.gama: unknown key. Did you mean 'gamma'?")
MISSING = (
    {"test_datasets": [{"path": "no.jsonl", "type": "amopo.rated"}], "val_set_size": None},
    [],
    "test_datasets[0].path: there is no file or folder 'no.jsonl'.",
)
BAD_ROW = (
    {},
    [ROWS["rating out of scale"][1]],
    "data.jsonl, row 2, key 'responses[0].scores.honesty': 7 is outside",
)


@pytest.mark.parametrize(
    ("command", "options", "case", "launched", "traces"),
    [
        ("train", ["--launcher", "python"], MISSING, False, 0),
        ("train", [], TYPO, True, 1),  # the launcher's
        ("preprocess", [], BAD_ROW, False, 0),
        ("amopo train", [], TYPO, False, 0),
        ("amopo train", [], BAD_ROW, True, 0),
    ],
    ids=["train", "train by accelerate", "preprocess", "amopo train", "amopo train, launched"],
)
def test_the_sentence_comes_last(command, options, case, launched, traces, tmp_path, tiny_model):
    changes, rows, sentence = case
    data = runs.write_jsonl(tmp_path / "data.jsonl", [GOOD, *rows])
    path = str(runs.write_config(tmp_path, runs.config(tmp_path, tiny_model, data, **changes)))
    done = runs.command("axolotl", *command.split(), path, *options, cwd=tmp_path, check=False)
    assert done.returncode == 1
    ours, *others = done.stderr.split("Traceback")
    last = ours.splitlines()[-1]
    assert last.startswith("Error: ") and sentence in last
    assert len(others) == traces and all("CalledProcessError" in trace for trace in others)
    assert ("`accelerate launch`" in ours) == launched  # what it says about its defaults
