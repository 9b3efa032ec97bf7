"""What the README, docs/ and the packaging say is what the code does; their code runs."""

import dataclasses
import importlib
import json
import re
import tomllib
from itertools import product
from pathlib import Path

import click
import pytest
import runs
import yaml
from axolotl.utils.dict import DictDefault
from test_data import data_format, read_all

from axolotl_amopo.commands import amopo
from axolotl_amopo.commands.inspect.gather import gather
from axolotl_amopo.config.block import INTERNAL, AMoPOConfig
from axolotl_amopo.config.datasets import DatasetOptions, formats, prepare_entries
from axolotl_amopo.config.dimensions import Dimension
from axolotl_amopo.config.parse import parse_block
from axolotl_amopo.config.together import SUPPLIED
from axolotl_amopo.objectives import OBJECTIVES
from axolotl_amopo.objectives.settings import SETTINGS, admitted
from axolotl_amopo.training.metrics import PER_CRITERION, SPREAD

ROOT = runs.ROOT
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def page(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def section(text: str, heading: str) -> str:
    """Return what stands under a heading, up to the next one."""
    return re.split(r"^#+ ", text.split(f"{heading}\n", 1)[1], flags=re.MULTILINE)[0]


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def keys(text: str) -> dict[str, str]:
    """Return the first two columns of a table of keys."""
    return dict(re.findall(r"^\| `(\w+)` \| (.+?) \|", text, flags=re.MULTILINE))


def anchor(heading: str) -> str:
    """Return GitHub's anchor of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


# README


def test_the_readme_is_short():
    assert len(page("README.md").splitlines()) <= 130


def test_the_config_of_the_readme_is_valid(tmp_path, tiny_model):
    (text,) = blocks(page("README.md"), "yaml")
    values = yaml.safe_load(text)
    row = {"prompt": "a?", "helpfulness": 1, "correctness": 1, "coherence": 1}
    data = runs.write_jsonl(tmp_path / "d.jsonl", [row | {"response": r} for r in "bc"])
    values["base_model"] = str(tiny_model)
    values["datasets"][0]["path"] = str(data)
    values["bf16"] = "auto"  # true is only for a GPU here
    values["output_dir"] = str(tmp_path / "out")
    cfg = runs.load(runs.write_config(tmp_path, values))
    assert cfg.amopo.enabled


def test_every_command_is_named():
    text = page("README.md") + page("docs/config.md")
    for name in amopo.commands:
        assert f"axolotl amopo {name}" in text or f"`{name}`" in text, name


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path):
    text = path.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("https://", "http://")):
            continue
        name, _, place = target.partition("#")
        other = (path.parent / name).resolve() if name else path
        assert other.exists(), target
        if place:
            headings = re.findall(r"^#+ (.*)$", other.read_text(encoding="utf-8"), re.MULTILINE)
            assert place in map(anchor, headings), target


# docs/config.md


def test_every_key_of_the_block_is_in_the_table_with_its_default():
    rows = keys(section(page("docs/config.md"), "## Keys of every objective"))
    defaults = {
        name: field.default
        for name, field in AMoPOConfig.model_fields.items()
        if name not in INTERNAL
    }
    assert set(rows) == set(defaults)
    for name, default in defaults.items():
        if name == "dimensions":
            shown = ", ".join(default)
        elif default is None:
            explained = ("instruction", "overall_instruction", "order_by", "reference")
            explained += ("weight_draws", "weight_concentration", "sample_settings")
            shown = "see below" if name in explained else "none"
        else:
            shown = str(default).lower()
        assert rows[name] == shown, name
    assert set(keys(section(page("docs/config.md"), "### Dimensions"))) == set(
        Dimension.model_fields
    )


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_key_of_an_objective_is_in_its_table_with_its_default(name):
    text = section(page("docs/config.md"), f"### `objective: {name}`")
    shown = {
        {"beta": "rl_beta"}.get(field.name, field.name): default_of(field)
        for field in dataclasses.fields(OBJECTIVES[name])
    }
    assert keys(text) == shown
    assert f"`{name}`" in keys_of_every_objective()["objective"]
    for key in OBJECTIVES[name].defaults:
        assert f"`{key}`" in text, f"{name} changes the default of {key}"


def default_of(field: dataclasses.Field) -> str:
    """Return the default of an objective's or a setting's field as the YAML writes it."""
    if field.metadata["least_weight"] is not None:
        return "first dimension"
    return str(field.default).lower() if isinstance(field.default, bool) else str(field.default)


def test_every_key_of_a_setting_is_in_the_table_with_its_default():
    text = section(page("docs/config.md"), "## Settings of objectives of pairs")
    named = {
        field.name: default_of(field)
        for setting in SETTINGS
        for field in dataclasses.fields(setting)
    }
    shown = {key: default for key, default in keys(text).items() if key not in OBJECTIVES}
    assert shown == named
    (heading,) = re.findall(r"^\| objective \| (.+) \|$", text, flags=re.MULTILINE)
    switches = [dataclasses.fields(setting)[0].name for setting in SETTINGS]
    assert heading == " | ".join(f"`{switch}`" for switch in switches)
    for name in OBJECTIVES:
        cells = ["yes" if setting in admitted(name) else "-" for setting in SETTINGS]
        assert f"| `{name}` | {' | '.join(cells)} |\n" in text


# docs/methods.md


def test_every_method_is_described():
    text = page("docs/methods.md")
    for name, kind in OBJECTIVES.items():
        assert f"| `{name}` | " in section(text, "## Overview")
        if name not in ("amopo", "simpo"):
            assert kind.paper.url in section(text, f"### `{name}`")


def test_every_method_is_in_the_overview_and_supplied():
    overview = section(page("docs/methods.md"), "## Overview")
    assert re.findall(r"^\| `(\w+)` \|", overview, flags=re.MULTILINE) == [*OBJECTIVES]
    for name, objective in OBJECTIVES.items():
        assert objective().needs <= SUPPLIED, name


def keys_of_every_objective() -> dict[str, str]:
    """Return the meanings in the table of the engine's keys."""
    text = section(page("docs/config.md"), "## Keys of every objective")
    return dict(re.findall(r"^\| `(\w+)` \| .+? \| (.+) \|$", text, flags=re.MULTILINE))


def test_every_field_has_a_description():
    for name, field in AMoPOConfig.model_fields.items():
        assert field.description, name


def test_the_configs_of_the_page_are_valid(tmp_path, tiny_model):
    from axolotl.cli.utils.train import generate_config_files

    block, sweep = blocks(page("docs/config.md"), "yaml")
    values = yaml.safe_load(block)
    assert values["rl"] == "amopo"
    parse_block(AMoPOConfig, values["amopo"], "amopo")

    base = runs.config(tmp_path, tiny_model, runs.QUICKSTART / "train.jsonl")
    (tmp_path / "sweep.yml").write_text(sweep, encoding="utf-8")
    paths = generate_config_files(
        str(runs.write_config(tmp_path, base)), str(tmp_path / "sweep.yml")
    )
    swept = yaml.safe_load(sweep)
    found = set()
    for path, _ in paths:
        cfg = runs.load(path)
        found.add((cfg.amopo.gamma, cfg.amopo.winner, cfg.learning_rate))
    assert found == set(product(*swept.values()))


# docs/metrics.md


def test_every_logged_name_is_described():
    named = set(re.findall(r"^\| `([^`]+)` \|", page("docs/metrics.md"), flags=re.MULTILINE))
    logged = {f"amopo/<criterion>/{name}" for name in (*PER_CRITERION, f"{SPREAD}_std")}
    assert {name for name in named if name.startswith("amopo/")} == logged


# docs/data.md


def test_every_format_is_described():
    for name in formats():
        assert f"### `type: {name}`" in page("docs/data.md")
        assert f"| [`{name}`](#{anchor(f'`type: {name}`')})" in page("docs/data.md")


def test_the_example_rows_load():
    """Every YAML and JSON of the page, through the format it stands under."""
    found = re.findall(r"```yaml\n(.*?)```\n\n```json\n(.*?)```", page("docs/data.md"), re.DOTALL)
    seen = set()
    for text, rows in found:
        values = yaml.safe_load(text)
        (entry,) = values["datasets"]
        seen.add(entry["type"])
        options = {key: entry[key] for key in set(DatasetOptions.model_fields) & set(entry)}
        kind = entry["type"].removeprefix("amopo.")
        wanted = data_format(kind, options=options, **values["amopo"])
        for row in rows.strip().splitlines():
            (prompt,) = read_all(wanted, [json.loads(row)])
            assert set(prompt.responses[0].ratings) == set(values["amopo"]["dimensions"])
            assert any(rating is not None for rating in prompt.responses[0].ratings.values())
    assert seen == set(formats())


# docs/coming-from


@pytest.mark.parametrize(
    "path", sorted((ROOT / "docs" / "coming-from").glob("*.md")), ids=lambda path: path.stem
)
def test_a_page_ends_with_a_config_that_takes_its_rows(path, tmp_path, monkeypatch, tiny_model):
    monkeypatch.chdir(tmp_path)
    text = path.read_text(encoding="utf-8")
    (config,) = blocks(text, "yaml")
    assert text.endswith(f"{config}```\n")
    values = yaml.safe_load(config) | {"base_model": str(tiny_model)}
    for entry, rows in zip(values["datasets"], blocks(text, "json"), strict=True):
        assert f"`{entry['path']}`" in text
        (tmp_path / entry["path"]).write_text(rows, encoding="utf-8")
    report = gather(str(runs.write_config(tmp_path, values)), rows=0)
    assert all(entry.pairs_kept == entry.pairs_made > 0 for entry in report.entries)


# docs/export.md


def test_the_commands_have_the_options_that_the_pages_give_them():
    from axolotl.cli.main import cli

    seen = set()
    for name in ("docs/export.md", "docs/coming-from/scores.md"):
        for line in "".join(blocks(page(name), "bash")).splitlines():
            if not line.startswith("axolotl "):
                continue
            known, words = cli, line.split()[1:]
            if words[0] == "amopo":  # axolotl loads ours when it runs
                known, words = amopo, words[1:]
            while isinstance(known, click.Group):
                known = known.get_command(click.Context(known), words.pop(0))
            options = {option for param in known.params for option in param.opts}
            assert {word for word in words if word.startswith("--")} <= options, line
            seen.add(known.name)
    assert seen == {"merge-lora", "export", "template", "lm-eval", "init", "inspect", "train"}


def test_the_task_of_lm_eval_knows_the_answers(monkeypatch, tmp_path, tiny_model):
    from lm_eval.tasks import TaskManager, get_task_dict

    monkeypatch.chdir(ROOT)
    text, keys, _ = blocks(page("docs/export.md"), "yaml")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "honest_answer.yaml").write_text(text)
    # By its name, among the tasks of a folder: lm_eval 0.4.11 fails on the file itself.
    manager = TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False)
    (name,) = yaml.safe_load(keys)["lm_eval_tasks"]
    task = get_task_dict([name], manager)[name]
    docs = list(task.test_docs())
    assert len(docs) == 24
    for doc in docs:
        best = task.doc_to_choice(doc)[task.doc_to_target(doc)]
        honesty = {response["text"]: response["scores"]["honesty"] for response in doc["responses"]}
        assert task.doc_to_text(doc) == doc["prompt"] and honesty[best] == max(honesty.values())

    values = runs.config(tmp_path, tiny_model, runs.QUICKSTART / "train.jsonl")
    assert runs.load(runs.write_config(tmp_path, values | yaml.safe_load(keys))).amopo.enabled


# docs/api.md


def code(heading: str) -> list[str]:
    return blocks(section(page("docs/api.md"), heading), "python")


def test_the_code_of_losses_and_models_runs(capsys):
    shared: dict = {}
    for text in [*code("## Compute a loss"), *code("## Get log-probabilities from a model")]:
        exec(text, shared)
    printed = capsys.readouterr().out
    assert "torch.Size([4, 3])" in printed
    assert shared["choice"].layout == "packed"
    assert shared["loss"].isfinite()


def test_the_format_of_ones_own_works(tmp_path, monkeypatch):
    (text,) = code("## A dataset format of your own")
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package" / "forum.py").write_text(text, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    rows = [{"question": "Why?", "answers": [{"body": b, "help": n} for b, n in ("a1", "b9")]}]
    data = runs.write_jsonl(tmp_path / "data.jsonl", rows)
    cfg = {"base_model": "x", "datasets": [{"path": str(data), "type": "my_package.forum"}]}
    prepare_entries(cfg, AMoPOConfig(dimensions=["help"]))
    (entry,) = cfg["datasets"]
    block = DictDefault(amopo={"dimensions": ["help"]}, sequence_len=99)
    wanted = importlib.import_module(entry["type"]).load(None, block, DictDefault(entry))
    (prompt,) = read_all(wanted, rows)
    assert [(r.text, r.ratings) for r in prompt.responses] == [
        ("a", {"help": 1}),
        ("b", {"help": 9}),
    ]


def test_the_code_of_commands_runs(tmp_path, monkeypatch, tiny_model):
    monkeypatch.chdir(tmp_path)
    held_out = {"path": str(runs.QUICKSTART / "heldout.jsonl"), "type": "amopo.rated"}
    values = runs.config(
        Path(), tiny_model, runs.QUICKSTART / "train.jsonl", **runs.LORA, max_steps=2
    )
    values |= {
        "output_dir": "outputs/adapter",
        "test_datasets": [held_out | {"scale": [1, 5], "split": "train"}],
        "eval_strategy": "steps",
        "eval_steps": 1,
    }
    values["amopo"] = {"dimensions": ["helpfulness", "honesty"], "pairs": "best_worst"}
    runs.train(runs.write_config(tmp_path, values))

    shared: dict = {}
    for text in [*code("## Steer a trained model"), *code("## Do what a command does")]:
        exec(text, shared)
    assert "helpfulness" in shared["messages"][-1]["content"]
    assert shared["data"].entries[0].pairs_kept == 56
    assert shared["plan"].fits
    assert shared["report"].page.is_file()
    assert len(shared["answers"]) == 2
    assert shared["scores"].rows[0].prompting == "own"
    assert isinstance(shared["run"].change("amopo/honesty/margin").difference, float)
    for name in ("data", "plan", "report", "scores"):
        json.dumps(shared[name].to_json(), default=str)


# Packaging


@pytest.mark.parametrize("name", ["LICENSE", "CITATION.cff", "CHANGELOG.md"])
def test_named_files_are_there(name):
    assert (ROOT / name).stat().st_size > 200


def test_versions_agree():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == project["version"]
    assert f"## {project['version']}" in (ROOT / "CHANGELOG.md").read_text()
