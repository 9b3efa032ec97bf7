"""Prepared datasets that an interrupted command left behind are not trained on."""

import re
import shutil

import pyarrow as pa
import pytest
from datasets import Dataset, load_from_disk
from pyarrow import feather
from runs import config, prepare, write_config, write_jsonl

from axolotl_amopo.data.cache import set_aside_unfinished, unfinished

ROWS = [
    {
        "prompt": f"Question {i}?",
        "responses": [
            {"text": f"{word} {i}", "scores": {"helpfulness": n, "honesty": n}}
            for word, n in (("yes", 5), ("no", 1))
        ],
    }
    for i in range(6)
]


@pytest.fixture(scope="module")
def written(tmp_path_factory, tiny_model):
    """What a config's data is prepared into, and what writes that config anew."""
    folder = tmp_path_factory.mktemp("prepared")
    data = write_jsonl(folder / "data.jsonl", ROWS)

    def write(folder):
        return write_config(folder, config(folder, tiny_model, data))

    prepare(write(folder))
    return folder / "prepared", write


@pytest.fixture
def prepared(tmp_path, written):
    """A config whose data is prepared, and the folder of that."""
    shutil.copytree(written[0], tmp_path / "prepared")
    (folder,) = [p for p in (tmp_path / "prepared").iterdir() if p.is_dir()]
    assert unfinished(folder) is None
    return written[1](tmp_path), folder


def missing_state(folder):
    (folder / "state.json").unlink()


def missing_info(folder):
    (folder / "dataset_info.json").unlink()


def nothing_but_the_beginning(folder):
    for path in folder.glob("*.json"):
        path.unlink()
    (shard,) = folder.glob("*.arrow")
    shard.write_bytes(b"")


def fewer_rows(folder):
    """What writing over an older file begins with: a stream that ends too early, and loads."""
    (shard,) = folder.glob("*.arrow")
    rows = Dataset.from_file(str(shard))
    with pa.OSFile(str(folder / "cut"), "wb") as file:
        writer = pa.ipc.new_stream(file, rows.data.schema)
        writer.write_table(rows.data.table.slice(0, 4))  # and no end
    shard.unlink()
    (folder / "cut").rename(shard)
    assert len(load_from_disk(folder)) == 4


@pytest.mark.parametrize(
    "damage", [missing_state, missing_info, nothing_but_the_beginning, fewer_rows]
)
def test_what_is_unfinished_is_prepared_anew(prepared, damage, caplog):
    path, folder = prepared
    damage(folder)
    with caplog.at_level("WARNING"):
        _, datasets = prepare(path)
    assert len(datasets.train_dataset) == len(ROWS)
    assert any("was not written to its end" in line for line in caplog.messages)
    assert (folder.parent / f"_unfinished-{folder.name}").is_dir()
    assert unfinished(folder) is None


def test_every_cut_of_a_shard_is_noticed(prepared):
    _, folder = prepared
    (shard,) = folder.glob("*.arrow")
    whole = shard.read_bytes()
    for length in {*range(0, len(whole), 97), *range(len(whole) - 20, len(whole))}:
        shard.write_bytes(whole[:length])
        assert unfinished(folder), length
    shard.write_bytes(whole)
    assert unfinished(folder) is None


def test_a_second_one_is_not_written_over_the_first(prepared):
    _, folder = prepared
    for number in ("", "-2"):
        missing_state(folder)
        set_aside_unfinished(str(folder.parent))
        aside = folder.parent / f"_unfinished-{folder.name}{number}"
        assert aside.is_dir() and not folder.exists()
        Dataset.from_dict({"example_id": [1]}).save_to_disk(folder)


@pytest.mark.parametrize("over", ["nothing", "older"])
def test_killed_while_preparing(over, tmp_path, tiny_model, forks):
    """With SIGKILL, amid each change of the folder; then a run finds or makes all rows."""
    data = write_jsonl(tmp_path / "data.jsonl", ROWS)
    path = write_config(tmp_path, config(tmp_path, tiny_model, data))
    forks(1, tmp_path, "prepare_worker", "killed_at_every_moment", str(path), over)
    moments = re.search(r"^(\d+) moments", (tmp_path / "0.log").read_text(), re.MULTILINE)
    assert int(moments[1]) >= 5  # a lock, a folder, a shard and its descriptions


def test_several_prepare_the_same_data_at_once(tmp_path, tiny_model, forks):
    """One does the work, the others wait for it; another config's rows are its own."""
    data = write_jsonl(tmp_path / "data.jsonl", ROWS)
    same = write_config(tmp_path, config(tmp_path, tiny_model, data))
    other = config(tmp_path, tiny_model, data, sequence_len=500)
    other = write_config(tmp_path, other, "other.yml")
    forks(1, tmp_path, "prepare_worker", "prepare_at_once", *map(str, (same, other, same, same)))
    assert (tmp_path / "0.log").read_text().count("6 pairs made") == 2
    folders = [p for p in (tmp_path / "prepared").iterdir() if p.is_dir()]
    assert [len(load_from_disk(folder)) for folder in folders] == [6, 6]


def feather_files(folder):
    for compression in ("uncompressed", "lz4"):
        table = pa.table({"example_id": [1, 2]})
        feather.write_feather(table, folder / f"{compression}.arrow", compression)


def an_empty_shard(folder):
    (folder / "data-00000-of-00001.arrow").touch()


def half_a_stream(folder):
    table = pa.table({"text": ["one", "two"]})
    with pa.OSFile(str(folder / "data.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema):
        pass
    whole = (folder / "data.arrow").read_bytes()
    (folder / "data.arrow").write_bytes(whole[:20])


def a_dataset_with_example_ids(folder):
    Dataset.from_dict({"example_id": [1], "question": ["Why?"]}).save_to_disk(folder)
    missing_state(folder)


def an_sft_dataset(folder):
    Dataset.from_dict({"input_ids": [[1]]}).save_to_disk(folder)
    missing_state(folder)


@pytest.mark.parametrize(
    "kind",
    [feather_files, an_empty_shard, half_a_stream, a_dataset_with_example_ids, an_sft_dataset],
)
def test_what_is_not_ours_stays(kind, prepared):
    _, ours = prepared
    folder = ours.parent / "of-somebody"
    folder.mkdir()
    kind(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    missing_state(ours)
    set_aside_unfinished(str(ours.parent))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert not ours.exists()


def test_no_folder_is_made(tmp_path):
    set_aside_unfinished(str(tmp_path / "nowhere"))
    assert not (tmp_path / "nowhere").exists()
