"""What the trackers receive, read back from where they keep it."""

import json
import re
from collections import defaultdict

import pytest
import runs
import wandb
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from test_records import ROWS
from transformers.integrations.integration_utils import rewrite_logs

from axolotl_amopo.training.metrics import PER_CRITERION, SPREAD
from axolotl_amopo.training.trackers import LOG, Trackers

METRICS = (runs.ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
# Sent as a run's summary, not as a point of a curve.
SUMMARY = {
    "train_runtime",
    "train_samples_per_second",
    "train_steps_per_second",
    "train_loss",
    "total_flos",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("run")


@pytest.fixture(scope="module")
def trainer(folder, tiny_model):
    """Four steps with two evaluations, under TensorBoard, and wandb without a network."""
    data = runs.write_jsonl(folder / "data.jsonl", ROWS)
    changes = {
        "amopo": {"dimensions": ["helpfulness", "honesty"], "gamma": 1.25, "eval_table": 2}
        | {"generate_samples": 1},
        "generation_max_new_tokens": 5,
        "val_set_size": None,
        "test_datasets": [{"path": str(data), "type": "amopo.rated", "scale": [1, 5]}],
        "eval_strategy": "steps",
        "eval_steps": 2,
        "max_steps": 4,
        "use_tensorboard": True,
        "wandb_project": "amopo",
        "wandb_mode": "offline",
    }
    path = runs.write_config(folder, runs.config(folder, tiny_model, data, **changes))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_DIR", str(folder))
        patch.setenv("WANDB_SILENT", "true")
        for name in ("WANDB_PROJECT", "WANDB_MODE"):  # axolotl sets them, for all tests to come
            patch.setenv(name, "")
        yield runs.train(path)
        wandb.finish()


@pytest.fixture(scope="module")
def events(trainer, folder):
    (events,) = (folder / "out" / "runs").iterdir()
    read = EventAccumulator(str(events))
    read.Reload()
    return read


def test_tensorboard_gets_everything_that_was_logged(trainer, events):
    logged = defaultdict(list)
    for entry in trainer.state.log_history:
        step = entry["step"]
        values = {name: value for name, value in entry.items() if name != "step"}
        for name, value in rewrite_logs(values).items():
            logged[name].append((step, pytest.approx(value, rel=1e-6)))
    received = {
        name: [(event.step, event.value) for event in events.Scalars(name)]
        for name in events.Tags()["scalars"]
    }
    assert received == logged
    for split in ("train", "eval"):
        for name in ("overall", "helpfulness", "honesty"):
            for metric in (*PER_CRITERION, f"{SPREAD}_std"):
                assert f"{split}/amopo/{name}/{metric}" in received


def test_tensorboards_charts_show_every_prompt(events):
    """Each of them matches the tags of all prompts, and together they match all that there are."""
    layout = Layout.FromString(tensor(events, "custom_scalars__config__"))
    tags = {tag for tag in events.Tags()["scalars"] if "/amopo/" in tag}
    seen = set()
    for category in layout.category:
        for chart in category.chart:
            (pattern,) = chart.multiline.tag
            found = {tag for tag in tags if re.match(pattern, tag)}
            assert len(found) == 3, pattern
            seen |= found
    assert seen == tags


def test_wandb_gets_everything_that_was_logged(trainer):
    last = {name: value for entry in trainer.state.log_history for name, value in entry.items()}
    last = {name: value for name, value in last.items() if name not in {"step", *SUMMARY}}
    summary = dict(wandb.run.summary)
    for name, value in rewrite_logs(last).items():
        assert summary[name] == pytest.approx(value), name


def test_settings_and_examples(trainer, events, folder):
    assert wandb.config["rl"] == "amopo" and wandb.config["rl_beta"] == 0.8
    assert wandb.config["amopo"]["gamma"] == 1.25 and "enabled" not in wandb.config["amopo"]
    settings = tensor(events, "amopo/text_summary").decode()
    assert "| amopo.gamma | 1.25 |" in settings

    lines = (folder / "out" / "_amopo_eval_table.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines][-2:]
    table = tensor(events, "eval/amopo_examples/text_summary", at=-1).decode()
    sent = wandb_table(folder, "amopo_examples")
    for row in rows:
        assert all(text in table for text in row["responses"])
        numbers = [row[f"honesty/{what}"] for what in ("margin", "weight", "prob", "accuracy")]
        cells = " | ".join("" if value is None else f"{value:.4g}" for value in numbers)
        assert f"| {cells} |" in table
        (same,) = [s for s in sent if (s["step"], s["example"]) == (row["step"], row["example"])]
        for name in row.keys() - {"responses"}:
            assert same[name] == pytest.approx(row[name]), name


def test_samples(events, folder):
    """One prompt under two settings, before the first step and at two evaluations."""
    lines = (folder / "out" / "_amopo_samples.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    sent = wandb_table(folder, "amopo_samples")
    assert len(rows) == len(sent) == 6
    for row in rows:
        (same,) = [s for s in sent if (s["step"], s["settings"]) == (row["step"], row["settings"])]
        assert same == pytest.approx(row)
    table = tensor(events, "eval/amopo_samples/text_summary", at=-1).decode()
    for row in rows[-2:]:
        assert (
            f"| {row['settings']} | {row['prompt']} |" in table and f"| {row['tokens']} |" in table
        )


def wandb_table(folder, name):
    files = sorted((folder / "wandb").glob(f"latest-run/files/media/table/eval/{name}*.json"))
    assert len(files) == 3  # before the first step too
    tables = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    return [dict(zip(t["columns"], row, strict=True)) for t in tables for row in t["data"]]


def tensor(events, tag, at=0):
    return events.Tensors(tag)[at].tensor_proto.string_val[0]


def test_a_tracker_that_fails_is_a_line_in_the_log(trainer, caplog, monkeypatch):
    monkeypatch.setattr(trainer.args, "report_to", ["tensorboard", "wandb"])
    monkeypatch.setattr(LOG.logger, "propagate", True)
    Trackers(trainer).table("late", [{"a": 1}], 9, "text")  # TensorBoard's writer is closed by now
    assert "tensorboard did not take table" in caplog.text and "Traceback" in caplog.text


def test_every_metric_is_described(trainer):
    logged = {key.removeprefix("eval_") for entry in trainer.state.log_history for key in entry}
    kinds = ("amopo/", "rewards/", "logps/", "terms/", "samples/")
    ours = {key for key in logged if key.startswith(kinds)}
    assert len(ours) > 3 * len(PER_CRITERION)
    for name in ours:
        described = re.sub("amopo/.+/", "amopo/<criterion>/", name)
        described = re.sub("samples/.+/", "samples/<settings>/", described)
        assert f"| `{described}` |" in METRICS, name
