"""`axolotl amopo init`: the format it finds, its numbers by hand, and YAML that `inspect` takes."""

import json
import re
import subprocess
import sys

import pytest
import yaml
from click.testing import CliRunner
from datasets import Dataset, DatasetDict
from runs import ROOT, write_jsonl
from transformers import LlamaConfig

from axolotl_amopo.commands import amopo
from axolotl_amopo.commands.init import command, write
from axolotl_amopo.commands.init.look import look
from axolotl_amopo.commands.init.write import choose_training, config_text, objective
from axolotl_amopo.commands.inspect.gather import gather
from axolotl_amopo.commands.plan.cards import CARDS, Card
from axolotl_amopo.commands.plan.load import plan_config
from axolotl_amopo.config.datasets import formats
from axolotl_amopo.data.detect import detect

PAGE = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
BESIDE = "other"  # of formats with one response per row, a second row of each prompt
SECOND = {
    "helpsteer": {"response": BESIDE, "helpfulness": 1, "correctness": 1, "coherence": 2},
    "beavertails": {
        "response": BESIDE,
        "is_safe": False,
        "category": {"privacy_violation": True, "self_harm": False},
    },
}
PREFERRED = {"prompt": "What is C#?", "chosen": "A language.", "rejected": "A note."}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Let paths that a config names, such as its output_dir, lie in a folder of the test."""
    monkeypatch.chdir(tmp_path)


def page_rows():
    """The type and a row of every format of docs/data.md."""
    found = re.findall(r"```yaml\n(.*?)```\n\n```json\n(.*?)```", PAGE, re.DOTALL)
    for text, rows in found:
        (entry,) = yaml.safe_load(text)["datasets"]
        for row in rows.strip().splitlines():
            yield entry["type"], json.loads(row)


def more(kind, row, count=10):
    """Rows like this one, each prompt another."""
    others = [row, *([row | SECOND[kind]] if kind in SECOND else [])]
    for i in range(count):
        for other in others:
            text = json.dumps(other).replace("?", f" in {i}?").replace("article", f"article {i}")
            yield json.loads(text)


def run(*arguments, **options):
    return CliRunner().invoke(amopo, ["init", *map(str, arguments)], **options)


CASES = [*page_rows(), ("amopo.pairs", PREFERRED)]


@pytest.mark.parametrize(("kind", "row"), CASES, ids=[f"{k}-{i}" for i, (k, _) in enumerate(CASES)])
def test_the_yaml_of_every_format_is_taken(kind, row, tmp_path, tiny_model):
    data = write_jsonl(tmp_path / "data.jsonl", list(more(kind.removeprefix("amopo."), row)))
    output = tmp_path / "made.yml"
    done = run(data, "--model", tiny_model, "--gpu", "cpu", "--output", output, "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["fit"]["type"] == kind
    report = gather(str(output), rows=0)
    assert report.train_rows and report.eval_rows and not report.shared_prompts
    assert {entry.split for entry in report.entries} == {"train", "test"}
    # axolotl's default is no evaluation, whatever is held out.
    assert yaml.safe_load(output.read_text(encoding="utf-8"))["eval_strategy"] == "epoch"


def test_every_format_is_tried():
    assert {kind for kind, _ in CASES} == set(formats())


SHARED = [
    ("crowdrag25/rated", 7, "per_dimension"),
    ("helpsteer_sample/nvidia_HelpSteer_sample", 5, "per_dimension"),
    ("helpsteer_sample/rated", 5, "per_dimension"),
    ("pku_saferlhf_sample/rated", 4, "per_dimension"),
    ("structural_simplicity/rated", 4, "per_dimension"),
    ("summeval/rated", 4, "per_dimension"),
    ("webnlg2020/rated", 5, "per_dimension"),
]


@pytest.mark.parametrize(("name", "dimensions", "winner"), SHARED)
def test_real_data(name, dimensions, winner, shared, tmp_path, tiny_model):
    lines = (shared / "data" / f"{name}.jsonl").read_text(encoding="utf-8").split("\n")[:30]
    rows = [json.loads(line) for line in lines]
    rows = [
        row | ({"responses": row["responses"][:3]} if "responses" in row else {}) for row in rows
    ]
    data = write_jsonl(tmp_path / "data.jsonl", rows)
    output = tmp_path / "made.yml"
    done = run(data, "--model", tiny_model, "--gpu", "cpu", "--output", output)
    assert done.exit_code == 0, done.output
    values = yaml.safe_load(output.read_text(encoding="utf-8"))
    assert values["amopo"]["winner"] == winner and len(values["amopo"]["dimensions"]) == dimensions
    report = gather(str(output), rows=0)
    assert report.eval_rows and not report.shared_prompts
    assert not any("longer than" in warning for warning in report.warnings)


def rated(prompt, *answers):
    names = ("quality", "harm", "taste", "same")
    scored = [dict(zip(names, scores, strict=True)) for scores in answers]
    answers = [{"text": f"{prompt} {i}", "scores": s} for i, s in enumerate(scored)]
    return {"prompt": prompt, "responses": answers}


def test_numbers_by_hand(tmp_path):
    """Two pairs: quality and harm (lower is better) disagree in one; taste is missing once."""
    rows = [
        rated("abc", (5, 0.5, 3, 7), (2, 0.25, 5, 7)),
        rated("abcde", (4, 0.25, None, 7), (1, 1, 2, 7)),
        rated("", (4, 1, 2, 7), (1, 1, 2, 7)),
        *[rated(f"tie {i}", (1, 1, 2, 7), (1, 1, 2, 7)) for i in range(3)],
    ]
    found = look(str(write_jsonl(tmp_path / "d.jsonl", rows)))
    assert [(d.name, d.scale, d.lower, d.known) for d in found.dimensions] == [
        ("quality", (1, 5), False, False),
        ("harm", (0, 1), True, False),
        ("taste", (1, 5), False, False),  # 2 to 5, beside one that ends alike
    ]
    assert found.constant == ["same"]
    assert (found.rows, found.prompts, found.responses, found.pairs) == (6, 5, 10, 5)
    assert (found.missing, found.bad) == (1, 1) and "row 3, key 'prompt': is empty" in found.bad_row
    shares = {frozenset(pair): share for *pair, share in found.conflicts}
    assert shares == {
        frozenset(("quality", "harm")): 0.5,
        frozenset(("quality", "taste")): 1,
        frozenset(("harm", "taste")): 0,
    }
    assert found.disagree == 0.2 and found.winner == "per_dimension"
    assert found.tokens["longest"] == int((len("abcde") + 1 + len("abcde 0")) / 4) + 1
    kind, why = objective(found)
    assert kind == "amopo" and "cos_dpo" in why and "quality" in why
    assert objective(look(found.path, dimensions=["quality"]))[0] == "simpo"


def one_response(prompts):
    scores = ({"helpfulness": 1, "coherence": 0}, {"helpfulness": 3, "coherence": 4})
    return [
        {"prompt": f"p{p}", "response": f"r{i}", **scores[i % 2]} for i, p in enumerate(prompts)
    ]


def test_a_cut_between_rows_keeps_prompts_apart(tmp_path, tiny_model):
    """Prompts of three rows: the cut that is nearest to a tenth and between two of them."""
    found = look(str(write_jsonl(tmp_path / "d.jsonl", one_response(i // 3 for i in range(40)))))
    assert (found.split, found.held_out, found.scattered) == ("train[:36]", "train[36:]", False)
    scattered = write_jsonl(tmp_path / "s.jsonl", one_response(i % 15 for i in range(60)))
    found = look(str(scattered))
    assert (found.split, found.held_out, found.scattered) == ("train", None, True)
    output = tmp_path / "made.yml"
    done = run(scattered, "--model", tiny_model, "--gpu", "cpu", "--output", output)
    assert done.exit_code == 0, done.output
    report = gather(str(output), rows=0)
    assert report.eval_rows and not report.shared_prompts
    rows = [rated(f"p{i % 28}", (1, 0, 1, 1), (2, 0, 3, 3)) for i in range(30)]
    found = look(str(write_jsonl(tmp_path / "r.jsonl", rows)))
    assert (found.split, found.shared_prompts) == ("train[:27]", 2)


def test_of_too_few_prompts_none_are_held_out(tmp_path, tiny_model):
    """axolotl refuses `eval_strategy` where nothing is held out."""
    data = write_jsonl(tmp_path / "few.jsonl", [rated("p", (1, 0, 1, 1), (2, 0, 3, 3))])
    output = tmp_path / "made.yml"
    done = run(data, "--model", tiny_model, "--gpu", "cpu", "--output", output)
    assert done.exit_code == 0, done.output
    assert not gather(str(output), rows=0).eval_rows


def test_splits_of_a_folder_are_used(tmp_path):
    rows = one_response(i // 2 for i in range(8))
    wider = [rows[0] | {"helpfulness": 4}, rows[1]]
    folder = tmp_path / "files"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", rows)
    write_jsonl(folder / "validation.jsonl", wider)
    found = look(str(folder))
    assert (found.split, found.held_out, found.rows) == ("train", "validation", 8)
    assert found.dimensions[0].span == (1, 4)
    saved = tmp_path / "saved"
    DatasetDict(train_sft=Dataset.from_list(rows), other=Dataset.from_list(wider)).save_to_disk(
        saved
    )
    found = look(str(saved))
    assert (found.split, found.held_out, found.scattered) == ("train_sft", None, True)
    assert look(str(saved), split="other").rows == 2


def test_other_names_and_shapes():
    def best(row, count=20):
        fit = detect([json.loads(json.dumps(row).replace("%", str(i))) for i in range(count)], "d")[
            0
        ]
        return fit.type, fit.options, fit.dimensions, fit.fill_in

    row = {"question": "q%", "answer": "a%", "score": 3, "row_id": "%"}
    fields = {"prompt": "question", "response": "answer"}
    assert best(row) == ("amopo.helpsteer", {"fields": fields}, ["score"], [])
    row = {"id": 7, "task": "A task, %", "model_a_output": "x%", "model_b_output": "y%"}
    row |= {"model_a_help": 1, "model_b_help": 2, "model_a_tone": "3", "model_b_tone": "4"}
    sides = [
        {"text": f"model_{s}_output", "help": f"model_{s}_help", "tone": f"model_{s}_tone"}
        for s in "ab"
    ]
    kind, options, dimensions, fill_in = best(row)
    assert (kind, dimensions, fill_in) == ("amopo.user_defined", ["help", "tone"], [])
    assert options == {"fields": {"prompt": "task"}, "responses": sides}
    row = {"prompt": "q%", "tries": [{"said": f"{x}%", "by": {"me": 1, "you": 2}} for x in "xyz"]}
    fields = {"responses": "tries", "text": "said", "me": "by.me", "you": "by.you"}
    assert best(row) == ("amopo.user_defined", {"fields": fields}, ["me", "you"], [])
    *_, fill_in = best({"prompt": "q%", "left": "x%", "right": "y%"})
    assert fill_in == ["a path for each response's ratings: the rows seem to have none"]


def test_what_fits_nothing_is_to_be_filled_in(tmp_path):
    data = write_jsonl(tmp_path / "d.jsonl", [{"number": 3, "other": [1.5]}])
    output = tmp_path / "made.yml"
    done = run(data, "--gpu", "cpu", "--output", output)
    assert done.exit_code == 3 and "To fill in: responses: the path" in done.output
    text = output.read_text(encoding="utf-8")
    (entry,) = yaml.safe_load(text)["datasets"]
    assert entry["type"] == "amopo.user_defined" and entry["responses"][0]["text"] == "FILL_IN"
    assert "# other.0: 1.5" in text and "&" not in text


def test_what_fits_the_gpu(tmp_path, monkeypatch):
    """LoRA where it fits, QLoRA where a byte is missing for it, and a word where neither does."""
    sizes = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 1}
    LlamaConfig(vocab_size=512, **sizes).save_pretrained(tmp_path / "wide")
    found = look(str(write_jsonl(tmp_path / "d.jsonl", one_response(i // 2 for i in range(8)))))
    training = choose_training(found, str(tmp_path / "wide"), "h100-80gb")
    assert (training.adapter, training.gpu) == ("lora", True)
    assert re.fullmatch(r"\d\.\d of 79.1 GiB on h100-80gb, by axolotl amopo plan", training.why)

    path = tmp_path / "made.yml"
    path.write_text(config_text(found, training), encoding="utf-8")
    needed = plan_config(str(path), gpu="h100-80gb", with_advice=False)[0].total
    monkeypatch.setitem(CARDS, "short", Card("short", needed - 1, 100))
    monkeypatch.setattr(write, "MODELS", (training.model,))
    assert choose_training(found, None, "short").adapter == "qlora"
    monkeypatch.setitem(CARDS, "none", Card("none", 1, 100))
    assert choose_training(found, None, "none").why.startswith("does not fit")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["{}/none.jsonl"], "there is no file or folder"),
        (["{}/empty.jsonl"], "is empty: no rows to train on"),
        (["{}/text.txt"], "is text, not JSONL, JSON, Parquet or CSV"),
        (["{}/picture.png"], "is no JSONL, JSON, Parquet or CSV file"),
        (["{}/data.jsonl", "--output", "{}/data.jsonl"], "is there already"),
        (["{}/data.jsonl", "--gpu", "h100-80g"], "Did you mean 'h100-80gb'"),
        (["{}/data.jsonl", "--type", "amopo.rates"], "Did you mean 'amopo.rated'"),
        (["{}/data.jsonl", "--type", "amopo.rated"], "row 1, key 'responses': is missing"),
        (["{}/data.jsonl", "--dimensions", "coherenc"], "Did you mean 'coherence'"),
        (["{}/data.jsonl", "--split", "test"], "has no splits"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_errors_are_one_sentence(arguments, said, tmp_path):
    write_jsonl(tmp_path / "data.jsonl", one_response([1, 1]))
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "text.txt").write_text("a\n")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0")
    before = sorted(tmp_path.iterdir())
    output = [] if "--output" in arguments else ["--output", "{}/made.yml"]
    done = run(*(argument.format(tmp_path) for argument in [*arguments, *output]))
    assert done.exit_code == 1 and said in done.output, done.output
    assert "Traceback" not in done.output and sorted(tmp_path.iterdir()) == before


def test_a_terminal_is_asked(tmp_path, tiny_model, monkeypatch):
    rows = list(more("beavertails", dict(page_rows())["amopo.beavertails"]))
    data = write_jsonl(tmp_path / "d.jsonl", rows)
    monkeypatch.setattr(command, "on_terminal", lambda: True)
    answers = [tmp_path / "asked.yml", "amopo.helpsteer", "is_safe", "cpu", tiny_model]
    done = run(data, input="".join(f"{answer}\n" for answer in answers))
    assert done.exit_code == 0, done.output
    values = yaml.safe_load((tmp_path / "asked.yml").read_text(encoding="utf-8"))
    assert values["datasets"][0]["type"] == "amopo.helpsteer"
    dimensions = [{"name": "is_safe", "scale": [0, 1]}]  # yes and no are no 0 to 4
    assert values["amopo"] == {"objective": "simpo", "dimensions": dimensions}
    assert values["base_model"] == str(tiny_model)


def test_its_help_imports_no_torch():
    code = (
        "import sys\nfrom axolotl_amopo.commands import amopo\n"
        "amopo(['init', '--help'], standalone_mode=False)\n"
        "assert not {'torch', 'transformers', 'datasets', 'numpy'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "rtx-4090-24gb" in done.stdout, done.stderr
