"""What the README and the packaging say is what the code does."""

import re
import tomllib

import pytest
import yaml
from runs import ROOT

from axolotl_amopo.args import INTERNAL, AMoPOConfig
from axolotl_amopo.data.entries import formats
from axolotl_amopo.metrics import metric_names

README = (ROOT / "README.md").read_text(encoding="utf-8")


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
        assert f"`type: {name}`" in README


def test_the_minimal_config_is_valid(tmp_path, tiny_model):
    from runs import load, write_config, write_jsonl

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


def test_the_example_rows_load(tokenizer):
    """Every JSON row of the README, through the format it stands under."""
    import json

    from test_data import strategy

    blocks = re.findall(r"`type: amopo\.(\w+)`.*?```json\n(.*?)```", README, flags=re.DOTALL)
    assert {kind for kind, _ in blocks} == {name.removeprefix("amopo.") for name in formats()}
    for kind, rows in blocks:
        for row in rows.strip().splitlines():
            wanted = strategy(kind, dimensions=["helpfulness"])
            prompts = wanted.read_all([(1, json.loads(row))], {})
            assert prompts[0].responses[0].ratings["helpfulness"] in (3, 4)


@pytest.mark.parametrize("name", ["LICENSE", "CITATION.cff", "CHANGELOG.md"])
def test_named_files_are_there(name):
    assert (ROOT / name).stat().st_size > 200


def test_versions_agree():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == project["version"]
    assert f"## {project['version']}" in (ROOT / "CHANGELOG.md").read_text()
