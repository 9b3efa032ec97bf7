"""Prepared rows are used again exactly where they would come out the same."""

import json

import pytest

from axolotl_amopo.config import fingerprint
from axolotl_amopo.config.block import AMoPOConfig
from axolotl_amopo.config.datasets import prepare_entries

ROW = {"prompt": "Hi?", "chosen": "Hello.", "rejected": "No."}


@pytest.fixture
def fingerprint_of(tmp_path):
    """A function from a block, and the type of its one dataset, to that one's fingerprint."""
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps(ROW))

    def of(kind="amopo.rated", cfg=(), **block):
        base = {"base_model": "x", "datasets": [{"path": str(data), "type": kind}]}
        (found,) = prepare_entries(base | dict(cfg), AMoPOConfig(**block))
        return found

    return of


@pytest.mark.parametrize(
    "block",
    [
        {"gamma": 0.1},
        {"weighting": "uniform"},
        {"weighting": "static", "weights": {"overall": 1, "help": 2}},
        {"share_prompt": False},
        {"eval_table": 3},
        {"generate_samples": 3, "sample_settings": ["none"]},
        {"console": "plain"},
        {"objective": "simpo", "instruction": "Be good.", "overall_instruction": "Be good."},
    ],
)
def test_what_changes_the_loss_alone_keeps_the_rows(block, fingerprint_of):
    same = {"dimensions": ["help"], "instruction": "Be good.", "overall_instruction": "Be good."}
    assert fingerprint_of(**same | block) == fingerprint_of(**same)


def test_an_objective_changes_the_rows_by_its_defaults(fingerprint_of):
    none = {"instruction": "", "overall_instruction": ""}
    assert fingerprint_of(objective="simpo") == fingerprint_of(**none) != fingerprint_of()


def test_what_changes_the_tokens_changes_the_rows(fingerprint_of, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    model = {"base_model": str(folder)}
    (folder / "generation_config.json").write_text('{"eos_token_id": 3}')
    seen = {fingerprint_of(), fingerprint_of(cfg=model), fingerprint_of(cfg={"tokens": ["<a>"]})}
    (folder / "generation_config.json").write_text('{"eos_token_id": [3, 4]}')
    seen.add(fingerprint_of(cfg=model))
    (folder / "tokenizer.json").write_text("{}")
    seen.add(fingerprint_of(cfg=model))
    assert len(seen) == 5


def test_the_version_of_the_rows(fingerprint_of, monkeypatch):
    before = fingerprint_of()
    monkeypatch.setattr(fingerprint, "ROWS_VERSION", fingerprint.ROWS_VERSION + 1)
    assert fingerprint_of() != before


def test_a_format_of_ours_may_move_to_another_file(fingerprint_of, monkeypatch):
    from axolotl_amopo.config import datasets

    before = fingerprint_of()
    monkeypatch.setattr(datasets, "module_of", lambda kind, where: f"elsewhere.{kind}")
    assert fingerprint_of() == before


def test_a_format_of_somebody_elses_may_change(fingerprint_of, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "somebodys").mkdir()
    module = tmp_path / "somebodys" / "format.py"
    module.write_text("load = 1\n")
    before = fingerprint_of("somebodys.format")
    assert fingerprint_of("somebodys.format") == before
    module.write_text("load = 2\n")
    assert fingerprint_of("somebodys.format") != before
