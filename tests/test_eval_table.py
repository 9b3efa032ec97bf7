"""The table of single held-out examples, from real training runs."""

import json

import pytest
import runs
import torch
from transformers import AutoModelForCausalLM

from axolotl_amopo.config.block import AMoPOConfig
from axolotl_amopo.config.parse import parse_block
from axolotl_amopo.errors import ConfigError
from axolotl_amopo.example import Example
from axolotl_amopo.training.eval_table import FILE, LONGEST

PROMPTS = ["overall", "helpfulness", "honesty"]
BLOCK = {
    "dimensions": PROMPTS[1:],
    "winner": "per_dimension",
    "rating_in_prompt": "none",
    "missing_ratings": "mask",
}


def response(text, helpfulness, honesty):
    return {"text": text, "scores": {"helpfulness": helpfulness, "honesty": honesty}}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Six pairs of different lengths. The dimensions disagree on the first; honesty is a tie on the
    third and unrated on the fourth."""
    rows = [
        {
            "prompt": f"What is {i} and {i}?" + " Please." * (7 * i % 5),
            "responses": [response(f"It is {2 * i}.", 5, 2), response("Who knows?", 1, 4)],
        }
        for i in range(6)
    ]
    rows[2]["responses"][0]["scores"]["honesty"] = 4
    del rows[3]["responses"][0]["scores"]["honesty"]
    rows[4]["responses"][0]["text"] += " word" * (LONGEST // 4) + " the end"
    return runs.write_jsonl(tmp_path_factory.mktemp("data") / "data.jsonl", rows)


def settings(folder, model, data, *, block=None, **changes):
    folder.mkdir(exist_ok=True)
    changes = {
        "amopo": BLOCK | {"eval_table": 5} | (block or {}),
        "val_set_size": None,
        "test_datasets": [{"path": str(data), "type": "amopo.rated", "scale": [1, 5]}],
        "eval_strategy": "steps",
        "eval_steps": 2,
        "eval_batch_size": 2,
        "max_steps": 2,
        "sequence_len": 2048,
    } | changes
    return runs.write_config(folder, runs.config(folder, model, data, **changes))


def table(folder):
    return [json.loads(line) for line in (folder / "out" / FILE).read_text().splitlines()]


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_model, data):
    """Two evaluations of an untouched model, which take the rows by length, not in their order."""
    folder = tmp_path_factory.mktemp("run")
    changes = {"learning_rate": 0.0, "group_by_length": True}
    trainer = runs.train(settings(folder, tiny_model, data, **changes))
    return folder, trainer, table(folder)


def test_the_first_rows_at_each_evaluation(run):
    _, trainer, rows = run
    assert [(row["step"], row["example"]) for row in rows] == [
        (step, example) for step in (0, 2) for example in range(5)
    ]
    decode = trainer.processing_class.decode
    for row, prepared in zip(rows[:5], trainer.eval_dataset, strict=False):
        question = decode(prepared["prompt_ids"][0], skip_special_tokens=True)
        assert row["prompt"] == question.strip() and "What is" in question
        assert len(row["responses"]) == 2
    texts = {text for row in rows for text in row["responses"]}
    assert {"Who knows?", "It is 0."} < texts or {"Who knows?", "It is 2."} < texts
    (long,) = {text for text in texts if len(text) > 20}
    assert long.startswith("It is 8. word") and long.endswith("the end")
    assert len(long) == LONGEST + len(" [...] ")


def test_who_should_win(run):
    """The response with the higher overall rating stands first."""
    for row in run[2]:
        first, second = ("Who knows?" in text for text in row["responses"])
        assert (first, second) == (False, True)
        assert row["overall/winner"] == row["helpfulness/winner"] == "1>2"
        silent = any(f"What is {i} and" in row["prompt"] for i in (2, 3))
        assert row["honesty/winner"] == (None if silent else "2>1")
        for metric in ("margin", "weight", "prob", "accuracy"):
            assert (row[f"honesty/{metric}"] is None) == silent
    assert any(row["honesty/winner"] is None for row in run[2])


def test_the_numbers_are_the_models_own(run, tiny_model):
    """From plain forward passes of each sequence."""
    _, trainer, rows = run
    model = AutoModelForCausalLM.from_pretrained(tiny_model)

    def token_logps(prompt, answer):
        with torch.no_grad():
            logps = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
        return logps[len(prompt) - 1 : -1].gather(-1, torch.tensor(answer)[:, None])[:, 0]

    for row, prepared in zip(rows[5:], trainer.eval_dataset, strict=False):
        scores, seen = [], [name for name in PROMPTS if row[f"{name}/winner"]]
        for k, name in enumerate(PROMPTS):
            if name not in seen:
                continue
            order = [int(number) - 1 for number in row[f"{name}/winner"].split(">")]
            example = Example.from_row(prepared)
            texts = example.follows[example.reads[0][k]]
            sides = [token_logps(example.prompts[texts[i]], example.responses[i]) for i in order]
            margin = 0.8 * float(sides[0].mean() - sides[1].mean())
            probs = [float(side.exp().mean()) for side in sides]
            scores.append(sum(probs))
            assert row[f"{name}/margin"] == pytest.approx(margin, abs=1e-5)
            assert row[f"{name}/accuracy"] == (margin > 0)
            assert row[f"{name}/prob"] == pytest.approx(sum(probs) / 2, abs=1e-6)
        for name, weight in zip(seen, torch.tensor(scores).softmax(0).tolist(), strict=True):
            assert row[f"{name}/weight"] == pytest.approx(weight, abs=1e-6)


def test_an_evaluation_alone_writes_nothing(run):
    folder, trainer, rows = run
    trainer.evaluate()
    assert table(folder) == rows


def test_a_resumed_run_goes_on_below(tmp_path, tiny_model, data):
    more = {"save_strategy": "steps", "save_steps": 2}
    runs.train(settings(tmp_path, tiny_model, data, block={"eval_table": 1}, **more))
    more |= {"resume_from_checkpoint": str(tmp_path / "out" / "checkpoint-2"), "max_steps": 4}
    more |= {"num_epochs": 2}
    runs.train(settings(tmp_path, tiny_model, data, block={"eval_table": 1}, **more))
    # axolotl evaluates at the start of every training.
    assert [row["step"] for row in table(tmp_path)] == [0, 2, 2, 4]


def test_off_by_default(run, tiny_model, data):
    """And turning it on prepares nothing anew."""
    folder, *_ = run
    changes = {"output_dir": str(folder / "without"), "group_by_length": True}
    trainer = runs.train(settings(folder, tiny_model, data, block={"eval_table": 0}, **changes))
    assert not (folder / "without" / FILE).exists()
    assert trainer.evaluated == {}
    assert len([path for path in (folder / "prepared").iterdir() if path.is_dir()]) == 2


def test_groups(tmp_path, tiny_model):
    """Three responses are three pairs; the numbers are means, as in the metrics."""
    answers = [response("It is 4.", 5, 1), response("Four.", 3, 2), response("Ask me not.", 1, 3)]
    answers[2]["scores"]["honesty"] = 2
    rows = [{"prompt": "What is 2 and 2?", "responses": answers}]
    data = runs.write_jsonl(tmp_path / "data.jsonl", rows)
    block = {"group_by_prompt": True, "order_by": "helpfulness", "eval_table": 9}
    config = settings(tmp_path, tiny_model, data, block=block, max_steps=1, eval_steps=1)
    trainer = runs.train(config)
    *_, row = table(tmp_path)
    assert row["responses"] == ["It is 4.", "Four.", "Ask me not."]
    assert row["helpfulness/winner"] == "1>2, 1>3, 2>3"
    assert row["honesty/winner"] == "2>1, 3>1"
    evaluation = [e for e in trainer.state.log_history if "eval_loss" in e][-1]
    for name in PROMPTS:
        for metric in ("margin", "weight", "prob", "accuracy"):
            logged = evaluation[f"eval_amopo/{name}/{metric}"]
            assert row[f"{name}/{metric}"] == pytest.approx(logged, abs=1e-6)


def test_two_processes_equal_one(run, tmp_path, tiny_model, data, forks):
    """Of six rows in batches of two, each process sees some of the first five."""
    changes = {"learning_rate": 0.0, "micro_batch_size": 1, "dataloader_pin_memory": False}
    config = settings(tmp_path, tiny_model, data, **changes)
    forks(2, tmp_path, "parallel_worker", "train", "ddp", str(config), str(tmp_path))
    rows = table(tmp_path)
    assert len(rows) == 10
    for one, two in zip(run[2], rows, strict=True):
        responses = one["responses"]
        assert two.pop("responses") == responses
        assert two | {"responses": 0} == pytest.approx(one | {"responses": 0}, abs=1e-5)


def test_a_negative_number_is_refused():
    with pytest.raises(ConfigError, match=r"amopo\.eval_table: .*greater than or equal to 0"):
        parse_block(AMoPOConfig, {"eval_table": -1}, "amopo")
