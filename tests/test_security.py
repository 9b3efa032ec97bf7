"""Attack with hostile data, models and files; SECURITY.md names these tests."""

import ast
import io
import json
import pickle
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import runs
import yaml
from axolotl.utils.dict import DictDefault
from jinja2.exceptions import SecurityError
from matplotlib.figure import Figure
from rich.text import Text

from axolotl_amopo.commands.compare.comparison import read_comparison
from axolotl_amopo.commands.init.look import look
from axolotl_amopo.commands.init.write import Training, config_text
from axolotl_amopo.commands.kit.models import find_model, load_model
from axolotl_amopo.commands.kit.plots import svg_element
from axolotl_amopo.commands.kit.policy import load_policy
from axolotl_amopo.commands.kit.text import plain_table, terminal
from axolotl_amopo.config.dimensions import Dimension
from axolotl_amopo.data.rows import Row, Source
from axolotl_amopo.data.tokenizer import ChatTokenizer
from axolotl_amopo.errors import CONTROL, AMoPOError, DataError, visible
from axolotl_amopo.raters.reward_model import RewardModelRater
from axolotl_amopo.steering.steering import FILE, SteeredDimension, Steering

# Clears the screen, sets a title, a C1 code, and a carriage return over what stands there.
COMMANDS = "a\x1b[2J\x1b]0;owned\x07\x9b31m\rb\x00\x08"
# Ends of lines by YAML, each with what would be a key behind it.
KEYS = [f"good{end}plugins: [evil]{end}#" for end in ("\n", "\r", "\x85", "\u2028", "\u2029")]


class Code:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.fixture
def trap(tmp_path):
    """The file that hostile code would make, which is not there when the test ends."""
    path = tmp_path / "trap"
    pickle.loads(pickle.dumps(Code(path)))
    assert path.exists()  # it does work
    path.unlink()
    yield path
    assert not path.exists()


# The terminal.


def test_what_is_printed_commands_no_terminal(capsys):
    for colours in (False, True):
        console = terminal(colours=colours)
        table = plain_table()
        table.add_column(COMMANDS)
        table.add_row(Text(COMMANDS, style="red"))
        console.rule(Text(COMMANDS))
        console.print(table, f"[bold]{COMMANDS}[/]")
        printed = capsys.readouterr().out
        assert "\\x1b]0;owned" in printed and "\\x9b31m" in printed
        own = re.sub(r"\x1b\[[\d;]*m", "", printed)  # rich's colours
        assert (own != printed) == colours
        assert not CONTROL.search(own)


def test_an_error_commands_no_terminal():
    source = Source("data.jsonl", ["help"], {"help": None})
    row = Row({f"key{COMMANDS}": 1, "help": "x"}, 1, source)
    for problem in (lambda: row.get("prompt"), row.ratings):
        with pytest.raises(DataError) as error:
            problem()
        assert not CONTROL.search(str(error.value))
    assert str(AMoPOError("one\ttwo\r\nthree é“")) == "one\ttwo\r\nthree é“"
    assert visible("\x7f") == "\\x7f"


def test_a_dimension_is_named_in_a_line():
    for name in (*KEYS, COMMANDS):
        with pytest.raises(ValueError, match="must be one line"):
            Dimension(name=name)
    assert Dimension(name="می\u200cکند").name


# The config that `init` writes.


def rated(prompt, *names, **fields):
    texts = ("one", 4), ("two", 2)
    responses = [{"text": t, "scores": dict.fromkeys(names, s)} for t, s in texts]
    return {"prompt": prompt, "responses": responses} | fields


def keys_of(found):
    text = config_text(found, Training("a/model", "lora", False, f"why {COMMANDS}"))
    values = yaml.safe_load(text)  # control characters are no YAML
    return list(values), values


def test_names_in_the_data_write_no_keys(tmp_path):
    rows = [rated(f"{i}?", "good", "bad", *KEYS, COMMANDS) for i in range(10)]
    found = look(str(runs.write_jsonl(tmp_path / "rated.jsonl", rows)))
    assert found.fit.dimensions == ["good", "bad"]
    expected, _ = keys_of(found)
    assert "plugins" not in expected
    for name in (*KEYS, COMMANDS):
        hostile = replace(
            found,
            fit=replace(found.fit, dimensions=[name]),
            runners_up=[name],
            dimensions=[replace(found.dimensions[0], name=name), found.dimensions[1]],
            constant=[name],
            conflicts=[(name, name, 1.0)],
            disagree=1.0,
            bad=1,
            bad_row=name,
        )
        keys, values = keys_of(hostile)
        assert keys == expected
        assert values["amopo"]["dimensions"][0]["name"] == name


def test_fields_of_the_data_write_no_keys(tmp_path):
    """Show what rows that fit nothing hold in comments."""
    found = look(str(runs.write_jsonl(tmp_path / "odd.jsonl", [{"one": "some text"}] * 3)))
    assert found.fit.fill_in and found.sample
    hostile = replace(found, sample=[f"{key}: some text" for key in (*KEYS, COMMANDS)])
    assert keys_of(hostile)[0] == keys_of(found)[0]


# Pages. That whole pages escape texts is in test_inspect.py, test_report.py and test_score.py.


def test_a_name_in_a_drawing_is_text():
    figure = Figure()
    axes = figure.subplots()
    axes.plot([0, 1], label="</text><script>alert(1)</script>")
    axes.set_title('<image href="https://example.org">-->')
    axes.legend()
    drawn = svg_element(figure)
    assert "<script" not in drawn and "example.org" in drawn
    assert not re.search(r"<image\b|-->.*-->", re.sub(r"<!--.*?-->", "", drawn))


# Data.


@pytest.mark.parametrize("kind", ["file", "folder", "script"])
def test_data_runs_no_code(kind, tmp_path, trap):
    folder = tmp_path / "data"
    folder.mkdir()
    if kind == "script":
        (folder / "data.py").write_text(f"open({str(trap)!r}, 'w')\n")
        runs.write_jsonl(folder / "rows.jsonl", [rated("Why?", "good")])
    else:
        (folder / "rows.pkl").write_bytes(pickle.dumps(Code(trap)))
    with pytest.raises(AMoPOError):
        look(str(folder / "rows.pkl" if kind == "file" else folder))


# Models.


def hostile_model(kind: str, tiny_model: Path, folder: Path, trap: Path) -> Path:
    """Return a folder with code in it, where a model's folder may have some."""
    import torch

    weights = {"weight": Code(trap)}
    if kind == "adapter":
        folder.mkdir()
        about = {"peft_type": "LORA", "base_model_name_or_path": str(tiny_model), "r": 4}
        about["target_modules"] = ["q_proj"]
        (folder / "adapter_config.json").write_text(json.dumps(about))
        torch.save(weights, folder / "adapter_model.bin")
        return folder
    shutil.copytree(tiny_model, folder)
    if kind == "weights":
        (folder / "model.safetensors").unlink()
        torch.save(weights, folder / "pytorch_model.bin")
        return folder
    about = json.loads((folder / "config.json").read_text())
    about |= {"model_type": "ours", "auto_map": {"AutoConfig": "code.Config"}}
    about["auto_map"]["AutoModelForCausalLM"] = "code.Model"
    (folder / "config.json").write_text(json.dumps(about))
    (folder / "code.py").write_text(f"open({str(trap)!r}, 'w')\n")
    return folder


@pytest.mark.parametrize("by", ["generate", "score", "rate"])
@pytest.mark.parametrize("kind", ["adapter", "weights", "code"])
def test_a_model_runs_no_code(kind, by, tiny_model, tokenizer, tmp_path, trap, monkeypatch):
    """Load it as `generate`, `chat` and `template` do, as `score` and `compare`, and as `rate`.

    Without a terminal nobody can say that it may.
    """
    monkeypatch.setattr("sys.stdin", io.StringIO())
    folder = hostile_model(kind, tiny_model, tmp_path / "model", trap)
    with pytest.raises(AMoPOError, match="can't be loaded"):
        if by == "generate":
            load_model(find_model(str(folder)))
        elif by == "rate":
            RewardModelRater(str(folder), [], {}).prepare()
        else:
            load_policy(DictDefault(base_model=str(tiny_model)), tokenizer, str(folder))


def test_a_chat_template_runs_no_code(tokenizer, trap):
    """It comes with a model, and transformers renders it in its sandbox."""
    template = f"{{{{ cycler.__init__.__globals__.os.system('touch {trap}') }}}}"
    with pytest.raises(SecurityError):
        ChatTokenizer(tokenizer, template, {}).prompt_ids([{"role": "user", "content": "Why?"}])


# Steering files, and those of `compare`.


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ cycler.__init__.__globals__.os.system('touch TRAP') }}",
        "{% endmacro %}{{ messages }}{% macro other() %}",
        "{% include '/etc/passwd' %}",
    ],
)
def test_a_hostile_steering_file_is_refused(template, tmp_path, trap):
    dimensions = [SteeredDimension(name="help", scale=(1, 5))]
    made = Steering(prompts=["help"], dimensions=dimensions, template="a", overall_template="")
    values = json.loads(made.save(tmp_path).read_text())
    assert Steering.load(tmp_path) == made
    values["instruction"] = template.replace("TRAP", str(trap))
    (tmp_path / FILE).write_text(json.dumps(values))
    with pytest.raises(AMoPOError, match=r"is broken .*Jinja"):
        Steering.load(tmp_path)


@pytest.mark.parametrize("name", ["../away", "/away", "a/../../away", "..", "a\n", ""])
def test_a_run_of_compare_stays_in_its_folder(name, tmp_path):
    values = {"base": "base.yml", "variants": {name: {}}, "baseline": name, "output": "out"}
    with pytest.raises(AMoPOError, match=r"variants"):
        read_comparison(runs.write_config(tmp_path, values, "compare.yml"))


# All of the code.


def test_the_package_unpickles_nothing_and_runs_no_text():
    """Nor does it talk to a server but by `endpoint.py`: else hub, trackers and page do."""
    modules = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
    modules |= {"urllib", "http", "requests", "httpx", "aiohttp", "openai"}
    calls = {"eval", "exec", "compile", "os.system", "torch.load", "yaml.load", "yaml.unsafe_load"}
    for path in (runs.ROOT / "axolotl_amopo").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in getattr(node, "names", ()) if hasattr(alias, "name")]
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if ast.unparse(node) == "from pickle import UnpicklingError":
                continue  # to catch it
            if path.name == "endpoint.py" and names in (["openai"], ["OpenAI", "openai"]):
                continue
            if isinstance(node, ast.Import | ast.ImportFrom):
                assert not modules & {name.partition(".")[0] for name in names}, path
            elif isinstance(node, ast.Call):
                assert ast.unparse(node.func) not in calls, path
                assert not any(keyword.arg == "shell" for keyword in node.keywords), path
