"""One run: train, score, and for the first of each variant the same by the real commands.

A run's folder holds its state, a file per stage that is complete, so that a killed comparison goes
on at the stage in which it was:

    config.yml score.yml log.txt      what is run, and what it printed
    model/                            what training left
    trained.json scored.json          losses and cost; every pair's margins
    check/                            the same by `axolotl train` and `axolotl amopo score`
    run.json                          all of it: the run is complete
    failed.json                       why it is not
"""

import importlib.metadata
import json
import math
import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from filelock import FileLock, Timeout

from axolotl_amopo.commands.compare.comparison import Measure
from axolotl_amopo.commands.compare.data import export_pairs, exported_entry, write_yaml
from axolotl_amopo.commands.compare.forks import call
from axolotl_amopo.commands.compare.recorder import RECORD
from axolotl_amopo.commands.kit.launch import last_lines, run_command
from axolotl_amopo.config.files import read_yaml
from axolotl_amopo.config.hardware import suit_a_cpu
from axolotl_amopo.errors import AMoPOError

DONE, FAILED = "run.json", "failed.json"
BUSY = 75  # exit code: another process makes this run
# What rounding may make of a loss, and of a margin after several steps.
LOSS_TOLERANCE, MARGIN_TOLERANCE = 1e-3, 1e-2

Json = dict[str, Any]


@dataclass(frozen=True)
class Work:
    """Say all that one run needs; nothing of it is known to axolotl alone."""

    about: Json  # which run it is, for its line of the results
    folder: Path
    digest: str
    measure: Measure
    scoring: Json
    training: Json | None = None  # None: the model is there
    pairing: Json | None = None  # whose pairs one of axolotl's own methods trains on
    entry: Json | None = None  # of the base, whose chat template those pairs take
    model: str | None = None
    in_fork: bool = True  # or by the real commands
    check: bool = False


def finished(folder: Path) -> Json | None:
    """Return the line of a run that is complete."""
    return _read(folder / DONE)


def do_work(work: Work) -> None:
    """Do what is left of a run, in a process that was forked for it.

    Raises:
        SystemExit: BUSY where another process does it.
    """
    work.folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(work.folder / "lock", timeout=0):
            (work.folder / FAILED).unlink(missing_ok=True)
            _stages(work)
    except Timeout:
        sys.exit(BUSY)


def _stages(work: Work) -> None:
    folder = work.folder
    trained = _stage(work, "trained.json", _train)
    scored = _stage(work, "scored.json", _score)
    line = work.about | {"digest": work.digest, "made": "fork" if work.in_fork else "command"}
    if work.check and work.in_fork:
        checked = _stage(work, "checked.json", _check)
        line["differs"] = differences(trained, scored, checked)
    _write(folder / DONE, line | {"cost": trained, "scored": scored})


def _stage(work: Work, name: str, do: Any) -> Json:
    file = work.folder / name
    there = _read(file)
    if there is None or there.get("digest") != work.digest:
        there = do(work) | {"digest": work.digest}
        _write(file, there)
    return {key: value for key, value in there.items() if key != "digest"}


def _train(work: Work) -> Json:
    if work.training is None:
        return {}
    folder = work.folder
    shutil.rmtree(folder / "model", ignore_errors=True)  # of a run that was stopped
    values = dict(work.training)
    if work.pairing is not None:
        pairs = folder / "train_pairs.jsonl"
        count = call(export_pairs, work.pairing, pairs)
        print(f"{count} pairs exported to {pairs}", flush=True)
        values["datasets"] = [exported_entry(work.entry or {}, pairs)]
        if not _on_accelerator():
            suit_a_cpu(values)  # which the plugin does for `rl: amopo`
    path = write_yaml(folder / "config.yml", values)
    started = time.monotonic()
    if work.in_fork:
        call(train_here, str(path))
    else:
        _command("train", str(path))
    return _record(Path(values["output_dir"])) | {"wall_seconds": time.monotonic() - started}


def _record(folder: Path) -> Json:
    record = _read(folder / RECORD)
    if record is None:
        raise AMoPOError(f"training ended without {folder / RECORD}, so it is not known to be done")
    return record


def train_here(path: str) -> None:
    """Train as the process does that `axolotl train` launches."""
    from axolotl.cli.train import do_cli

    sys.argv = ["axolotl", path]  # it reads its own options there
    do_cli(config=path)


def _score(work: Work) -> Json:
    folder = work.folder
    path = write_yaml(folder / "score.yml", work.scoring)
    model = work.model or str(folder / "model")
    arguments = score_arguments(path, model, work.measure, folder)
    started = time.monotonic()
    if work.in_fork:
        call(amopo_here, arguments)
    else:
        _command("amopo", *arguments)
    return _scored(folder, work.scoring) | {"wall_seconds": time.monotonic() - started}


def score_arguments(path: Path, model: str, measure: Measure, folder: Path) -> list[str]:
    """Return the arguments of `axolotl amopo` that score a run's model."""
    options = {
        "--model": f"tuned={model}",
        "--prompts": measure.prompts,
        "--reward": measure.reward,
        "--seed": measure.seed,
        "--batch-pairs": measure.batch_pairs,
        "--pairs": folder / "pairs.jsonl",
        "--output": folder / "score.json",
    }
    if measure.limit:
        options["--limit"] = measure.limit
    flags = ["--quiet", "--force"]
    if measure.reward != "reference":
        flags.append("--no-base")
    return ["score", str(path), *flags, *(str(one) for pair in options.items() for one in pair)]


def amopo_here(arguments: list[str]) -> None:
    """Run `axolotl amopo ...` in this process, found where the package offers it to axolotl.

    A command imports no other; as its users do, this one passes arguments and reads files.

    Raises:
        AMoPOError: with the sentence of the command.
    """
    (entry,) = importlib.metadata.entry_points(group="axolotl.cli_commands", name="amopo")
    try:
        entry.load().main(arguments, prog_name="axolotl-amopo", standalone_mode=False)
    except click.ClickException as error:
        raise AMoPOError(error.format_message()) from None


def _scored(folder: Path, scoring: Json) -> Json:
    """Return what `score` found by a config, pair by pair.

    Where the config's prompts have no instruction, `score` has one kind of prompt, which is both.
    """
    block = scoring["amopo"]
    unsteered = block.get("instruction") == block.get("overall_instruction") == ""
    with open(folder / "pairs.jsonl", encoding="utf-8") as file:
        lines = [json.loads(line) for line in file]
    names = list(lines[0]["labels"])
    margins = [line["margins"]["tuned"] for line in lines]
    for one in margins:
        if unsteered and one["plain"] is None:
            one["plain"] = next((one[name] for name in names if one[name] is not None), None)
    return {
        "names": names,
        "where": [line["where"] for line in lines],
        "prompt": [line["prompt"] for line in lines],
        "tokens": [line["tokens"] for line in lines],
        "labels": [[line["labels"][name] for name in names] for line in lines],
        "own": [[_short(one[name]) for name in names] for one in margins],
        "plain": [_short(one["plain"]) for one in margins],
    }


def _short(value: float | None) -> float | None:
    """Return a margin with the digits that a float32 has."""
    return None if value is None or math.isnan(value) else float(f"{value:.7g}")


def _check(work: Work) -> Json:
    """Train and score again by the real commands, into a folder beside."""
    folder = work.folder / "check"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    values = read_yaml(work.folder / "config.yml")
    values["output_dir"] = str(folder / "model")
    path = write_yaml(folder / "config.yml", values)
    _command("train", str(path))
    scoring = write_yaml(folder / "score.yml", work.scoring)
    _command("amopo", *score_arguments(scoring, str(folder / "model"), work.measure, folder))
    return {"losses": _record(folder / "model")["losses"]} | _scored(folder, work.scoring)


def differences(trained: Json, scored: Json, checked: Json) -> list[str]:
    """Return sentences on what the real commands gave otherwise; none where they agree."""
    made = []
    if len(trained["losses"]) != len(checked["losses"]):
        made.append(
            f"{len(trained['losses'])} losses were logged, by the command {len(checked['losses'])}"
        )
    for (step, loss), (_, other) in zip(trained["losses"], checked["losses"], strict=False):
        if not _near(loss, other, LOSS_TOLERANCE):
            made.append(f"the loss at step {step} is {loss:.6g}, by the command {other:.6g}")
            break
    for name in ("where", "labels"):
        if scored[name] != checked[name]:
            made.append("other pairs were scored")
            break
    else:
        for name in ("own", "plain"):
            ours, theirs = _flat(scored[name]), _flat(checked[name])
            furthest = max(
                (abs((a or 0) - (b or 0)) for a, b in zip(ours, theirs, strict=True)), default=0.0
            )
            if not furthest <= MARGIN_TOLERANCE:
                made.append(f"margins ({name} prompts) differ by up to {furthest:.3g}")
    return made


def _near(one: float, other: float, tolerance: float) -> bool:
    return one == other or abs(one - other) <= tolerance * max(1.0, abs(one), abs(other))


def _flat(values: list[Any]) -> list[float | None]:
    return [one for value in values for one in (value if isinstance(value, list) else [value])]


def _on_accelerator() -> bool:
    import torch

    return torch.accelerator.is_available()


def _command(*arguments: str) -> None:
    """Run a command of axolotl's; what it prints goes where this process prints.

    Raises:
        AMoPOError: where it fails.
    """
    print(f"$ axolotl {' '.join(arguments)}", flush=True)
    code = run_command(["axolotl", *arguments])
    if code:
        raise AMoPOError(f"axolotl {arguments[0]} ended with {code}")


def note_failure(work: Work, exit_code: int | None) -> str:
    """Write down that a run's process failed, and return its last lines."""
    reason = last_lines(work.folder / "log.txt") or f"it ended with {exit_code}"
    _write(work.folder / FAILED, work.about | {"digest": work.digest, "failed": reason})
    return reason


def _read(path: Path) -> Json | None:
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise AMoPOError(f"{path}: is broken; delete it, and that stage is done again.") from None


def _write(path: Path, facts: Mapping[str, Any]) -> None:
    """Write a file whole or not at all."""
    new = path.with_name(f"_{path.name}")
    new.write_text(json.dumps(facts) + "\n", encoding="utf-8")
    new.replace(path)
