"""What the README and the packaging say is what the code does."""

import importlib
import json
import re
import tomllib

import pytest
import yaml
from axolotl.utils.dict import DictDefault
from runs import ROOT, write_jsonl
from test_data import data_format, read_all

from axolotl_amopo.config.block import INTERNAL, AMoPOConfig
from axolotl_amopo.config.datasets import DatasetOptions, formats, prepare_entries
from axolotl_amopo.training.metrics import metric_names

README = (ROOT / "README.md").read_text(encoding="utf-8")
DATA = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")


def test_every_key_of_the_block_is_in_the_table_with_its_default():
    rows = dict(re.findall(r"^\| `(\w+)` \| (.+?) \|", README, flags=re.MULTILINE))
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
            shown = {"weights": "none"}.get(name, "see below")
        else:
            shown = str(default).lower()
        assert rows[name] == shown, name


def test_every_field_has_a_description():
    for name, field in AMoPOConfig.model_fields.items():
        assert field.description, name


def test_every_format_is_described():
    for name in formats():
        assert f"### `type: {name}`" in DATA
        assert f"| [`{name}`](#type{name.replace('.', '')})" in DATA


def test_the_minimal_config_is_valid(tmp_path, tiny_model):
    from runs import load, write_config

    text = re.search(r"```yaml\n(base_model:.*?)```", README, flags=re.DOTALL).group(1)
    values = yaml.safe_load(text)
    row = {"prompt": "a?", "helpfulness": 1, "correctness": 1, "coherence": 1}
    data = write_jsonl(tmp_path / "d.jsonl", [row | {"response": r} for r in "bc"])
    values["base_model"] = str(tiny_model)
    values["datasets"][0]["path"] = str(data)
    values["bf16"] = "auto"  # true is only for a GPU here
    cfg = load(write_config(tmp_path, values | {"output_dir": str(tmp_path / "out")}))
    assert cfg.amopo.enabled


def test_logged_names_are_described():
    for name in metric_names(["overall"]):
        last = name.split("/")[-1]
        assert (
            f"`/{last}`" in README
            or f"<prompt>/{last}`" in README
            or name.startswith(("rewards/", "logps/"))
        ), name


def test_the_example_rows_load():
    """Every YAML and JSON of docs/data.md, through the format it stands under."""
    blocks = re.findall(r"```yaml\n(.*?)```\n\n```json\n(.*?)```", DATA, flags=re.DOTALL)
    seen = set()
    for text, rows in blocks:
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


def test_the_format_of_ones_own_works(tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", DATA, flags=re.DOTALL)
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package" / "forum.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    rows = [{"question": "Why?", "answers": [{"body": b, "help": n} for b, n in ("a1", "b9")]}]
    data = write_jsonl(tmp_path / "data.jsonl", rows)
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


@pytest.mark.parametrize("name", ["LICENSE", "CITATION.cff", "CHANGELOG.md"])
def test_named_files_are_there(name):
    assert (ROOT / name).stat().st_size > 200


def test_versions_agree():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == project["version"]
    assert f"## {project['version']}" in (ROOT / "CHANGELOG.md").read_text()
