"""Hold the files for contributors to the code: workflows, forms, SECURITY.md, AGENTS.md."""

import ast
import importlib.util
import re
import subprocess
import tomllib
import zipfile

import click
import pytest
import yaml
from runs import ROOT

from axolotl_amopo.commands import amopo

GITHUB = ROOT / ".github"


def page(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def workflow(name: str) -> dict:
    # YAML 1.1 takes the key `on` for true.
    return yaml.load(page(f".github/workflows/{name}"), yaml.BaseLoader)


def steps(job: dict) -> list[str]:
    return [step["run"] for step in job["steps"] if "run" in step]


def test_the_workflow_runs_the_readmes_test_command():
    (command,) = re.findall(r"^(make test)\b", page("README.md"), re.MULTILINE)
    jobs = workflow("test.yml")["jobs"]
    assert steps(jobs["test"]) == [command]
    assert "continue-on-error" not in jobs["test"]
    assert command in steps(jobs["newest-axolotl"])
    assert jobs["newest-axolotl"]["continue-on-error"] == "true"
    made = [step["with"] for step in jobs["test"]["steps"] if "cache" in step.get("uses", "")]
    assert [cache["path"] for cache in made] == re.findall(
        r"^VENV \?= (.*)", page("Makefile"), re.M
    )


def test_the_newest_axolotl_is_one_without_an_upper_bound(tmp_path):
    (edit, *_) = (s for s in steps(workflow("test.yml")["jobs"]["newest-axolotl"]) if "sed" in s)
    (tmp_path / "pyproject.toml").write_text(page("pyproject.toml"))
    subprocess.run(["bash", "-e", "-c", edit.splitlines()[0]], cwd=tmp_path, check=True)
    before, after = (
        tomllib.loads(text)["project"]["dependencies"]
        for text in (page("pyproject.toml"), (tmp_path / "pyproject.toml").read_text())
    )
    assert [b.partition(",")[0] for b in before] == after != before


@pytest.mark.parametrize("name", ["test.yml", "release.yml"])
def test_workflows_may_only_read(name):
    made = workflow(name)
    assert made["permissions"] == {"contents": "read"}
    for job in made["jobs"].values():
        assert job.get("permissions", {}) in ({}, {"id-token": "write"})
        for step in job.get("steps", ()):
            assert "secrets." not in str(step)
            if "uses" in step:
                assert re.search(r"@(v\d+|release/v1)$", step["uses"])
    # Publishing waits for tests and checks, and does nothing else with its right.
    if name == "release.yml":
        (publish,) = (job for job in made["jobs"].values() if "permissions" in job)
        assert set(publish["needs"]) == set(made["jobs"]) - {"publish"} and not steps(publish)


@pytest.fixture(scope="module")
def check_wheel():
    spec = importlib.util.spec_from_file_location("check_wheel", GITHUB / "check_wheel.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_wheel_is_checked(check_wheel, tmp_path, monkeypatch):
    if not (ROOT / ".git").exists():
        pytest.skip("needs git's list of files")
    monkeypatch.chdir(ROOT)
    files = check_wheel.expected()
    assert {"axolotl_amopo/py.typed", "axolotl_amopo/example_configs/quickstart.yml"} <= files
    assert not any(name.startswith(("tests/", "docs/")) for name in files)

    def wheel(names):
        path = tmp_path / "made.whl"
        with zipfile.ZipFile(path, "w") as archive:
            for name in names:
                archive.writestr(name, "")
            archive.writestr("a-1.dist-info/METADATA", "Metadata-Version: 2.4\nVersion: 1.2\n")
        return str(path)

    assert check_wheel.problems(wheel(files), "v1.2") == []
    lacking = files - {"axolotl_amopo/py.typed"} | {"axolotl_amopo/notes.txt"}
    found = ["axolotl_amopo/py.typed is missing", "axolotl_amopo/notes.txt is not in git"]
    assert check_wheel.problems(wheel(lacking), "v1.2") == found
    assert check_wheel.problems(wheel(files), "v1.3") == ["the tag is v1.3, and the version 1.2"]


FORMS = sorted((GITHUB / "ISSUE_TEMPLATE").glob("*.yml"))


@pytest.mark.parametrize("path", [*FORMS, ROOT / "AGENTS.md", ROOT / "SECURITY.md"], ids=str)
def test_commands_are_there(path):
    """Also of `axolotl amopo NAME`, its options."""
    named = re.findall(r"axolotl amopo ([a-z-]+)((?: [\w.]+| --?[a-z-]+)*)", path.read_text())
    for name, rest in named:
        command = amopo.commands[name]
        options = {o for p in command.params if isinstance(p, click.Option) for o in p.opts}
        assert set(re.findall(r"--[a-z-]+", rest)) <= options
    assert named or path.name == "AGENTS.md"


def test_forms_ask_for_inspect_and_versions():
    assert len(FORMS) == 2
    for path in FORMS:
        assert "axolotl amopo inspect config.yml --rows 0 --json" in path.read_text()


def test_security_names_tests_that_are_there():
    named = re.findall(r"`(?:(tests/\w+\.py)::)?(test_\w+)`", page("SECURITY.md"))
    assert len(named) > 15
    for file, name in named:
        tree = ast.parse(page(file or "tests/test_security.py"))
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, name
    # And all of test_security.py stand there.
    own = {name for file, name in named if not file}
    tree = ast.parse(page("tests/test_security.py"))
    assert own == {
        node.name
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }


def test_links_and_paths_are_there():
    for name in ("AGENTS.md", "SECURITY.md"):
        for target in re.findall(r"\]\(([^)#]+)", page(name)):
            assert target.startswith("https://") or (ROOT / target).exists(), target
    table = re.findall(r"^\| (`.*?) \|", page("AGENTS.md"), re.MULTILINE)
    folders = re.findall(r"`([\w/]+/)`", " ".join(table))
    assert len(folders) > 10
    for folder in folders:
        assert (ROOT / folder).is_dir() or (ROOT / "axolotl_amopo" / folder).is_dir(), folder
    targets = re.findall(r"^(\w+):", page("Makefile"), re.MULTILINE)
    assert set(re.findall(r"\bmake (\w+)", page("AGENTS.md"))) <= set(targets)


def test_messages_name_no_file_that_only_a_clone_has():
    """People with the wheel alone have no docs/. Heads of modules are for readers of the code."""
    for path in (ROOT / "axolotl_amopo").rglob("*.py"):
        _, *rest = ast.parse(path.read_text(encoding="utf-8")).body or [None]
        for node in (node for statement in rest for node in ast.walk(statement)):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found = re.search(r"(?<![\w./])(docs|tests|benchmarks|experiments)/\w", node.value)
                assert not found, f"{path}:{node.lineno}"
