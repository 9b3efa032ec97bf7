"""What a run leaves in its output folder beside the model (its log, its card, how to steer it), and
what of that is uploaded."""

import base64
import contextlib
import io
import json
import logging
import os
import re
import threading
from concurrent.futures import Future
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import axolotl.cli.config
import pytest
import runs
import transformers
from huggingface_hub import HfApi, ModelCard, ModelCardData
from huggingface_hub.utils import filter_repo_objects
from test_report import PROMPTS, run_of, written

from axolotl_amopo.config.block import AMoPOConfig
from axolotl_amopo.objectives import OBJECTIVES
from axolotl_amopo.steering.steering import Steering
from axolotl_amopo.training.card import TEMPLATE, card_contents
from axolotl_amopo.training.eval_table import FILE as TABLE
from axolotl_amopo.training.run_log import FILE
from axolotl_amopo.training.runs import read_run

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


UPLOAD_FOLDER = HfApi.upload_folder

# In the config below, each under a key or in an address that says so; and in a comment.
SECRET = "5ecret"


@pytest.fixture(scope="module")
def uploads():
    """By upload, in order: the content of the files that the hub would get, by their paths."""
    sent: list[dict[str, bytes]] = []

    def upload_folder(_, *, folder_path, ignore_patterns=None, run_as_future=False, **options):
        folder = Path(folder_path)
        files = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
        files = list(filter_repo_objects(files, ignore_patterns=ignore_patterns))
        sent.append({name: (folder / name).read_bytes() for name in files})
        done: Future = Future()
        done.set_result(None)
        return done

    def create_repo(_, repo_id, **options):
        return SimpleNamespace(repo_id=repo_id)

    with (
        mock.patch.object(HfApi, "upload_folder", upload_folder),
        mock.patch.object(HfApi, "create_repo", create_repo),
        mock.patch.dict(os.environ),  # axolotl hands keys of trackers on through it
    ):
        yield sent


@pytest.fixture(scope="module")
def logged():
    """What axolotl logs of the config: it goes to `debug.log` in the output folder."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger = axolotl.cli.config.LOG.logger
    logger.addHandler(handler)
    yield lines
    logger.removeHandler(handler)


@pytest.fixture(scope="module")
def printed():
    """Return what each run below prints."""
    return [io.StringIO(), io.StringIO()]


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_model, uploads, logged, printed):
    """Two steps with evaluations, then half a line as a killed run leaves it, then two more."""
    folder = tmp_path_factory.mktemp("run")
    data = runs.write_jsonl(folder / "data.jsonl", ROWS)
    test = runs.write_jsonl(folder / "test.jsonl", ROWS[:1])
    changes = {
        "amopo": {
            "dimensions": ["helpfulness", {"name": "honesty", "scale": [1, 6]}],
            "eval_table": 1,
        },
        "val_set_size": None,
        "test_datasets": [{"path": str(test), "type": "amopo.rated", "scale": [1, 5]}],
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "steps",
        "save_steps": 1,
        "hub_model_id": "someone/tiny",
        "use_tensorboard": True,
        "comet_api_key": f"key-{SECRET}",
        "model_kwargs": {"token": f"hf_{SECRET}"},
        "mlflow_tracking_uri": f"https://user:{SECRET}@localhost/?api_key={SECRET}",
    }
    path = runs.write_config(folder, runs.config(folder, tiny_model, data, max_steps=2, **changes))
    path.write_text(f"{path.read_text()}# wandb_api_key: {SECRET}\n")
    # With progress bars off, transformers' PrinterCallback takes `total_flos` out of the logs.
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    with contextlib.redirect_stdout(printed[0]):
        first = runs.train(path)
    transformers.logging.set_verbosity(level)
    with (folder / "out" / FILE).open("a") as file:
        file.write('{"step": 3, "lo')
    changes |= {"resume_from_checkpoint": str(folder / "out" / "checkpoint-1")}
    runs.write_config(folder, runs.config(folder, tiny_model, data, max_steps=3, **changes))
    before = (folder / "out" / FILE).read_text()
    with contextlib.redirect_stdout(printed[1]):
        return folder, before, first, runs.train(path)


def test_every_log_is_there(run):
    _, before, first, _ = run
    begin, chosen, *logged = [json.loads(line) for line in before.splitlines()[:-1]]
    assert begin["begin"] == 0 and chosen["step"] == 0
    assert chosen["run"]["sharing"] == first.choice._asdict()
    assert first.choice.layout == "packed"
    assert "total_flos" in logged[-1]
    assert len(logged) == len(first.state.log_history)
    for line, entry in zip(logged, first.state.log_history, strict=True):
        assert {name: value for name, value in line.items() if name != "time"} == entry
    assert any("eval_amopo/honesty/margin" in line for line in logged)


def test_the_console_has_a_line_for_each_of_them(run, printed):
    """Without progress bars and with them, and no dictionary of everything."""
    folder, _, *trainers = run
    state = json.loads((folder / "out" / "checkpoint-1" / "trainer_state.json").read_text())
    for output, trainer, before in zip(
        printed, trainers, (0, len(state["log_history"])), strict=True
    ):
        history, steps = trainer.state.log_history, trainer.state.max_steps
        lines = [line for line in output.getvalue().splitlines() if line.startswith("step ")]
        assert len(lines) == len(history) - before
        for line, entry in zip(lines, history[before:], strict=True):
            assert line.startswith(f"step {entry['step']}/{steps}")
            assert ("held out" in line) == ("eval_loss" in entry)
            for name in ("overall", "helpfulness", "honesty"):
                prefix = "eval_" * ("held out" in line)
                margin = entry.get(f"{prefix}amopo/{name}/margin")
                assert (f"{name}: margin" in line) == (margin is not None)
        assert "'loss'" not in output.getvalue() and "eval_" not in output.getvalue()
    first = next(e for e in trainers[0].state.log_history if "loss" in e)
    assert f"| loss {first['loss']:.4f} | learning rate 0.001 |" in printed[0].getvalue()
    assert "(" in printed[1].getvalue()  # changes since the run that was resumed


def test_what_was_trained(run, tiny_model):
    begin = entries_of(run)[0]["run"]
    assert begin["model"] == str(tiny_model) and begin["adapter"] is None
    assert begin["prompts"] == ["overall", "helpfulness", "honesty"]
    assert begin["amopo"]["gamma"] == 2.0 and "datasets" not in begin["amopo"]
    assert begin["max_steps"] == 2
    facts = begin["objective"]
    assert (facts["method"], facts["target_margin"], facts["reference"]) == ("AMoPO", 2.0, False)
    assert facts["settings"] == ["offset", "scalarization", "anchor", "contrast"]
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
    again, _, *logged = [json.loads(line) for line in text[len(before) + 1 :].splitlines()]
    assert again["begin"] == 1
    assert again["run"]["data"] == entries_of(run)[0]["run"]["data"]
    assert [line["step"] for line in logged if "loss" in line] == [2, 3]


def tables(card):
    """The Markdown tables of a card: for each, lines of cells, the head first."""
    blocks = re.findall(r"(?:^\|.*\|\n)+", card, re.MULTILINE)
    lines = (
        [[cell.strip() for cell in line.split("|")[1:-1]] for line in block.splitlines()]
        for block in blocks
    )
    return [[cells for cells in block if "---" not in cells] for block in lines]


def test_the_card_says_what_the_log_says(run, tiny_model):
    folder, *_, trainer = run
    card = ModelCard.load(folder / "out" / "README.md")
    assert "amopo" in card.data.tags and card.data.library_name
    dimensions, results, data, settings = tables(card.text)
    assert dimensions[1:] == [
        ["helpfulness", "", "1 to 5", "higher"],
        ["honesty", "", "1 to 6", "higher"],
    ]
    before, after = (
        next(e for e in history if "eval_amopo/overall/margin" in e)
        for history in (trainer.state.log_history, trainer.state.log_history[::-1])
    )
    assert before["step"] < after["step"]
    assert [line[0] for line in results[1:]] == ["overall", "helpfulness", "honesty"]
    for name, *cells in results[1:]:
        for i, (metric, form) in enumerate((("accuracy", "{:.1%}"), ("margin", "{:+.2f}"))):
            values = [e[f"eval_amopo/{name}/{metric}"] for e in (before, after)]
            small = [metric == "margin" and 0 < abs(value) < 0.095 for value in values]
            forms = ["{:+.2g}" if one else form for one in small]
            expected = [form.format(value) for form, value in zip(forms, values, strict=True)]
            assert cells[2 * i : 2 * i + 2] == expected
    assert [line[1:6] for line in data[1:]] == [
        ["train", "amopo.rated", "4", "4", str(len(trainer.train_dataset))],
        ["test", "amopo.rated", "1", "1", str(len(trainer.eval_dataset))],
    ]
    assert ["gamma", "2"] in settings and ["learning_rate", "0.001"] in settings
    assert f"They saw {len(trainer.eval_dataset)} held-out pairs" in card.text
    for line in (folder / "config.yml").read_text().splitlines():
        assert SECRET in line or line in card.text
    assert "axolotl 0.21" in card.text and "@inproceedings{liu-etal-2025-amopo" in card.text


# The hyperparameters of each objective that have an effect with its defaults.
KEYS = {
    "amopo": {"gamma", "weighting"},
    "simpo": {"gamma"},
    "dpo": {"length_normalised"},
    "ipo": {"length_normalised"},
    "mappo": {"form", "length_normalised", "gap_scale"},  # gamma is of its other form
    "modpo": {"train_on", "margin_scale", "pair_loss"},
    "lambda_dpo": {"temperature", "weighting", "concentration", "length_normalised"},
    "raco": {"length_normalised", "gradients"},
    "mgda": {"length_normalised", "gradients"},
    "mgda_decoupled": {"length_normalised", "gradients"},
    "cos_dpo": {"length_normalised", "weight_draws", "weight_concentration"},
    "ric": set(),
    "mrpo": {"alpha", "eta"},
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_card_of_every_objective(name, tmp_path):
    run = read_run(written(tmp_path / "run", run_of(objective=name)))
    facts = {"name": "data.jsonl", "split": "train", "type": "amopo.rated", "rows": 3}
    facts |= {"prompts": 3, "pairs": 3, "dropped": {}, "lower_is_better": []}
    facts["scales"] = {key: [1, 5] for key in PROMPTS[1:]}
    run.about |= {"data": [facts], "versions": {"torch": "2"}, "eval_examples": 90}
    config = AMoPOConfig(objective=name, dimensions=PROMPTS[1:])
    objective = config.make_objective()
    contents = card_contents(run, {"learning_rate": 1e-5}, config, objective)
    card = ModelCard.from_template(ModelCardData(), template_path=str(TEMPLATE), **contents).content

    paper, reference = objective.paper, "reference" in objective.needs
    assert f"by [{paper.name}]({paper.url}) (lora)" in card and paper.citation in card
    assert ("compared with the model as training found it" in card) == reference
    assert ("log-ratio to the reference" in card) == reference
    assert ("compares nothing" in card) == (name == "ric")
    assert ("90 held-out prompts" if name == "ric" else "400 held-out pairs") in card
    assert "The loss was" in card and "None" not in card and "\n\n\n" not in card
    _, results, _, settings = tables(card)
    assert results[0][1:2] == ["accuracy, before"]
    assert any("weight" in cell for cell in results[0]) == (name != "ric")
    given = dict(settings[1:])
    others = {"objective", "rl_beta", "winner", "pairs", "learning_rate", "weights", "reference"}
    others |= {"prompts", "rating_in_prompt", "group_by_prompt"}
    assert given.keys() - others == KEYS[name]
    assert (given["objective"], given["rl_beta"]) == (name, f"{objective.beta:.4g}")
    equal = "helpfulness 1, honesty 1, safety 1"
    assert given.get("weights") == (equal if "weights" in objective.needs else None)
    assert ("reference" in given) == reference
    # Steered by what stood in the prompts, if anything did.
    asked = {"amopo": "instruction of each dimension", "cos_dpo": "weights of the dimensions stand"}
    asked["ric"] = "name all the dimensions"
    assert asked.get(name, "have no instruction") in card
    assert ("axolotl amopo generate" in card) == (name in asked) == ("rating_in_prompt" in given)
    assert ('--dimension "helpfulness=0.7"' in card) == (name == "cos_dpo")


def test_a_card_of_the_users_stays(run, caplog):
    folder, *_, trainer = run
    path = folder / "out" / "README.md"
    path.write_text("# Ours\n" + path.read_text())
    trainer.create_model_card()  # still has the line that says who wrote it
    written = path.read_text()
    assert "# Ours" not in written
    path.write_text(re.sub("<!-- Written by.*-->", "Ours.", written))
    with caplog.at_level("WARNING"):
        trainer.create_model_card()
    assert path.read_text() == written.replace(re.search("<!-- W.*-->", written)[0], "Ours.")
    assert any("README.md" in line and "stays" in line for line in caplog.messages)


def test_an_evaluation_alone_writes_nothing(run):
    folder, *_, trainer = run
    before = (folder / "out" / FILE).read_text()
    trainer.evaluate()
    assert (folder / "out" / FILE).read_text() == before


class Hub(BaseHTTPRequestHandler):
    """The calls that huggingface_hub makes to commit a folder; keeps what it is sent."""

    token, cards, commits = "", [], []

    def do_POST(self):
        type(self).token = self.headers["Authorization"]
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/api/validate-yaml":
            self.cards.append(json.loads(body)["content"])
            self.answer({"errors": [], "warnings": []})
        elif self.path == "/api/models/someone/tiny/preupload/main":
            names = [file["path"] for file in json.loads(body)["files"]]
            plain = {"uploadMode": "regular", "shouldIgnore": False}
            self.answer({"files": [{"path": name, **plain} for name in names]})
        elif self.path == "/api/models/someone/tiny/commit/main":
            lines = [json.loads(line)["value"] for line in body.splitlines()]
            self.commits.append(lines[1:])
            url = f"http://{self.headers['Host']}/someone/tiny/commit/1"
            self.answer({"commitUrl": url, "commitOid": "1", "success": True})
        else:
            self.send_error(404)

    def answer(self, values):
        text = json.dumps(values).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_):
        pass


def test_the_hub_gets_the_model_with_its_card(run):
    """huggingface_hub itself sends it, to a stand-in of the hub's API."""
    folder, _, _, trainer = run
    with (
        ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server,
        mock.patch.object(HfApi, "upload_folder", UPLOAD_FOLDER),
        mock.patch.object(
            transformers.utils.hub.hf_api(), "endpoint", f"http://127.0.0.1:{server.server_port}"
        ),
        mock.patch("huggingface_hub.constants.HF_HUB_OFFLINE", False),
    ):
        threading.Thread(target=server.serve_forever, daemon=True).start()
        trainer.push_to_hub(token="hf_of-someone")
        server.shutdown()
    (files,) = Hub.commits
    sent = {file["path"]: base64.b64decode(file["content"]) for file in files}
    assert {"model.safetensors", "tokenizer.json", "amopo_steering.json"} < sent.keys()
    assert not [name for name in sent if name.startswith(("_", "checkpoint-"))]
    assert sent["README.md"] == (folder / "out" / "README.md").read_bytes()
    assert Hub.cards == [sent["README.md"].decode()]
    assert "amopo" in ModelCard(Hub.cards[0]).data.tags
    assert Hub.token == "Bearer hf_of-someone"


def test_what_is_uploaded(run, uploads, logged):
    """At each save and at the end: the model and what describes it; no secret, no held-out text."""
    folder, *_ = run
    heldout = [response["text"] for response in ROWS[0]["responses"]]
    assert len(uploads) == 2 + 1 + 2 + 1  # of the first run, and of the resumed one
    for files in uploads:
        assert {"model.safetensors", "config.json", "training_args.bin"} <= files.keys()
        for name, content in files.items():
            assert SECRET.encode() not in content, name
            assert not any(text.encode() in content for text in heldout), name
    assert {"README.md", "amopo_steering.json"} <= uploads[-1].keys()
    assert any(name.startswith("runs/") for name in uploads[-1])  # TensorBoard's

    assert heldout[0] in (folder / "out" / TABLE).read_text()
    for name in (FILE, "README.md"):
        text = (folder / "out" / name).read_text()
        assert SECRET not in text and "model_kwargs" in text and "(hidden)" in text
    configs = [line for line in logged if line.startswith("config:")]
    assert len(configs) == 2
    assert all(SECRET not in line and "https://(hidden)@localhost" in line for line in configs)
