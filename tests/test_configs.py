"""`axolotl amopo configs`, from the source folder and from an installed wheel."""

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from runs import ROOT

from axolotl_amopo.commands.configs.command import configs
from axolotl_amopo.commands.configs.examples import copy_configs, list_configs
from axolotl_amopo.errors import AMoPOError

ZERO = "qwen2.5-32b-8x80gb-zero3"
EXAMPLES = sorted((ROOT / "example_configs").glob("*.yml"))


def run(*arguments):
    return CliRunner().invoke(configs, arguments)


def test_all_are_listed():
    done = run()
    assert done.exit_code == 0
    assert max(map(len, done.output.splitlines())) <= 80
    shown = " ".join(done.output.split())
    listed = json.loads(run("--json").output)
    assert [one["name"] for one in listed] == [path.stem for path in EXAMPLES]
    for one, path in zip(listed, EXAMPLES, strict=True):
        text = path.read_text(encoding="utf-8")
        assert text.startswith(f"# {one['what']}\n# Hardware: {one['hardware']}\n")
        assert one["what"] in shown and one["hardware"] in shown


def test_a_copy_is_the_example(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = run(ZERO, "quickstart")
    assert done.exit_code == 0, done.output
    for path in Path().rglob("*.*"):
        assert path.read_bytes() == (ROOT / path).read_bytes()
    written = {line.removeprefix("Written: ") for line in done.output.splitlines()}
    assert written == {str(path) for path in Path().rglob("*.*")}
    beside = {path.name for path in Path().glob("*/quickstart/*")}
    assert beside == {"README.md", "heldout.jsonl", "run.py", "smollm2.py", "train.jsonl"}
    assert len(written) == 2 + 1 + len(beside)  # and DeepSpeed's file


def test_a_copy_elsewhere_finds_what_it_names(tmp_path):
    output = tmp_path / "mine"
    assert run(ZERO, "--output", str(output), "--quiet").output == ""
    config = yaml.safe_load((output / f"{ZERO}.yml").read_text(encoding="utf-8"))
    assert Path(config["deepspeed"]).is_file()
    assert Path(config["deepspeed"]).is_relative_to(output)
    for path in EXAMPLES:
        if path.stem.startswith("quickstart"):  # one after the other, with the same data
            assert run(path.stem, "--output", str(output)).exit_code == 0
            config = yaml.safe_load((output / path.name).read_text(encoding="utf-8"))
            for entry in config["datasets"] + config["test_datasets"]:
                assert Path(entry["path"]).is_file()
                assert Path(entry["path"]).is_relative_to(output)
    assert f'"{output}/quickstart.yml"' in (output / "quickstart" / "run.py").read_text()


def test_nothing_is_overwritten(tmp_path):
    mine = tmp_path / f"{ZERO}.yml"
    mine.write_text("mine")
    done = run("quickstart", ZERO, "--output", str(tmp_path))
    assert done.exit_code == 1 and f"{mine} is there already" in done.output
    assert list(tmp_path.iterdir()) == [mine] and mine.read_text() == "mine"
    assert run(ZERO, "--output", str(tmp_path), "--force").exit_code == 0
    assert mine.read_text() != "mine"
    # Of what configs share, another copy is no loss, but where the user changed it.
    assert run("quickstart", "--output", str(tmp_path)).exit_code == 0
    data = tmp_path / "quickstart" / "train.jsonl"
    data.write_text("mine")
    done = run("quickstart-dpo", "--output", str(tmp_path))
    assert done.exit_code == 1 and f"{data} is there already" in done.output
    assert not (tmp_path / "quickstart-dpo.yml").exists() and data.read_text() == "mine"


def test_an_unknown_name():
    done = run("qwen2.5-7b-24gb-qlor")
    assert done.exit_code == 1 and "Did you mean 'qwen2.5-7b-24gb-qlora'?" in done.output


def test_from_python(tmp_path):
    # Installed, they lie in the package.
    assert [config.path.name for config in list_configs()] == [path.name for path in EXAMPLES]
    made = copy_configs(["qwen2.5-7b-80gb-lora"], tmp_path)
    assert made == [tmp_path / "qwen2.5-7b-80gb-lora.yml"]
    made[0].write_text("mine")
    with pytest.raises(AMoPOError, match="is there already"):
        copy_configs(["qwen2.5-7b-80gb-lora"], tmp_path)
    assert copy_configs(["qwen2.5-7b-80gb-lora"], tmp_path, force=True) == made


def test_the_wheel_has_them(tmp_path):
    build = ["wheel", "--no-deps", "--quiet", "--wheel-dir", str(tmp_path), str(ROOT)]
    subprocess.run([sys.executable, "-m", "pip", *build], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
    code = (
        "from axolotl_amopo.commands.configs.command import configs; "
        "from axolotl_amopo.commands.configs.examples import PACKAGE; print(PACKAGE); "
        "configs(['quickstart', '--quiet'], standalone_mode=False); configs()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path / "installed")},
        capture_output=True,
        text=True,
        check=True,
    )
    package, *listed = done.stdout.splitlines()
    assert Path(package).is_relative_to(tmp_path)
    assert [line for line in listed if line[0] != " "] == [path.stem for path in EXAMPLES]
    for path in (tmp_path / "example_configs").rglob("*.*"):
        assert path.read_bytes() == (ROOT / path.relative_to(tmp_path)).read_bytes()
    assert (tmp_path / "example_configs" / "quickstart" / "train.jsonl").is_file()
