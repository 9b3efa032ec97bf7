"""`axolotl amopo online`: what a round does, and that rounds go on where they were stopped."""

import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml
from click.testing import CliRunner
from runs import LORA, config, train, write_config, write_jsonl

from axolotl_amopo.commands import amopo
from axolotl_amopo.commands.kit.launch import run_command
from axolotl_amopo.commands.online import stages as running
from axolotl_amopo.commands.online.plan import drawn_rows, read_online, round_config, spread
from axolotl_amopo.commands.online.stages import (
    MARK,
    Stage,
    finished,
    left_over,
    only_one,
    stages,
)
from axolotl_amopo.errors import AMoPOError

RATERS = """
dimensions:
  vowels: {function: "online_raters:vowels", scale: [0, 1]}
  brevity: {formula: characters, scale: [0, 80], direction: lower}
"""
FUNCTIONS = """
def vowels(item):
    return sum(letter in "aeiou" for letter in item.response) / max(1, len(item.response))
"""


def write_plan(folder: Path, base: dict | None = None, **changes) -> Path:
    """Rounds of a tiny model; `changes` replace keys or (None) remove them."""
    (folder / "raters.yml").write_text(RATERS, encoding="utf-8")
    (folder / "online_raters.py").write_text(FUNCTIONS, encoding="utf-8")
    prompts = [{"prompt": f"What is number {i}?", "id": i} for i in range(5)]
    write_jsonl(folder / "prompts.jsonl", prompts)
    write_jsonl(folder / "held_out.jsonl", [{"prompt": "Who?"}, {"prompt": "What else?"}])
    set_here = dict.fromkeys(
        ["datasets", "dataset_prepared_path", "output_dir", "val_set_size", "max_steps"]
    )
    values = config(folder, folder / "model", "", **set_here | (base or {}))
    write_config(folder, values)
    given = {
        "config": str(folder / "config.yml"),
        "raters": str(folder / "raters.yml"),
        "prompts": str(folder / "prompts.jsonl"),
        "held_out": str(folder / "held_out.jsonl"),
        "output": str(folder / "online"),
        "rounds": 2,
        "prompts_per_round": 3,
        "responses": 2,
        "max_new_tokens": 8,
        "measure": {"max_new_tokens": 4, "only": "front"},
    } | changes
    kept = {key: value for key, value in given.items() if value is not None}
    return write_config(folder, kept, "online.yml")


BLOCK = {"objective": "cos_dpo", "dimensions": ["vowels", "brevity"]}
BASE = {"amopo": BLOCK, "rl_beta": 0.1, **LORA}


# What a round does


def test_a_round_goes_on_with_the_adapter_and_the_same_reference(tmp_path):
    plan = read_online(write_plan(tmp_path, BASE))
    first, second = round_config(plan, 1), round_config(plan, 2)
    assert "lora_model_dir" not in first and "reference" not in first["amopo"]
    assert second["lora_model_dir"] == first["output_dir"] != second["output_dir"]
    assert second["base_model"] == first["base_model"] == second["amopo"]["reference"]
    assert [entry["path"] for entry in second["datasets"]] == [
        str(tmp_path / "online" / "round-2" / "rated.jsonl")
    ]
    assert first["amopo"]["dimensions"] == [
        {"name": "vowels", "scale": [0, 1], "direction": "higher"},
        {"name": "brevity", "scale": [0, 80], "direction": "lower"},
    ]
    assert [stage.name for stage in stages(plan, 1)] == ["generate", "rate", "train", "steer"]
    assert [stage.name for stage in stages(plan, 2)] == [
        "generate", "rate", "reference", "train", "steer",
    ]  # fmt: skip


def test_a_whole_model_is_the_next_rounds_base(tmp_path):
    base = {"amopo": BLOCK | {"objective": "simpo"}, "adapter": None}
    plan = read_online(write_plan(tmp_path, base, train_on="all"))
    first, second = round_config(plan, 1), round_config(plan, 2)
    assert second["base_model"] == first["output_dir"] and "lora_model_dir" not in second
    assert "reference" not in second["amopo"]  # SimPO has none
    assert "reference" not in [stage.name for stage in stages(plan, 2)]
    assert len(second["datasets"]) == 2
    # It does not say what it was trained from, which `steer` asks beside it.
    for k in (1, 2):
        command = stages(plan, k)[-1].command
        assert command[command.index("--base-model") + 1] == first["base_model"]


def test_one_dimension_may_stand_without_a_list(tmp_path):
    base = BASE | {"amopo": BLOCK | {"dimensions": "vowels"}}
    plan = read_online(write_plan(tmp_path, base, measure=None))
    assert [one["name"] for one in plan.base["amopo"]["dimensions"]] == ["vowels"]


def test_a_reference_of_the_users_stays(tmp_path):
    plan = read_online(write_plan(tmp_path, BASE | {"amopo": BLOCK | {"reference": "other/model"}}))
    assert round_config(plan, 2)["amopo"]["reference"] == "other/model"
    assert "reference" in [stage.name for stage in stages(plan, 1)]


def test_all_prompts_come_before_one_comes_again(tmp_path):
    plan = read_online(write_plan(tmp_path, BASE))
    rows = [{"id": i} for i in range(5)]
    rounds = [[row["id"] for row in drawn_rows(plan, rows, k)] for k in range(1, 11)]
    assert all(len(set(one)) == 3 for one in rounds)
    together = [i for one in rounds for i in one]
    assert sorted(together[:5]) == sorted(together[5:10]) == list(range(5))
    assert rounds == [[row["id"] for row in drawn_rows(plan, rows, k)] for k in range(1, 11)]
    with pytest.raises(AMoPOError, match="prompts_per_round: 3 is more than the 2"):
        drawn_rows(plan, rows[:2], 1)


def test_weights_are_drawn_anew_in_each_round(tmp_path):
    plan = read_online(write_plan(tmp_path, BASE, ask="weights", draws=40))
    first, second = spread(plan, 1), spread(plan, 2)
    assert len(first) == 40 and first != second and first == spread(plan, 1)
    shares = [float(line.partition("vowels=")[2].partition(",")[0]) for line in first]
    assert min(shares) < 0.2 and max(shares) > 0.8 and 0.3 < sum(shares) / 40 < 0.7
    plan = read_online(write_plan(tmp_path, BASE, ask="nothing"))
    assert spread(plan, 1) == ["none"]


@pytest.mark.parametrize(
    ("base", "changes", "message"),
    [
        (BASE | {"datasets": [{"path": "x"}]}, {}, "datasets: remove it; each round trains on"),
        (BASE | {"hub_model_id": "me/x"}, {}, "hub_model_id: remove it"),
        (BASE | {"rl": "dpo"}, {}, "has no `rl: amopo`"),
        (BASE | {"amopo": {"dimensions": ["grace"]}}, {}, "no rater covers 'grace'"),
        (
            BASE | {"amopo": {"dimensions": [{"name": "vowels", "scale": [1, 5]}]}},
            {},
            "vowels.scale: is [1, 5], and its rater's is [0.0, 1.0]",
        ),
        (BASE | {"amopo": {"dimensions": "honesty"}}, {}, "no rater covers 'honesty'"),
        (BASE | {"amopo": {"dimensions": 5}}, {}, "amopo.dimensions: "),
        (BASE | {"amopo": ["vowels"]}, {}, "amopo: must be a block of keys"),
        (
            BASE | {"amopo": {"dimensions": [{"name": "vowels", "scale": 5}]}},
            {},
            "vowels.scale: is 5, and its rater's is [0.0, 1.0]",
        ),
        (BASE, {"measure": {"samples": 2}}, "samples above 1 go with a temperature"),
        (
            BASE | {"amopo": BLOCK | {"dimensions": ["vowels"]}},
            {},
            "online.yml, measure: there is no front to ask for",
        ),
        (BASE | {"base_model": None}, {}, "base_model: is missing"),
        (BASE, {"prompts_per_round": 6}, "prompts_per_round: 6 is more than the 5"),
        (BASE, {"rater": "x"}, "rater: unknown key. Did you mean 'raters'?"),
        (BASE, {"prompts": "no.jsonl"}, "prompts: there is no file no.jsonl"),
        (BASE, {"temperatures": [0, 1]}, "must be above 0"),
        (
            BASE | {"amopo": BLOCK | {"objective": "simpo"}},
            {"ask": "weights"},
            "take no weights; write ask: spread",
        ),
    ],
)
def test_a_bad_plan_is_refused_before_anything_runs(tmp_path, base, changes, message):
    path = write_plan(tmp_path, base, **changes)
    done = CliRunner().invoke(amopo, ["online", str(path)])
    assert done.exit_code == 1 and message in done.output, done.output
    assert "Traceback" not in done.output and not (tmp_path / "online").exists()


# Rounds, with every stage's own code in this process


@pytest.fixture
def here(monkeypatch, tmp_path):
    """Runs stages in this process; `here.stop` names one that is to fail, `here.ran` has them."""

    output = tmp_path / "online"

    class Here:
        def __init__(self):
            self.ran, self.stop = [], None

        def __call__(self, arguments, *, out, err, environment):
            assert environment[MARK] == str(output.resolve())
            program, *rest = arguments
            self.ran.append(rest[0])
            if self.stop == (rest[0], self.ran.count(rest[0])):
                err.write("it broke\n")
                return 1
            if program == "axolotl":
                train(Path(rest[1]))
                return 0
            done = CliRunner().invoke(amopo, rest, catch_exceptions=False)
            err.write(done.stderr)
            out.write(done.stdout)
            return done.exit_code

    runner = Here()
    monkeypatch.setattr(running, "run_command", runner)
    return runner


def test_two_rounds_stopped_and_gone_on_with(tmp_path, base, here):
    shutil.copytree(base, tmp_path / "model")
    path = write_plan(tmp_path, BASE, ask="weights", draws=2)

    here.stop = ("train", 1)
    stopped = CliRunner().invoke(amopo, ["online", str(path)])
    assert stopped.exit_code == 1 and here.ran == ["generate", "rate", "train"], stopped.output
    assert "round-1: train ended with 1" in stopped.output and "it broke" in stopped.output
    assert "goes on from there" in stopped.output and "Traceback" not in stopped.output

    here.stop, here.ran = None, []
    done = CliRunner().invoke(amopo, ["online", str(path), "--json"])
    assert done.exit_code == 0, done.output
    assert here.ran == ["train", "steer", "generate", "rate", "reference", "train", "steer"]
    rounds = json.loads(done.stdout.splitlines()[-1])
    assert [one["round"] for one in rounds] == [1, 2]
    folder = tmp_path / "online"
    rows = [json.loads(line) for line in (folder / "round-2" / "rated.jsonl").open()]
    assert len(rows) == 3 and all(row["id"] in range(5) for row in rows)
    for row in rows:
        for response in row["responses"]:
            assert response["settings"].startswith("weights vowels=")
            assert response["scores"]["brevity"] == min(80, len(response["text"]))
    # The second round's model is another one than the first's, and all are in one measurement.
    models = rounds[1]["steer"]["models"]
    assert [one["name"] for one in models] == ["round-1", "round-2", "base"]
    weights = [
        (folder / "models" / f"round-{k}" / "adapter_model.safetensors").read_bytes()
        for k in (1, 2)
    ]
    assert weights[0] != weights[1]
    assert models[0]["front"]["asked"][0].startswith("weights")
    assert (folder / "round-2" / "steered.html").is_file()

    # Complete: nothing runs again, and the table is there; one more round is the same plan.
    here.ran = []
    again = CliRunner().invoke(amopo, ["online", str(path)])
    assert again.exit_code == 0 and here.ran == [] and "volume of the front" in again.stdout
    assert "round-2" in again.stdout and len(finished(folder / "round-2")) == 5
    more = yaml.safe_load(path.read_text(encoding="utf-8")) | {"responses": 3}
    write_config(tmp_path, more, "online.yml")
    other = CliRunner().invoke(amopo, ["online", str(path)])
    assert other.exit_code == 1 and "begun with other responses" in other.output

    # A stage without its line is repeated, and no other.
    write_plan(tmp_path, BASE, ask="weights", draws=2)
    lines = (folder / "round-2" / "stages.jsonl").read_text(encoding="utf-8").splitlines(True)
    kept = [line for line in lines if json.loads(line)["stage"] != "rate"]
    (folder / "round-2" / "stages.jsonl").write_text("".join(kept), encoding="utf-8")
    (folder / "round-2" / "rated.jsonl").unlink()
    repeated = CliRunner().invoke(amopo, ["online", str(path)])
    assert repeated.exit_code == 0 and here.ran == ["rate"], repeated.output
    assert [json.loads(line) for line in (folder / "round-2" / "rated.jsonl").open()] == rows
    here.ran = []

    # Other prompts in the same file do not change what a round has read.
    read = (folder / "round-1" / "prompts.jsonl").read_bytes()
    write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": f"Other {i}?", "id": i} for i in range(5)])
    other = CliRunner().invoke(amopo, ["online", str(path)])
    assert other.exit_code == 1 and "other content of prompts" in other.output, other.output
    forced = CliRunner().invoke(amopo, ["online", str(path), "--force"])
    assert forced.exit_code == 0 and here.ran == [], forced.output
    assert (folder / "round-1" / "prompts.jsonl").read_bytes() == read


def test_a_dry_run_shows_every_command(tmp_path, here):
    path = write_plan(tmp_path, BASE, ask="weights")
    done = CliRunner().invoke(amopo, ["online", str(path), "--dry-run"])
    assert done.exit_code == 0 and done.stdout.count("axolotl train") == 2, done.output
    drawing = next(line for line in done.stdout.splitlines() if "generate" in line)
    assert "--spread 'weights vowels=" in drawing  # as a shell takes it
    assert not here.ran and not (tmp_path / "online").exists()


def test_a_plan_may_be_mended_until_a_response_is_drawn(tmp_path, here):
    here.stop = ("generate", 1)
    path = write_plan(tmp_path, BASE)
    assert "generate ended with 1" in CliRunner().invoke(amopo, ["online", str(path)]).output
    here.ran = []
    path = write_plan(tmp_path, BASE | {"learning_rate": 1e-4})
    assert "generate ended with 1" in CliRunner().invoke(amopo, ["online", str(path)]).output
    config = yaml.safe_load((tmp_path / "online" / "round-1" / "config.yml").read_text("utf-8"))
    assert config["learning_rate"] == 1e-4
    (tmp_path / "online" / "round-1" / "candidates.jsonl").write_text("{}\n", encoding="utf-8")
    path = write_plan(tmp_path, BASE)
    mended = CliRunner().invoke(amopo, ["online", str(path)])
    assert "begun with other learning_rate" in mended.output and "--force" in mended.output


def test_a_stage_is_behind_a_round_whatever_is_before_its_line(tmp_path, here, monkeypatch):
    """A full disk cut the line before; someone wrote another by hand."""
    (tmp_path / "stages.jsonl").write_text('[]\n{"seconds": 1}\n{"stage": "gen', encoding="utf-8")
    stage = Stage("train", ["axolotl", "train", "it"])
    monkeypatch.setattr(running, "run_command", lambda *a, **k: 0)
    running.run_stage(tmp_path, stage, lambda text: None)
    assert list(finished(tmp_path)) == ["train"]


def test_an_output_that_is_a_file(tmp_path, here):
    path = write_plan(tmp_path, BASE)
    (tmp_path / "online").write_text("mine", encoding="utf-8")
    done = CliRunner().invoke(amopo, ["online", str(path)])
    assert done.exit_code == 1 and "can't be made, or written to" in done.output, done.output
    assert (tmp_path / "online").read_text(encoding="utf-8") == "mine"


def test_two_at_once_are_refused(tmp_path):
    with (
        only_one(tmp_path / "online"),
        pytest.raises(AMoPOError, match="another process"),
        only_one(tmp_path / "online"),
    ):
        pass
    with only_one(tmp_path / "online"):
        pass


def test_what_a_killed_launcher_leaves_is_seen(tmp_path):
    """Its own processes are started without our file descriptors, and in a session of theirs."""
    output = tmp_path / "online"
    code = (
        "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; "
        "print(0, flush=True); time.sleep(60)'], start_new_session=True)"
    )
    with (tmp_path / "log").open("w") as log:
        arguments = [sys.executable, "-c", code]
        assert not run_command(arguments, out=log, environment={MARK: str(output.resolve())})
    (left,) = left_over(output)
    try:
        with pytest.raises(AMoPOError, match=f"kill {left}$"), only_one(output):
            pass
    finally:
        os.kill(left, signal.SIGKILL)
    while psutil.pid_exists(left) and psutil.Process(left).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    with only_one(output):
        pass


def test_a_folder_with_other_things_is_left_alone(tmp_path, here):
    path = write_plan(tmp_path, BASE)
    (tmp_path / "online").mkdir()
    (tmp_path / "online" / "thesis.txt").write_text("mine", encoding="utf-8")
    done = CliRunner().invoke(amopo, ["online", str(path)])
    assert done.exit_code == 1 and "holds thesis.txt" in done.output and not here.ran
    assert [one.name for one in (tmp_path / "online").iterdir()] == ["thesis.txt"]
