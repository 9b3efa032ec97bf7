"""Checkpoints: what is complete is known, what is damaged is skipped, and a resumed run goes on."""

import json
import logging
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import axolotl.cli  # noqa: F401, sets logging up when imported, which would undo caplog's
import pytest
import runs
import torch
from axolotl.utils.dict import DictDefault
from axolotl.utils.train import determine_last_checkpoint
from safetensors.torch import load_file, save_file
from transformers.trainer_utils import get_last_checkpoint

from axolotl_amopo.errors import AMoPOError
from axolotl_amopo.training.checkpoints import MANIFEST, Checkpoints, Outline, Run

RUN = Run(
    processes=2,
    micro_batch_size=1,
    gradient_accumulation_steps=4,
    seed=7,
    rows=100,
    group_by_length=None,
)
FILES = [
    "model.safetensors",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state_0.pth",
    "rng_state_1.pth",
    "trainer_state.json",
]


def write_files(folder: Path, step: int) -> None:
    save_file({"weight": torch.full((64,), float(step))}, folder / "model.safetensors")
    for name in FILES[1:-1]:
        torch.save({"state": torch.full((64,), float(step))}, folder / name)
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))


def save(folder: Path, step: int, limit: int | None = None, run: Run = RUN) -> Path:
    path = folder / f"checkpoint-{step}"
    checkpoints = Checkpoints(str(folder), run)
    checkpoints.begin(path)
    write_files(path, step)
    checkpoints.finish(path, limit, best=None)
    return path


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    folder = tmp_path_factory.mktemp("three")
    for step in (2, 4, 10):
        save(folder, step)
    return folder


@pytest.fixture
def folder(three, tmp_path):
    """An output folder with three complete checkpoints."""
    return shutil.copytree(three, tmp_path / "out")


def newest(folder: Path, run: Run = RUN) -> str | None:
    path = Checkpoints(str(folder), run).newest()
    return path and Path(path).name


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_the_newest_is_taken_and_named(folder, caplog):
    caplog.set_level(logging.INFO)
    assert newest(folder) == "checkpoint-10"
    assert names(folder) == ["checkpoint-10", "checkpoint-2", "checkpoint-4"]
    (line,) = [r.message for r in caplog.records if r.name == "axolotl_amopo.training.checkpoints"]
    assert line == f"AMoPO: resuming from {folder}/checkpoint-10, which is complete."


@pytest.mark.parametrize("damage", [truncate, flip, Path.unlink], ids=lambda d: d.__name__)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_one_is_named_and_set_aside(folder, caplog, name, damage):
    damage(folder / "checkpoint-10" / name)
    assert newest(folder) == "checkpoint-4"
    assert names(folder) == ["_damaged-checkpoint-10", "checkpoint-2", "checkpoint-4"]
    (line,) = [r.message for r in caplog.records if r.levelno == logging.WARNING]
    what = {truncate: "bytes", flip: "doesn't hold what was written", Path.unlink: "is missing"}
    for part in ("checkpoint-10", name, what[damage], "_damaged-checkpoint-10"):
        assert part in line
    # Those who go by the highest number agree.
    assert get_last_checkpoint(folder) == str(folder / "checkpoint-4")
    cfg = DictDefault(output_dir=str(folder))
    assert determine_last_checkpoint(cfg, update=False) == str(folder / "checkpoint-4")


def test_every_damaged_one_gets_a_name_of_its_own(folder):
    for _ in range(3):
        flip(save(folder, 10) / "optimizer.pt")
        assert newest(folder) == "checkpoint-4"
    assert names(folder)[:3] == [f"_damaged-checkpoint-10{n}" for n in ("", "-2", "-3")]


def test_a_half_written_one_is_not_taken(folder, caplog):
    """Whatever it already has: with every file but the manifest, and with none."""
    for step in (12, 14):
        path = folder / f"checkpoint-{step}"
        Checkpoints(str(folder), RUN).begin(path)
        if step == 12:
            write_files(path, step)
    (folder / "checkpoint-16").mkdir()
    assert newest(folder) == "checkpoint-10"
    assert caplog.text.count("the run ended while it was written") == 2
    assert "checkpoint-16 can't be resumed: trainer_state.json is missing" in caplog.text


def test_older_ones_that_are_half_deleted_are_set_aside(folder, caplog):
    """A kill while the oldest were deleted; else they would count as kept, and be the youngest."""
    (folder / "checkpoint-2" / "model.safetensors").unlink()
    assert newest(folder) == "checkpoint-10"
    assert names(folder) == ["_damaged-checkpoint-2", "checkpoint-10", "checkpoint-4"]


def test_none_is_complete(folder, caplog):
    for path in list(folder.iterdir()):
        truncate(path / "model.safetensors")
    assert newest(folder) is None
    assert caplog.text.count("STARTS ANEW") == 1
    assert all(name.startswith("_damaged-") for name in names(folder))


def test_none_is_there(tmp_path, caplog):
    assert newest(tmp_path / "new") is None
    assert "STARTS ANEW" not in caplog.text


@pytest.mark.parametrize("damage", [truncate, flip], ids=lambda d: d.__name__)
def test_a_damaged_manifest(folder, caplog, damage):
    manifest = folder / "checkpoint-10" / MANIFEST
    manifest.write_text(manifest.read_text().replace('"files"', '"file"', damage is flip))
    if damage is truncate:
        truncate(manifest)
    assert newest(folder) == "checkpoint-4"
    assert f"{MANIFEST} is damaged" in caplog.text


def without_manifest(folder: Path) -> Path:
    path = folder / "checkpoint-10"
    (path / MANIFEST).unlink()
    return path


def test_without_a_manifest_it_is_taken_with_a_warning(folder, caplog):
    without_manifest(folder)
    assert newest(folder) == "checkpoint-10"
    (line,) = [r.message for r in caplog.records if r.levelno == logging.WARNING]
    assert "can't be verified fully" in line


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        *((name, Path.unlink) for name in FILES if name != "rng_state_1.pth"),
        *((name, truncate) for name in FILES),
        *((name, flip) for name in FILES[1:-1]),  # weights have no checksum of their own
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_without_a_manifest_damage_shows_where_the_format_tells(folder, caplog, name, damage):
    damage(without_manifest(folder) / name)
    assert newest(folder) == "checkpoint-4"
    assert "_damaged-checkpoint-10" in names(folder)


def test_without_a_manifest_nor_optimizer(folder, caplog):
    """What `save_only_model: true` leaves."""
    path = without_manifest(folder)
    for name in FILES[1:-1]:
        (path / name).unlink()
    assert newest(folder) == "checkpoint-10"
    assert "has no optimizer state" in caplog.text


def test_a_shard_without_a_manifest(folder, caplog):
    path = without_manifest(folder)
    index = {"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert newest(folder) == "checkpoint-4"
    assert "model-2.safetensors is missing" in caplog.text


def test_nothing_is_unpickled(folder, monkeypatch):
    without_manifest(folder)
    monkeypatch.setattr("torch.load", None)
    monkeypatch.setattr("pickle.Unpickler", None)
    assert newest(folder) == "checkpoint-10"


def test_a_named_one_is_taken(folder):
    path = str(folder / "checkpoint-4")
    assert Checkpoints(str(folder), RUN).named(path) == path
    assert len(names(folder)) == 3


@pytest.mark.parametrize("damage", [truncate, flip, shutil.rmtree], ids=lambda d: d.__name__)
def test_a_named_one_that_is_damaged(folder, damage):
    path = folder / "checkpoint-10"
    damage(path if damage is shutil.rmtree else path / "optimizer.pt")
    what = "there is no such folder" if damage is shutil.rmtree else "optimizer.pt"
    with pytest.raises(AMoPOError, match=rf"checkpoint-10 .*{what}.* Write .*checkpoint-4") as e:
        Checkpoints(str(folder), RUN).named(str(path))
    assert "\n" not in str(e.value)
    assert not any(name.startswith("_damaged") for name in names(folder))


def test_a_named_one_without_another(tmp_path):
    path = save(tmp_path, 2)
    truncate(path / "model.safetensors")
    with pytest.raises(AMoPOError, match=r"Remove the key: .* no complete checkpoint"):
        Checkpoints(str(tmp_path), RUN).named(str(path))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"micro_batch_size": 2}, "8 examples .* takes 16 .* write gradient_accumulation_steps: 2"),
        ({"processes": 3}, "choose sizes whose product is 8"),
        ({"sharding": "DeepSpeed ZeRO-2"}, "saved under no sharding .* under DeepSpeed ZeRO-2"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_run_that_can_not_go_on(folder, changes, sentence):
    with pytest.raises(AMoPOError, match=sentence):
        newest(folder, replace(RUN, **changes))


def test_as_many_examples_a_step_on_other_processes(folder):
    run = replace(RUN, processes=8, gradient_accumulation_steps=1)
    assert newest(folder, run) == "checkpoint-10"


def test_grouped_by_length_a_forward_pass_must_stay(tmp_path):
    grouped = replace(RUN, group_by_length=True)
    save(tmp_path, 2, run=grouped)
    same = replace(grouped, processes=1, micro_batch_size=2)
    assert newest(tmp_path, same) == "checkpoint-2"
    with pytest.raises(AMoPOError, match="with 2 examples in a forward pass"):
        newest(tmp_path, replace(grouped, micro_batch_size=4, gradient_accumulation_steps=1))


def test_zero_needs_as_many_processes(tmp_path):
    zero = replace(RUN, sharding="DeepSpeed ZeRO-2", resizable=False)
    save(tmp_path, 2, run=zero)
    other = replace(zero, processes=4, gradient_accumulation_steps=2)
    with pytest.raises(AMoPOError, match="states of 2 processes, which 4 can't load; run 2, or"):
        newest(tmp_path, other)
    assert newest(tmp_path, replace(other, resizable=True)) == "checkpoint-2"


def test_other_rows_are_noticed(folder, caplog):
    assert newest(folder, replace(RUN, rows=101)) == "checkpoint-10"
    assert "rows was 100" in caplog.text


def test_files_added_later_do_no_harm(folder):
    (folder / "checkpoint-10" / "relora").mkdir()
    (folder / "checkpoint-10" / "relora" / "model.safetensors").write_bytes(b"1")
    assert newest(folder) == "checkpoint-10"


def test_a_half_written_one_in_the_way(folder, caplog):
    """Of a run that isn't resumed; nothing of it gets into the new one."""
    checkpoints = Checkpoints(str(folder), RUN)
    path = folder / "checkpoint-12"
    checkpoints.begin(path)
    torch.save({}, path / "rng_state_2.pth")
    checkpoints.begin(path)
    assert "an incomplete" in caplog.text
    assert names(path) == [MANIFEST]
    assert "rng_state_2.pth" in names(folder / "_damaged-checkpoint-12")


def test_the_file_that_callbacks_change_does_no_harm(tmp_path):
    checkpoints = Checkpoints(str(tmp_path), RUN)
    path = tmp_path / "checkpoint-2"
    checkpoints.begin(path)
    write_files(path, 2)
    config = path / "adapter_config.json"
    config.write_text("{}")
    checkpoints.finish(path, None, best=None)
    config.write_text('{"nvfp4_merge_aware": {}}')
    assert newest(tmp_path) == "checkpoint-2"
    config.unlink()
    assert newest(tmp_path) is None


def test_a_disk_that_never_had_it_whole(tmp_path, caplog):
    """As on a machine that doesn't save, though what it has is as it was written."""
    checkpoints = Checkpoints(str(tmp_path), RUN)
    path = tmp_path / "checkpoint-2"
    checkpoints.begin(path)
    torch.save({}, path / "rng_state_1.pth")
    checkpoints.finish(path, None, best=None)
    assert newest(tmp_path) is None
    assert "it was saved without trainer_state.json" in caplog.text


def on_two_disks(folder: Path, run: Run) -> Checkpoints:
    checkpoints = Checkpoints(str(folder), run)
    checkpoints.first_ranks = [0, 1]
    return checkpoints


def test_disks_must_hold_the_same_save(folder):
    compare = on_two_disks(folder, RUN)._compare
    assert compare([Outline(save="a"), Outline(save="a")]) == ""
    assert compare([Outline(save="a"), Outline(save="b")]) == "each disk has another save of it"
    assert compare([Outline(), Outline("x is missing")]) == "x is missing (on one of the disks)"


def test_pieces_on_several_disks(folder, caplog):
    sharded = on_two_disks(folder, replace(RUN, sharding="FSDP (FULL_STATE_DICT)"))
    assert not sharded.each_saves()
    assert "CAN'T BE RESUMED" in caplog.text
    for resume in (sharded.newest, lambda: sharded.named(str(folder / "checkpoint-4"))):
        with pytest.raises(AMoPOError, match=r"2 disks.*put output_dir where all machines share"):
            resume()
    assert on_two_disks(folder, RUN).each_saves()
    assert on_two_disks(folder / "first start", sharded.run).newest() is None


def test_the_oldest_are_deleted_once_the_new_one_is_complete(folder):
    checkpoints = Checkpoints(str(folder), RUN)
    path = folder / "checkpoint-12"
    checkpoints.begin(path)
    write_files(path, 12)
    assert len(names(folder)) == 4
    checkpoints.finish(path, 2, best=str(folder / "checkpoint-2"))
    assert names(folder) == ["checkpoint-12", "checkpoint-2"]


def test_one_that_is_written_again(folder):
    """The old one stays until the new one is complete, and leaves no file behind."""
    stale = folder / "checkpoint-10" / "rng_state_2.pth"
    torch.save({}, stale)
    checkpoints = Checkpoints(str(folder), RUN)
    path = folder / "checkpoint-10"
    checkpoints.begin(path)
    write_files(path, 11)
    killed = shutil.copytree(folder, folder.with_name("killed"))
    checkpoints.finish(path, None, best=None)
    assert not stale.exists()
    assert names(folder) == ["checkpoint-10", "checkpoint-2", "checkpoint-4"]

    assert newest(killed) == "checkpoint-10"
    assert load_file(killed / "checkpoint-10" / "model.safetensors")["weight"][0] == 10
    assert "_damaged-checkpoint-10" in names(killed)
    assert not any(name.startswith("_replaced") for name in names(killed))


# What decides the trajectory is all there: dropout, which draws from torch's generator, a schedule,
# an optimizer with a state, and rows that are not a multiple of an optimizer step's.
RECORDER = ["parallel_worker.Recorder"]
TRAINING = runs.LORA | {
    "lora_dropout": 0.2,
    "optimizer": "adamw_torch",
    "lr_scheduler": "cosine",
    "warmup_steps": 2,
    "micro_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "num_epochs": 3,
    "max_steps": 7,
    "save_strategy": None,
    "save_steps": 1,
    "save_total_limit": 10,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Ten pairs of different lengths: steps of 4, 4 and 2."""
    source = (runs.QUICKSTART / "train.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in source[:10]]
    for i, row in enumerate(rows):
        row["responses"] = row["responses"][:2]
        row["responses"][0]["text"] *= 1 + i % 3
    return runs.write_jsonl(tmp_path_factory.mktemp("data") / "data.jsonl", rows)


@pytest.fixture(scope="module")
def written(tmp_path_factory, tiny_model, data):
    """Writes a config into a folder."""
    prepared = str(tmp_path_factory.mktemp("prepared"))

    def write(folder, **changes):
        settings = TRAINING | {"dataset_prepared_path": prepared} | changes
        values = runs.config(folder, tiny_model, data, **settings)
        return runs.write_config(folder, values)

    return write


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, written):
    """(folder, what was logged by step) of a run with a checkpoint at every step."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    return folder, logged(runs.train(written(folder)).state.log_history)


def logged(history):
    """Losses, metrics, learning rates and norms by step; not the times."""
    names = ("loss", "amopo/", "rewards/", "logps/", "learning_rate", "grad_norm")
    return {
        entry["step"]: {k: v for k, v in entry.items() if k.startswith(names)}
        for entry in history
        if "loss" in entry
    }


def final_weights(folder):
    return load_file(folder / "out" / "adapter_model.safetensors")


def same_weights(folder, other, tolerance=0.0):
    ours, theirs = final_weights(folder), final_weights(other)
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        torch.testing.assert_close(weight, theirs[name], rtol=0, atol=tolerance)


def copy_until(source, folder, step):
    """The output folder of a run, without the checkpoints after a step."""
    shutil.copytree(source / "out", folder / "out", dirs_exist_ok=True)
    for path in (folder / "out").glob("checkpoint-*"):
        if int(path.name.split("-")[1]) > step:
            shutil.rmtree(path)
    (folder / "out" / "adapter_model.safetensors").unlink()


# A resumed run saves nothing: these are the slow part.
RESUMED = {"auto_resume_from_checkpoints": True, "save_steps": None, "save_strategy": "no"}


@pytest.mark.parametrize("step", [3, 4], ids=["between epochs", "in an epoch"])
def test_a_resumed_run_goes_on(step, tmp_path, written, uninterrupted):
    """Bit for bit, with a newer checkpoint that is damaged."""
    source, expected = uninterrupted
    copy_until(source, tmp_path, step + 1)
    truncate(tmp_path / "out" / f"checkpoint-{step + 1}" / "optimizer.pt")
    trainer = runs.train(written(tmp_path, **RESUMED))
    assert trainer._initial_global_step == step
    taken = str(tmp_path / "out" / f"checkpoint-{step}")
    assert trainer.axolotl_cfg.resume_from_checkpoint == taken
    assert logged(trainer.state.log_history) == expected
    same_weights(tmp_path, source)
    assert (tmp_path / "out" / f"_damaged-checkpoint-{step + 1}").is_dir()


def test_a_damaged_one_named_in_the_config(tmp_path, written, uninterrupted):
    copy_until(uninterrupted[0], tmp_path, 3)
    path = tmp_path / "out" / "checkpoint-3"
    flip(path / "optimizer.pt")
    with pytest.raises(
        AMoPOError, match=r"optimizer.pt doesn't .* Write .*checkpoint-2, the newest"
    ):
        runs.train(written(tmp_path, resume_from_checkpoint=str(path)))


class Code:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_hostile_one_runs_no_code(name, tmp_path, written, uninterrupted):
    """Without sharding, torch unpickles weights alone."""
    copy_until(uninterrupted[0], tmp_path, 3)
    path, trap = tmp_path / "out" / "checkpoint-3", tmp_path / "trap"
    torch.save({"state": Code(trap)}, path / name)
    torch.load(path / name, weights_only=False)
    assert trap.exists()  # it does work
    trap.unlink()
    (path / MANIFEST).unlink()
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        runs.train(written(tmp_path, resume_from_checkpoint=str(path)))
    assert not trap.exists()


def contents(folder):
    """Of a checkpoint, but for times and names that differ from run to run."""
    state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    names = ("adapter_model.safetensors", "optimizer.pt", "scheduler.pt")
    random = torch.load(folder / "rng_state.pth", weights_only=False)["cpu"].tolist()
    files = [(folder / name).read_bytes() for name in names]
    return [logged(state["log_history"]), random, *files]


def test_killed_at_every_moment(tmp_path, written, uninterrupted, forks):
    """Before, amid and after each change of the disk by which a checkpoint is written.

    The newest is, byte for byte, one of the uninterrupted run's, from which resuming goes on.
    """
    source, _ = uninterrupted
    config = written(tmp_path, save_total_limit=1, plugins=RECORDER)
    forks(1, tmp_path, "checkpoint_worker", "killed_at_every_moment", str(config), str(tmp_path))
    taken = []
    moments = [path for path in tmp_path.iterdir() if path.name.isdigit()]
    for moment in sorted(moments, key=lambda path: int(path.name)):
        name = newest(moment, replace(RUN, processes=1, rows=10))
        assert contents(moment / name) == contents(source / "out" / name), moment
        taken.append(name)
    assert len(taken) > 30
    assert taken == sorted(taken)
    assert set(taken) == {"checkpoint-3", "checkpoint-4"}


@pytest.fixture(scope="module")
def ddp(tmp_path_factory, written, forks):
    """Trains on several processes; returns (folder, what the main process logged by step)."""

    def train(
        folder=None, world=2, function=("parallel_worker", "train"), kind="ddp", extra=(), **changes
    ):
        folder = folder or tmp_path_factory.mktemp(kind)
        settings = {"plugins": RECORDER, "micro_batch_size": 1, "save_steps": 2} | changes
        path = written(folder, **settings)
        forks(world, folder, *function, kind, str(path), str(folder), *extra)
        report = json.loads((folder / "0.json").read_text(encoding="utf-8"))
        return folder, logged(report["log"])

    return train


@pytest.fixture(scope="module")
def two_processes(ddp):
    return ddp()


def test_one_process_is_killed_amid_a_save(ddp, two_processes, tmp_path):
    """While it writes the state of its random numbers, when the other has written all of its."""
    killed = ("checkpoint_worker", "train_until_killed")
    with pytest.raises(AssertionError, match=r"process . ended with"):
        ddp(tmp_path, function=killed, extra=["1", "rng_state_1.pth"])
    half = (tmp_path / "out" / "checkpoint-4" / "rng_state_1.pth").stat().st_size
    assert half < (tmp_path / "out" / "checkpoint-2" / "rng_state_1.pth").stat().st_size
    assert (tmp_path / "out" / "checkpoint-4" / "trainer_state.json").exists()

    _, log = ddp(tmp_path, **RESUMED)
    assert log == two_processes[1]
    same_weights(tmp_path, two_processes[0])
    text = (tmp_path / "0.log").read_text(encoding="utf-8")
    assert "checkpoint-4 can't be resumed: the run ended while it was written" in text
    assert text.count("checkpoint-2, which is complete") == 1


def test_machines_without_a_shared_disk(ddp, two_processes, tmp_path):
    """One of them has a checkpoint that the other was killed before completing."""
    apart = ("checkpoint_worker", "train_apart")
    with pytest.raises(AssertionError, match=r"process . ended with"):
        ddp(tmp_path, function=apart, extra=["1", "seal"], output_dir="out")
    outs = [tmp_path / rank / "out" for rank in "01"]
    assert all((out / "checkpoint-2" / "adapter_model.safetensors").exists() for out in outs)
    assert (outs[1] / "checkpoint-4" / "trainer_state.json").exists()

    _, log = ddp(tmp_path, function=apart, extra=["none", ""], output_dir="out", **RESUMED)
    assert log == two_processes[1]
    for out in outs:
        assert (out / "checkpoint-2").is_dir()
        assert not (out / "checkpoint-4").exists()
        same_weights(out.parent, two_processes[0])
    assert not [path.name for out in outs for path in out.glob("_amopo-probe*")]


@pytest.fixture(scope="module")
def without_dropout(tmp_path_factory, written):
    """Steps of six rows on one process, whose random numbers others need not share."""
    folder = tmp_path_factory.mktemp("alone")
    trainer = runs.train(written(folder, lora_dropout=0.0, micro_batch_size=6, max_steps=5, **ONE))
    return folder, logged(trainer.state.log_history)


ONE = {"gradient_accumulation_steps": 1, "save_steps": 3}


def close(log, expected):
    assert log.keys() == expected.keys()
    for step, entry in expected.items():
        assert log[step] == pytest.approx(entry, abs=1e-4), step


def test_on_other_processes_with_the_same_steps(ddp, without_dropout, tmp_path):
    """In the middle of the second epoch: from one process to three."""
    source, expected = without_dropout
    copy_until(source, tmp_path, 3)
    settings = {"lora_dropout": 0.0, "max_steps": 5, "gradient_accumulation_steps": 2}
    _, log = ddp(tmp_path, world=3, **settings, **RESUMED)
    close(log, expected)
    assert (tmp_path / "0.log").read_text(encoding="utf-8").count("checkpoint-3, which is") == 1


def test_sharded_on_other_processes(ddp, without_dropout, tmp_path):
    """FSDP2's pieces, of two processes and then of three."""
    _, expected = without_dropout
    wrapped = {
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "transformer_layer_cls_to_wrap": "LlamaDecoderLayer",
        "state_dict_type": "SHARDED_STATE_DICT",
        "reshard_after_forward": True,
    }
    settings = {"kind": "fsdp2", "fsdp_version": 2, "fsdp_config": wrapped, "lora_dropout": 0.0}
    settings["max_steps"] = 5
    folder, log = ddp(
        dp_shard_size=2, **settings | {"gradient_accumulation_steps": 3, "save_steps": 3}
    )
    close(log, expected)
    copy_until(folder, tmp_path, 3)
    three = {"world": 3, "dp_shard_size": 3, "gradient_accumulation_steps": 2}
    _, log = ddp(tmp_path, **settings, **three, **RESUMED)
    close(log, expected)


def test_zero_on_other_processes(ddp, tmp_path):
    """It goes on with as many; with others it ends in a sentence before anything is loaded."""
    sizes = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    settings = {"zero_optimization": {"stage": 2}, "gradient_clipping": "auto"}
    settings |= {"bf16": {"enabled": "auto"}} | dict.fromkeys(sizes, "auto")
    path = tmp_path / "deepspeed.json"
    path.write_text(json.dumps(settings), encoding="utf-8")
    zero = {"kind": "zero2", "deepspeed": str(path), "max_steps": 5}
    folder, expected = ddp(gradient_accumulation_steps=3, save_steps=3, **zero)
    copy_until(folder, tmp_path, 3)
    with pytest.raises(AssertionError, match=r"states of 2 processes, which 3 can't load; run 2"):
        ddp(tmp_path, world=3, gradient_accumulation_steps=2, **zero, **RESUMED)
    _, log = ddp(tmp_path, gradient_accumulation_steps=3, **zero, **RESUMED)
    assert log == expected
