"""Answer held-out prompts under all asks, into a file that a killed run goes on with."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from axolotl_amopo.commands.kit.answers import Answer, answer_prompts, answer_row
from axolotl_amopo.commands.kit.generator import Generator, Progress, Sampling
from axolotl_amopo.commands.kit.models import TrainedModel
from axolotl_amopo.commands.kit.questions import Prompt
from axolotl_amopo.errors import AMoPOError
from axolotl_amopo.steering.asks import Ask

WEIGHTS = ("*.safetensors", "*.bin")
STATE = "steer.json"


@dataclass(frozen=True)
class Said:
    """Hold one answer, and what it answers."""

    ask: int
    prompt: int
    sample: int
    text: str
    finished: bool


@dataclass(frozen=True)
class Asked:
    """Hold a model and what it is asked."""

    name: str
    trained: TrainedModel
    asks: list[Ask]
    base: bool = False  # whether the untuned model answers

    def to_json(self) -> dict[str, Any]:
        """Return what a file of its answers must agree with."""
        folder = Path(self.trained.base_folder()) if self.base else self.trained.folder
        files = sorted(file for kind in WEIGHTS for file in folder.glob(kind))
        return {
            "model": str(folder),
            "weights": [
                [file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files
            ],
            "base": self.trained.base,
            "asks": [
                ask.to_json() | {"instruction": self.trained.steering.instruction(ask.settings)}
                for ask in self.asks
            ],
        }


def collect(
    asked: Asked,
    prompts: Sequence[Prompt],
    samples: int,
    sampling: Sampling,
    path: Path,
    *,
    backend: str = "auto",
    progress: Progress,
) -> list[Said]:
    """Return a model's answers; those that the file has are not made again.

    All prompts of an ask are answered together and then written, so that a kill loses one ask.

    Args:
        samples: answers per prompt and ask, each drawn with a seed of its own.
        progress: called with the number of answers that were just made, or found.

    Raises:
        AMoPOError: for a model that can't be loaded, or a file that is no file of answers.
        DataError: for a prompt that the chat template refuses or that leaves no room for an answer.
    """
    whole = len(prompts) * samples
    done = _read(path, whole, len(asked.asks))
    progress(len(done))
    missing = [i for i in range(len(asked.asks)) if all(one.ask != i for one in done)]
    if not missing:
        return done
    generator = Generator(asked.trained, backend, base=asked.base)
    with path.open("a", encoding="utf-8") as file:
        for i in missing:
            made: list[tuple[int, Answer]] = []
            for sample in range(samples):
                drawn = replace(sampling, seed=sampling.seed + sample)
                each = [asked.asks[i].settings]
                answers = answer_prompts(generator, prompts, each, drawn, progress)
                made += [(sample, answer) for answer in answers]
            lines = []
            for j, (sample, answer) in enumerate(made):
                place = {"ask": i, "prompt": j % len(prompts), "sample": sample}
                row = answer_row(answer, asked.name)
                lines.append(json.dumps(row | {"steer": place}, ensure_ascii=False) + "\n")
                done.append(Said(**place, text=answer.turns[0], finished=answer.finished))
            file.writelines(lines)
            file.flush()
    return done


def _read(path: Path, whole: int, asks: int) -> list[Said]:
    """Return the answers of the asks that a file has whole, and cut the file off after them."""
    if not path.exists():
        return []
    found: dict[int, list[Said]] = {i: [] for i in range(asks)}
    kept = dict.fromkeys(range(asks), "")
    text = path.read_text(encoding="utf-8", errors="replace")  # a kill may cut a character
    for line in text.split("\n"):  # not splitlines: answers may hold other ends of lines
        if not line:
            continue
        try:
            row = json.loads(line)
            said = Said(**row["steer"], text=row["response"], finished=row["amopo"]["finished"])
            found[said.ask].append(said)
            kept[said.ask] += line + "\n"
        except json.JSONDecodeError:
            continue  # a line that a kill cut off
        except (KeyError, TypeError) as error:
            raise AMoPOError(f"{path}: is no file of this command ({error!r}); move it.") from None
    complete = [i for i in range(asks) if len(found[i]) == whole]
    whole_text = "".join(kept[i] for i in complete)
    if whole_text != text:
        _write(path, whole_text)
    return [said for i in complete for said in found[i]]


def _write(path: Path, text: str) -> None:
    """Write a file whole or not at all: a full disk or a kill leaves what was there."""
    unfinished = path.with_name(f"{path.name}.unfinished")
    try:
        unfinished.write_text(text, encoding="utf-8")
    except OSError:
        unfinished.unlink()
        raise
    unfinished.replace(path)


def check_same(folder: Path, common: dict[str, Any], asked: Sequence[Asked], force: bool) -> None:
    """Keep what a folder measures, and refuse to mix it with another measurement.

    Models may join those that are there, on the same questions.

    Args:
        common: what the answers of all models depend on.
        asked: the models of this call.
        force: begin anew where something differs.

    Raises:
        AMoPOError: where the folder has another measurement.
    """
    path = folder / STATE
    models = json.loads(json.dumps({one.name: one.to_json() for one in asked}))
    common = json.loads(json.dumps(common))
    known: dict[str, Any] = {}
    if path.exists():
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
            known = before.pop("models")
        except (ValueError, KeyError, AttributeError) as error:
            raise AMoPOError(f"{path}: is broken ({error!r}); name another --output.") from None
        other = [key for key in common if before.get(key) != common[key]]
        changed = [name for name in models if known.get(name, models[name]) != models[name]]
        if (other or changed) and not force:
            what = f"other {', '.join(other)}" if other else f"another {', '.join(changed)}"
            raise AMoPOError(
                f"{folder}: has a measurement with {what}; name another --output, or add --force "
                "to replace it."
            )
        for name in known if other else changed:
            (folder / "answers" / f"{name}.jsonl").unlink(missing_ok=True)
        known = {} if other else known
    else:
        for name in models:  # who knows what they answer
            (folder / "answers" / f"{name}.jsonl").unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    _write(path, json.dumps({**common, "models": known | models}, indent=2) + "\n")
    (folder / "answers").mkdir(exist_ok=True)
