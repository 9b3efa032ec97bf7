"""Checkpoints that survive a kill at any moment.

A checkpoint is marked as unfinished before its first file is written; when every process is through
with its files, a manifest with the size and checksum of each replaces the mark, and only then are
older checkpoints deleted. Resuming takes the newest checkpoint that its manifest still describes.

Processes may share a disk or not. What is done once a disk is done by its first process, and what a
disk holds counts only together with what the others hold. All methods of `Checkpoints` are
collectives: every process calls them, and an error on one is raised on all.
"""

import json
import os
import re
import secrets
import shutil
import zipfile
import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from accelerate import PartialState
from accelerate.utils import gather_object
from axolotl.utils.logging import get_logger
from safetensors import SafetensorError, safe_open
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from axolotl_amopo.errors import AMoPOError

LOG = get_logger(__name__)

MANIFEST = "amopo_manifest.json"
# No name that begins like a checkpoint's, which axolotl and transformers would take for one; an
# underscore keeps a folder from being uploaded to the hub.
DAMAGED, REPLACED = "_damaged-", "_replaced-"
# Callbacks of axolotl's write into it after the checkpoint is saved; resuming doesn't read it.
CHANGING = "adapter_config.json"
WEIGHTS = ("*model*.safetensors", "*model*.bin", "*.distcp", "*model_states.pt")
# What is read at a time, by so many threads of a process.
CHUNK_BYTES, THREADS = 2**24, 4


@dataclass(frozen=True)
class Run:
    """What decides whether a checkpoint can be resumed, and goes on with the same rows."""

    processes: int
    micro_batch_size: int
    gradient_accumulation_steps: int
    seed: int  # of the order of the rows
    rows: int
    group_by_length: bool | None
    sharding: str = ""  # what cuts model or optimizer into pieces; empty for none
    resizable: bool = True  # whether the pieces of another number of processes can be loaded

    @property
    def pass_size(self) -> int:
        return self.micro_batch_size * self.processes

    @property
    def step_size(self) -> int:
        return self.pass_size * self.gradient_accumulation_steps


class Outline(NamedTuple):
    """What a disk has of a checkpoint, as far as names and sizes tell."""

    wrong: str = ""
    save: str | None = None  # names the save, the same on all disks; None without a manifest
    run: Run | None = None
    optimizer: bool = True  # whether its state is there


class Checkpoints:
    """The checkpoints in an output folder.

    Args:
        folder: the same path on every process, on one disk or several.
        run: of this run.
    """

    def __init__(self, folder: str, run: Run):
        self.folder = Path(folder)
        self.run = run
        self.rank, self.world = PartialState().process_index, PartialState().num_processes
        self.disks = self._find_disks()  # by process, the first one that has the same disk
        self.first_ranks = sorted(set(self.disks))
        self.ranks_on_disk = [
            r for r in range(self.world) if self.disks[r] == self.disks[self.rank]
        ]

    @property
    def first_of_disk(self) -> bool:
        return self.rank == self.ranks_on_disk[0]

    @property
    def separate(self) -> bool:
        """Whether the folder is on several disks."""
        return len(self.first_ranks) > 1

    def each_saves(self) -> bool:
        """Whether the first process of every machine has to save, not the main process alone."""
        if not self.separate:
            return False
        if reason := self._in_pieces():
            LOG.warning("AMoPO: CHECKPOINTS OF THIS RUN CAN'T BE RESUMED: %s", reason)
            return False
        LOG.info(
            "AMoPO: output_dir is on %s disks: every machine saves checkpoints.",
            len(self.first_ranks),
        )
        return True

    def begin(self, folder: Path) -> None:
        """Make a checkpoint's folder, empty and marked as unfinished."""

        def prepare() -> str:
            moved = ""
            if folder.is_dir() and any(folder.iterdir()):
                if _outline(folder).wrong:
                    moved = _set_aside(folder)
                else:  # kept until the new one is complete
                    replaced = folder.with_name(REPLACED + folder.name)
                    shutil.rmtree(replaced, ignore_errors=True)
                    folder.rename(replaced)
            folder.mkdir(parents=True, exist_ok=True)
            _write_manifest(folder, {"files": None})
            return moved

        moved = self._everywhere(prepare if self.first_of_disk else str)
        if any(moved):
            LOG.warning(
                "AMoPO: an incomplete %s was in the way; it is set aside as %s; delete it when you "
                "like.",
                folder,
                max(moved),
            )

    def finish(self, folder: Path, limit: int | None, best: str | None) -> None:
        """Seal a checkpoint that every process has written its part of; delete the oldest ones.

        Args:
            limit: how many are kept.
            best: the path of one that is always kept.
        """
        # A process sees at least its own files, whatever a network file system caches.
        seen = self._everywhere(lambda: set(_files(folder)))
        mine = []
        for i, name in enumerate(sorted(set().union(*(seen[rank] for rank in self.ranks_on_disk)))):
            readers = [rank for rank in self.ranks_on_disk if name in seen[rank]]
            if readers[i % len(readers)] == self.rank:
                mine.append(name)
        sums = self._everywhere(lambda: _checksums(folder, mine, sync=True))
        save = self._everywhere(lambda: secrets.token_hex(8))[0]

        def seal() -> None:
            files = {
                name: entry for rank in self.ranks_on_disk for name, entry in sums[rank].items()
            }
            _write_manifest(folder, {"save": save, "run": asdict(self.run), "files": files})

        self._everywhere(seal if self.first_of_disk else _nothing)

        def clean() -> None:
            shutil.rmtree(folder.with_name(REPLACED + folder.name), ignore_errors=True)
            # By age, as transformers does: after a resume from an older one, numbers mislead.
            rotate_checkpoints(str(folder.parent), limit, best, use_mtime=True)

        self._everywhere(clean if self.first_of_disk else _nothing)

    def newest(self) -> str | None:
        """The newest checkpoint that is complete on every disk, if any.

        Those that are not complete are renamed, so that axolotl and transformers, which go by the
        highest number, don't take them.

        Raises:
            AMoPOError: where this run can't go on from it.
        """
        if (reason := self._in_pieces()) and any(self._everywhere(self._numbers)):
            raise AMoPOError(reason)
        number, outline, rejected = self._search()
        moved = self._everywhere(
            lambda: (
                {n: _set_aside(path) for n in rejected if (path := self._path(n)).is_dir()}
                if self.first_of_disk
                else {}
            )
        )
        for n, wrong in rejected.items():
            where = next(names[n] for names in moved if n in names)
            LOG.warning(
                "AMoPO: %s can't be resumed: %s. It is set aside as %s; delete it when you like.",
                self._path(n),
                wrong,
                where,
            )
        if number is None:
            if rejected:
                LOG.warning(
                    "AMoPO: NO COMPLETE CHECKPOINT IN %s: TRAINING STARTS ANEW. Stop it if that is "
                    "not what you want.",
                    self.folder,
                )
            else:
                LOG.info("AMoPO: no checkpoint in %s yet: training starts anew.", self.folder)
            return None
        return self._accept(self._path(number), outline)

    def named(self, path: str) -> str:
        """A checkpoint that the user has named.

        Raises:
            AMoPOError: where it is damaged, naming the one to take instead; or where this run
                can't go on from it.
        """
        if reason := self._in_pieces():
            raise AMoPOError(reason)
        self._everywhere(self._recover if self.first_of_disk else _nothing)
        looks = self._everywhere(lambda: _outline(Path(path)) if self.first_of_disk else Outline())
        outlines = [looks[rank] for rank in self.first_ranks]
        wrong = self._compare(outlines) or self._contents(Path(path))
        if wrong:
            number, _, _ = self._search()
            raise AMoPOError(
                f"resume_from_checkpoint: {path} can't be resumed: {wrong}. "
                + (
                    f"Remove the key: {self.folder} has no complete checkpoint."
                    if number is None
                    else f"Write {self._path(number)}, the newest complete checkpoint."
                )
            )
        return self._accept(Path(path), outlines[0])

    def _search(self) -> tuple[int | None, Outline, dict[int, str]]:
        """(the newest complete one's number, its outline, what is wrong with others by number)."""
        self._everywhere(self._recover if self.first_of_disk else _nothing)
        looks = self._everywhere(
            lambda: (
                {n: _outline(self._path(n)) for n in self._numbers()} if self.first_of_disk else {}
            )
        )
        number, outline, rejected = None, Outline(), {}
        for n in sorted(set().union(*looks), reverse=True):
            missing = Outline("it is not there")
            outlines = [looks[rank].get(n, missing) for rank in self.first_ranks]
            wrong = self._compare(outlines)
            # Contents take long to read: only until a complete one is found.
            if number is None and not wrong and not (wrong := self._contents(self._path(n))):
                number, outline = n, outlines[0]
            if wrong:
                rejected[n] = wrong
        return number, outline, rejected

    def _compare(self, outlines: list[Outline]) -> str:
        """What is wrong with a checkpoint, from what each disk has of it."""
        on = " (on one of the disks)" if self.separate else ""
        for outline in outlines:
            if outline.wrong:
                return outline.wrong + on
        return "each disk has another save of it" if len({o.save for o in outlines}) > 1 else ""

    def _contents(self, folder: Path) -> str:
        """What is wrong with the contents of files whose sizes are right."""

        def check() -> str:
            manifest = _read_manifest(folder)
            names = sorted(manifest["files"] if manifest else _files(folder))
            mine = names[self.ranks_on_disk.index(self.rank) :: len(self.ranks_on_disk)]
            if manifest is None:
                return _together(_unreadable(folder / name) for name in mine)
            entries = manifest["files"]
            return _together(
                f"{name} doesn't hold what was written"
                for name, entry in _checksums(folder, mine).items()
                if entry != entries[name]
            )

        return _together(self._everywhere(check))

    def _accept(self, path: Path, outline: Outline) -> str:
        run, saved = self.run, outline.run
        if not outline.optimizer:
            LOG.warning(
                "AMoPO: %s has no optimizer state (save_only_model: true?): the optimizer and the "
                "learning rate's schedule start anew.",
                path,
            )
        if saved is None:
            LOG.warning(
                "AMoPO: resuming from %s. It has no %s (axolotl alone wrote it, or an earlier "
                "version of the plugin): its files look whole, but can't be verified fully, nor "
                "whether this run takes as many examples per optimizer step.",
                path,
                MANIFEST,
            )
            return str(path)
        if saved.sharding != run.sharding:
            raise AMoPOError(
                f"{path} was saved under {saved.sharding or 'no sharding'} and can't be resumed "
                f"under {run.sharding or 'none'}; run as it was saved."
            )
        if saved.processes != run.processes and not run.resizable:
            raise AMoPOError(
                f"{path} holds {saved.sharding} states of {saved.processes} processes, which "
                f"{run.processes} can't load; run {saved.processes}, or convert it with "
                'DeepSpeed\'s ds_to_universal.py and write "checkpoint": {"load_universal": true} '
                "in the deepspeed config."
            )
        if saved.step_size != run.step_size:
            steps, rest = divmod(saved.step_size, run.pass_size)
            raise AMoPOError(
                f"{path} was trained with {saved.step_size} examples per optimizer step, and this "
                f"run takes {run.step_size} (micro_batch_size {run.micro_batch_size} x "
                f"gradient_accumulation_steps {run.gradient_accumulation_steps} x {run.processes} "
                "processes): it would go on at another place in the data; "
                + (
                    f"choose sizes whose product is {saved.step_size}."
                    if rest
                    else f"write gradient_accumulation_steps: {steps}."
                )
            )
        if run.group_by_length and saved.pass_size != run.pass_size:
            raise AMoPOError(
                f"{path} was trained with {saved.pass_size} examples in a forward pass, and this "
                f"run takes {run.pass_size}: with group_by_length: true the rows come in another "
                f"order then; choose micro_batch_size so that times {run.processes} processes it "
                f"is {saved.pass_size}."
            )
        for key in ("seed", "rows", "group_by_length"):
            then, now = getattr(saved, key), getattr(run, key)
            if then != now:
                LOG.warning(
                    "AMoPO: %s was %s when %s was saved and is %s now: rows come in another order, "
                    "so that some of this epoch's come twice and others not at all; to go on as "
                    "before, %s.",
                    key,
                    then,
                    path,
                    now,
                    "train on the same data" if key == "rows" else f"write {key}: {then}",
                )
        LOG.info("AMoPO: resuming from %s, which is complete.", path)
        return str(path)

    def _in_pieces(self) -> str:
        """Why nothing can be resumed here, whatever the disks hold; empty where that isn't so."""
        if not (self.separate and self.run.sharding):
            return ""
        return (
            f"output_dir: {self.folder} is on {len(self.first_ranks)} disks, and a checkpoint "
            f"under {self.run.sharding} is in pieces on all of them; put output_dir where all "
            "machines share it."
        )

    def _recover(self) -> None:
        """Bring back a checkpoint that was being replaced, unless the new one is complete."""
        for replaced in self.folder.glob(f"{REPLACED}{PREFIX_CHECKPOINT_DIR}-*"):
            path = replaced.with_name(replaced.name.removeprefix(REPLACED))
            if not _outline(path).wrong:
                shutil.rmtree(replaced)
                continue
            if path.is_dir():
                _set_aside(path)
            replaced.rename(path)

    def _numbers(self) -> list[int]:
        matches = (
            re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", path.name)
            for path in self.folder.iterdir()
            if path.is_dir()
        )
        return [int(match[1]) for match in matches if match]

    def _path(self, number: int) -> Path:
        return self.folder / f"{PREFIX_CHECKPOINT_DIR}-{number}"

    def _find_disks(self) -> list[int]:
        self._everywhere(lambda: self.folder.mkdir(parents=True, exist_ok=True))
        if self.world == 1:
            return [0]
        token = self._everywhere(lambda: secrets.token_hex(4))[0]
        probes = [self.folder / f"_amopo-probe-{token}-{rank}" for rank in range(self.world)]
        self._everywhere(probes[self.rank].touch)
        disks = self._everywhere(lambda: next(r for r, p in enumerate(probes) if p.exists()))
        self._everywhere(probes[self.rank].unlink)
        return disks

    def _everywhere[T](self, work: Callable[[], T]) -> list[T]:
        """What `work` returns on every process; also a barrier.

        Raises:
            AMoPOError: on all of them, if it fails on one.
        """
        try:
            outcome = (work(), "")
        except Exception as error:
            outcome = (None, f"{type(error).__name__}: {error}")
        outcomes = gather_object([outcome])
        for rank, (_, error) in enumerate(outcomes):
            if error:
                raise AMoPOError(f"Checkpoints in {self.folder}: process {rank}: {error}")
        return [result for result, _ in outcomes]


def _nothing() -> None: ...


def _set_aside(folder: Path) -> str:
    """Rename a checkpoint that can't be resumed; returns its new name."""
    name, count = DAMAGED + folder.name, 1
    while folder.with_name(name).exists():
        count += 1
        name = f"{DAMAGED}{folder.name}-{count}"
    folder.rename(folder.with_name(name))
    return name


def _files(folder: Path) -> list[str]:
    """Paths in a checkpoint, relative to it, the manifest's own left out."""
    paths = (path for path in folder.rglob("*") if path.is_file())
    names = (path.relative_to(folder).as_posix() for path in paths)
    return [name for name in names if not name.startswith(MANIFEST)]


def _write_manifest(folder: Path, content: dict[str, Any]) -> None:
    draft = folder / f"{MANIFEST}.new"
    with draft.open("w", encoding="utf-8") as file:
        json.dump(content, file)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(folder / MANIFEST)


def _read_manifest(folder: Path) -> dict[str, Any] | None:
    path = folder / MANIFEST
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def _checksums(folder: Path, names: list[str], sync: bool = False) -> dict[str, list[int] | None]:
    """Size and checksum by name; None for the file that may change.

    Args:
        sync: wait until the contents have reached the disk, since older checkpoints are deleted
            on the strength of this one.
    """

    def part(path: Path, offset: int) -> bytes:
        with path.open("rb") as file:
            file.seek(offset)
            return zlib.crc32(file.read(CHUNK_BYTES)).to_bytes(4, "little")

    sums = {}
    with ThreadPoolExecutor(THREADS) as pool:
        for name in names:
            path = folder / name
            if path.name == CHANGING:
                sums[name] = None
                continue
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                if sync:
                    os.fsync(file.fileno())
            offsets = range(0, size, CHUNK_BYTES)
            parts = pool.map(lambda offset, path=path: part(path, offset), offsets)
            sums[name] = [size, zlib.crc32(b"".join(parts))]
    return sums


def _together(problems: Iterable[str]) -> str:
    """The first three problems, as one clause."""
    found = [problem for problem in problems if problem]
    rest = [f"and {len(found) - 3} more"] if len(found) > 3 else []
    return ", ".join(found[:3] + rest)


def _outline(folder: Path) -> Outline:
    if not folder.is_dir():
        return Outline("there is no such folder")
    try:
        manifest = _read_manifest(folder)
        if manifest is None:
            return Outline(_judge(folder), optimizer=_has_optimizer(_files(folder)))
        files = manifest["files"]
        if files is None:
            return Outline("the run ended while it was written")
        wrong = _together(_size_problem(folder, name, entry) for name, entry in files.items())
        if TRAINER_STATE_NAME not in files:
            wrong = wrong or f"it was saved without {TRAINER_STATE_NAME}"
        return Outline(wrong, manifest["save"], Run(**manifest["run"]), _has_optimizer(files))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return Outline(f"{MANIFEST} is damaged")


def _has_optimizer(names: Iterable[str]) -> bool:
    return any("optimizer" in name or "optim_states" in name for name in names)


def _size_problem(folder: Path, name: str, entry: list[int] | None) -> str:
    path = folder / name
    if not path.is_file():
        return f"{name} is missing"
    size = path.stat().st_size
    return f"{name} has {size} of {entry[0]} bytes" if entry and size != entry[0] else ""


def _judge(folder: Path) -> str:
    """What is missing from a checkpoint without a manifest."""
    names = _files(folder)
    state = folder / TRAINER_STATE_NAME
    # Written last, by transformers.
    if problem := f"{TRAINER_STATE_NAME} is missing" if not state.exists() else _unreadable(state):
        return problem
    if not any(Path(name).match(pattern) for name in names for pattern in WEIGHTS):
        return "it has no weights"
    for index in folder.glob("*.index.json"):
        if problem := _unreadable(index):
            return problem
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        if missing := shards - set(names):
            return f"{min(missing)} is missing"
    for parts in {Path(name).parent for name in names if name.endswith(".distcp")}:
        if not (folder / parts / ".metadata").is_file():
            return f"{parts}/.metadata is missing"
    ranks = {int(m[1]) for name in names if (m := re.fullmatch(r"rng_state_(\d+)\.pth", name))}
    if missing := set(range(max(ranks, default=-1) + 1)) - ranks:
        return f"rng_state_{min(missing)}.pth is missing"
    latest = folder / "latest"  # DeepSpeed keeps the rest in the folder that it names
    if latest.exists():
        tag = latest.read_text(encoding="utf-8").strip()
        return "" if (folder / tag).is_dir() else f"{tag} is missing"
    # All of these, or, with save_only_model, none.
    parts = {
        "optimizer.pt": _has_optimizer(names),
        SCHEDULER_NAME: SCHEDULER_NAME in names,
        "rng_state.pth": bool(ranks) or "rng_state.pth" in names,
    }
    if any(parts.values()):
        return _together(f"{part} is missing" for part, there in parts.items() if not there)
    return ""


def _unreadable(path: Path) -> str:
    """What is wrong with a file, as far as its format tells. Nothing is unpickled."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt"):  # the header, and whether the size fits it
                pass
        elif path.suffix in (".pt", ".pth", ".bin"):
            with zipfile.ZipFile(path) as archive:
                if archive.testzip():
                    return f"{path.name} is damaged"
        elif path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
        elif path.suffix == ".distcp" and not path.stat().st_size:
            return f"{path.name} is empty"
    except (OSError, ValueError, SafetensorError, zipfile.BadZipFile):
        return f"{path.name} is damaged"
    return ""
