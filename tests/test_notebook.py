"""The notebook was executed from top to bottom (`make notebook`), and its commands exist."""

import json
import re
import shlex

import pytest
import runs

from axolotl_amopo.commands import amopo
from axolotl_amopo.config.block import known_keys

PATH = runs.ROOT / "quickstart" / "quickstart.ipynb"
CELLS = json.loads(PATH.read_text(encoding="utf-8"))["cells"]
CODE = [cell for cell in CELLS if cell["cell_type"] == "code"]


def commands():
    """Return the words of each command of ours that a cell runs."""
    for cell in CODE:
        text = "".join(cell["source"]).replace("\\\n", " ")
        for line in re.findall(r"^axolotl-amopo .*", text, re.MULTILINE):
            words = shlex.split(re.split(r" [|>&]| 2>", line)[0])
            yield pytest.param(words[1], words[2:], id=words[1])


def test_all_cells_were_executed_in_order():
    assert [cell["execution_count"] for cell in CODE] == [*range(1, len(CODE) + 1)]
    assert all(cell["outputs"] for cell in CODE)
    assert not [out for cell in CODE for out in cell["outputs"] if out["output_type"] == "error"]


def test_nothing_of_the_machine_is_shown():
    shown = ""
    for output in (output for cell in CODE for output in cell["outputs"]):
        # Streams come in fragments, which may part a path.
        for text in (output.get("text"), *output.get("data", {}).values()):
            shown += "".join(text or ())
    found = r"(?<![\w.:/<])/(?:tmp|root|home|work|usr|opt|var|mnt|content)/|hf_\w{8}|://\w+:\w+@"
    assert not re.findall(found, shown)


@pytest.mark.parametrize(("name", "words"), commands())
def test_its_commands_exist(name, words):
    options = {word.split("=")[0] for word in words if word.startswith("--")}
    if name == "train":
        from axolotl.cli.main import cli

        keys = {word.removeprefix("--amopo.") for word in options if word.startswith("--amopo.")}
        assert keys <= set(known_keys())
        options -= {f"--amopo.{key}" for key in keys}
        known = cli.commands["train"].params
    else:
        known = amopo.commands[name].params
    assert options <= {option for parameter in known for option in parameter.opts}


def test_links_lead_somewhere():
    text = "".join(line for cell in CELLS for line in cell["source"])
    for link in re.findall(r"\]\((?!http)([^)#]+)", text):
        assert (PATH.parent / link).exists(), link
