"""The stages of a round: commands of this package and of axolotl's, each in its own process."""

import json
import shlex
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from axolotl_amopo.commands.kit.launch import last_lines, own_folder, run_command
from axolotl_amopo.commands.kit.questions import read_prompts
from axolotl_amopo.commands.online.plan import RATED, Online, drawn_rows, round_config, spread
from axolotl_amopo.config.files import digest
from axolotl_amopo.errors import AMoPOError, DataError

OURS = ("axolotl-amopo",)
STATE = "online.json"
DONE = "stages.jsonl"
# In the environment of all that a stage starts: the folder of the rounds.
MARK = "AXOLOTL_AMOPO_ROUNDS"
PAGE = "steered.html"
START = "start.yml"

Say = Callable[[str], None]


@dataclass(frozen=True)
class Stage:
    """Hold one command of a round."""

    name: str
    command: list[str]

    @property
    def tells_facts(self) -> bool:
        """Return whether it prints JSON."""
        return "--json" in self.command


def stages(plan: Online, number: int) -> list[Stage]:
    """Return the commands of a round, in order; each reads and writes files of its folder."""
    file, folder = plan.file, plan.folder(number)
    config = str(folder / "config.yml")
    # What the first round begins with is the config's own model, steered as its YAML says.
    model = [str(folder / START), "--base"] if number == 1 else [str(plan.model(number - 1))]
    drawing = options(
        input=folder / "prompts.jsonl",
        output=folder / "candidates.jsonl",
        candidates=file.responses,
        temperatures=",".join(map(str, file.temperatures)),
        max_new_tokens=file.max_new_tokens,
        batch_size=file.batch_size,
        backend=file.backend,
        seed=file.seed + number,
    )
    asked = [part for one in spread(plan, number) for part in ("--spread", one)]
    rating = options(raters=file.raters, output=folder / RATED)
    candidates = str(folder / "candidates.jsonl")
    made = [
        Stage("generate", [*OURS, "generate", *model, *drawing, *asked, "--resume", "--json"]),
        Stage("rate", [*OURS, "rate", candidates, *rating, "--force", "--json"]),
    ]
    if plan.block.other_references or (number > 1 and plan.takes_reference):
        made.append(Stage("reference", [*OURS, "reference", config, "--json"]))
    made.append(Stage("train", ["axolotl", "train", config, *file.train_options]))
    if file.held_out:
        made.append(Stage("steer", steering(plan, number)))
    return made


def steering(plan: Online, number: int) -> list[str]:
    """Return the command that measures the models so far; those before are not asked again."""
    file = plan.file
    others = (f"round-{k}={plan.model(k)}" for k in range(2, number + 1))
    measuring = options(
        raters=file.raters,
        input=file.held_out,
        output=plan.output / "steered",
        html=plan.folder(number) / PAGE,
        **file.measure.model_dump(),
        batch_size=file.batch_size,
        backend=file.backend,
        seed=file.seed,
        # A whole model does not say what it was trained from.
        base_model=None if plan.base.get("adapter") else plan.base["base_model"],
    )
    named = [part for one in others for part in ("--model", one)]
    return [*OURS, "steer", str(plan.model(1)), *named, *measuring, "--json"]


def options(**values: Any) -> list[str]:
    """Return options of a command line; those that are None are left out."""
    given = {key: value for key, value in values.items() if value is not None}
    return [
        part for key, value in given.items() for part in (f"--{key.replace('_', '-')}", str(value))
    ]


def run_rounds(plan: Online, say: Say, *, force: bool = False) -> list[dict[str, Any]]:
    """Run what is missing of all rounds, and return what each stage has told.

    Args:
        say: is told what is done, line by line.
        force: go on with a plan that has changed.

    Raises:
        AMoPOError: where a stage fails, the folder belongs to another plan, or another process is
            at work in it.
    """
    # All that can fail does so before there is a folder, or a model has been trained.
    prompts = read_rows(plan.file.prompts)
    drawn_rows(plan, prompts, 1)
    if plan.file.held_out:
        read_rows(plan.file.held_out)
    with only_one(plan.output):
        check_same(plan, force=force)
        told = []
        for number in range(1, plan.file.rounds + 1):
            prepare(plan, prompts, number)
            facts: dict[str, Any] = {"round": number}
            for stage in stages(plan, number):
                facts[stage.name] = run_stage(plan.folder(number), stage, say)
            told.append(facts)
        return told


def read_rows(path: str) -> list[dict[str, Any]]:
    """Return the rows of a file of prompts.

    Raises:
        DataError: for a row that is no prompt, or has several questions.
    """
    prompts = read_prompts(Path(path))
    for prompt in prompts:
        if prompt.later:
            raise DataError(
                f"{prompt.where}: has several questions; write it as messages, up to the question "
                "to answer."
            )
    return [prompt.row for prompt in prompts]


def prepare(plan: Online, prompts: list[dict[str, Any]], number: int) -> None:
    """Write a round's prompts and its config."""
    folder = plan.folder(number)
    folder.mkdir(parents=True, exist_ok=True)
    done = finished(folder)
    if all(stage.name in done for stage in stages(plan, number)):
        return
    # What a stage has read stays as it was then.
    if "generate" not in done:
        rows = drawn_rows(plan, prompts, number)
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / "prompts.jsonl").write_text(text, encoding="utf-8")
    if "train" not in done:
        config = round_config(plan, number)
        write_yaml(folder / "config.yml", config)
        if number == 1:
            # By which `generate` knows how the untuned model is asked; nothing is rated yet.
            entry = config["datasets"][0] | {"path": str(folder / "prompts.jsonl")}
            write_yaml(folder / START, config | {"datasets": [entry]})
    if "steer" not in done:
        (folder / PAGE).unlink(missing_ok=True)  # of a stage that was stopped


def write_yaml(path: Path, values: dict[str, Any]) -> None:
    """Write a config."""
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    path.write_text(text, encoding="utf-8")


def run_stage(folder: Path, stage: Stage, say: Say) -> dict[str, Any]:
    """Run a stage that is not complete yet, and return its facts.

    Raises:
        AMoPOError: where it fails, with the end of what it printed.
    """
    if (known := finished(folder).get(stage.name)) is not None:
        return known
    say(f"{folder.name}: {stage.name} (log: {folder / stage.name}.log)")
    began = time.monotonic()
    log, answer = folder / f"{stage.name}.log", folder / f"{stage.name}.json"
    with log.open("w", encoding="utf-8") as err, answer.open("w", encoding="utf-8") as out:
        err.write(f"$ {shlex.join(stage.command)}\n")
        err.flush()
        code = run_command(
            stage.command,
            out=out if stage.tells_facts else err,
            err=err,
            environment={MARK: str(folder.parent.resolve())},
        )
    if code:
        raise AMoPOError(
            f"{folder.name}: {stage.name} ended with {code}: {last_lines(log)}\nAll of it is in "
            f"{log}; once mended, the same command goes on from there."
        )
    facts: dict[str, Any] = {"seconds": round(time.monotonic() - began, 1)}
    if stage.tells_facts:
        said = json.loads(answer.read_text(encoding="utf-8").strip().splitlines()[-1])
        facts |= said if isinstance(said, dict) else {"taken": said}
    else:
        answer.unlink()
    line = json.dumps({"stage": stage.name, "command": stage.command, **facts})
    done = folder / DONE
    cut = done.is_file() and not done.read_bytes().endswith(b"\n")  # by a kill, or a full disk
    with done.open("a", encoding="utf-8") as file:
        file.write("\n" * cut + line + "\n")
    say(f"{folder.name}: {stage.name} done in {facts['seconds']:.0f} s")
    return facts


def finished(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the facts of the stages that a round has behind it, by name."""
    path = folder / DONE
    if not path.is_file():
        return {}
    made = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            facts = json.loads(line)
            made[facts.pop("stage")] = facts
        except (ValueError, KeyError, AttributeError, TypeError):
            continue  # a line that a kill or an editor cut: its stage is run again
    return made


def check_same(plan: Online, *, force: bool = False) -> None:
    """Refuse to go on in a folder with another plan; more rounds are the same plan.

    So is any plan as long as no response is drawn.

    Args:
        force: go on with the other plan; what is done stays.

    Raises:
        AMoPOError: naming what differs.
    """
    path = plan.output / STATE
    files = {key: getattr(plan.file, key) for key in ("raters", "prompts", "held_out")}
    facts = {
        "online": plan.file.model_dump(exclude={"rounds", "output"}),
        "config": plan.base,
        "content": {f"content of {key}": digest(Path(p)) for key, p in files.items() if p},
    }
    facts = json.loads(json.dumps(facts, default=str))
    if not path.exists():
        _write(path, facts)
        return
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise AMoPOError(f"{path}: is broken ({error}); name another output.") from None
    if before == facts:
        return
    drawn = any(one.stat().st_size for one in plan.output.glob("round-*/candidates.jsonl"))
    if drawn and not force:
        differ = [
            key
            for part in facts
            for key in sorted({*facts[part], *before.get(part, {})})
            if facts[part].get(key) != before.get(part, {}).get(key)
        ]
        raise AMoPOError(
            f"{plan.output}: was begun with other {', '.join(differ)}; write them as they were, "
            "name another output, or add --force to go on with the new ones: what is done stays."
        )
    _write(path, facts)


def _write(path: Path, facts: dict[str, Any]) -> None:
    """Write a file of JSON whole or not at all."""
    unfinished = path.with_name(f"{path.name}.unfinished")
    unfinished.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    unfinished.replace(path)


@contextmanager
def only_one(output: Path) -> Iterator[None]:
    """Keep a folder for this process.

    Raises:
        AMoPOError: where another is at work there, or what an earlier one has started; and see
            `own_folder`.
    """
    with own_folder(output, STATE):
        if left := left_over(output):
            pids = " ".join(map(str, left))
            raise AMoPOError(
                f"{output}: a command that was stopped has left processes at work there; wait for "
                f"them, or end them: kill {pids}"
            )
        yield


def left_over(output: Path) -> list[int]:
    """Return the processes of an earlier start's stages.

    A launcher's own processes live on when it is killed, and take no lock of ours with them, but
    they have its environment.
    """
    import psutil

    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if process.environ().get(MARK) == str(output.resolve()):
                found.append(process.pid)
    return found
