"""The log that a run leaves in its output folder."""

import json

import pytest
import runs
import transformers

from axolotl_amopo.records import FILE
from axolotl_amopo.steering.steering import Steering

ROWS = [
    {
        "prompt": f"What is {i} and {i}?",
        "responses": [
            {"text": f"It is {2 * i}.", "scores": {"helpfulness": 5, "honesty": 4}},
            {"text": "Who knows?", "scores": {"helpfulness": 1, "honesty": 4 - i % 2}},
            {"text": "No.", "scores": {"helpfulness": 1, "honesty": 1}},
        ],
    }
    for i in range(4)
]


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_model):
    """Two steps with evaluations, then half a line as a killed run leaves it, then two more."""
    folder = tmp_path_factory.mktemp("run")
    data = runs.write_jsonl(folder / "data.jsonl", ROWS)
    test = runs.write_jsonl(folder / "test.jsonl", ROWS[:1])
    changes = {
        "amopo": {"dimensions": ["helpfulness", {"name": "honesty", "scale": [1, 6]}]},
        "val_set_size": None,
        "test_datasets": [{"path": str(test), "type": "amopo.rated", "scale": [1, 5]}],
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "steps",
        "save_steps": 1,
    }
    path = runs.write_config(folder, runs.config(folder, tiny_model, data, max_steps=2, **changes))
    # With progress bars off, transformers' PrinterCallback takes `total_flos` out of the logs.
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    first = runs.train(path)
    transformers.logging.set_verbosity(level)
    with (folder / "out" / FILE).open("a") as file:
        file.write('{"step": 3, "lo')
    changes |= {"resume_from_checkpoint": str(folder / "out" / "checkpoint-1")}
    runs.write_config(folder, runs.config(folder, tiny_model, data, max_steps=3, **changes))
    before = (folder / "out" / FILE).read_text()
    return folder, before, first, runs.train(path)


def test_every_log_is_there(run):
    _, before, first, _ = run
    begin, *logged = [json.loads(line) for line in before.splitlines()[:-1]]
    assert begin["begin"] == 0
    assert "total_flos" in logged[-1]
    assert len(logged) == len(first.state.log_history)
    for line, entry in zip(logged, first.state.log_history, strict=True):
        assert {name: value for name, value in line.items() if name != "time"} == entry
    assert any("eval_amopo/honesty/margin" in line for line in logged)


def test_what_was_trained(run, tiny_model):
    begin = entries_of(run)[0]["run"]
    assert begin["model"] == str(tiny_model) and begin["adapter"] is None
    assert begin["prompts"] == ["overall", "helpfulness", "honesty"]
    assert begin["amopo"]["gamma"] == 2.0 and "datasets" not in begin["amopo"]
    assert begin["max_steps"] == 2
    assert "rl: amopo" in begin["config"]
    assert {"axolotl", "axolotl-amopo"} < begin["versions"].keys()
    train, test = begin["data"]
    assert (train["split"], test["split"]) == ("train", "test")
    assert (train["rows"], train["prompts"], train["pairs"]) == (
        4,
        4,
        12 - sum(train["dropped"].values()),
    )
    assert begin["train_pairs"] == train["pairs"] and begin["eval_pairs"] == test["pairs"]
    assert train["scales"] == {"helpfulness": [1, 5], "honesty": [1, 6]}


def entries_of(run):
    return [json.loads(line) for line in run[1].splitlines()[:-1]]


def test_saved_models_can_be_steered(run):
    """The folder and each checkpoint, also of a run that had its data from the cache."""
    folder = run[0] / "out"
    for place in (folder, folder / "checkpoint-1", folder / "checkpoint-3"):
        steering = Steering.load(place)
        assert steering.dimension("honesty").scale == (1, 6)
        assert steering.dimension("helpfulness").scale == (1, 5)
        assert "4 of 5" in steering.instruction({"helpfulness": 4})


def test_a_resumed_run_goes_on_below(run):
    """It had the data from the cache, and says the same of them."""
    folder, before, *_ = run
    text = (folder / "out" / FILE).read_text()
    assert text.startswith(before + "\n")
    again, *logged = [json.loads(line) for line in text[len(before) + 1 :].splitlines()]
    assert again["begin"] == 1
    assert again["run"]["data"] == entries_of(run)[0]["run"]["data"]
    assert [line["step"] for line in logged if "loss" in line] == [2, 3]


def test_an_evaluation_alone_writes_nothing(run):
    folder, *_, trainer = run
    before = (folder / "out" / FILE).read_text()
    trainer.evaluate()
    assert (folder / "out" / FILE).read_text() == before
