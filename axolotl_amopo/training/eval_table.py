"""`amopo.eval_table`: the first held-out examples one by one, at each evaluation of a training run.

`_amopo_eval_table.jsonl` in the output folder gets an object an example and evaluation:

    {"step": 10, "epoch": 0.2, "example": 0, "prompt": "...", "responses": ["...", "..."],
     "overall/winner": "1>2", ..., "overall/weight": 0.31, ..., "honesty/accuracy": 0.0}

Responses are numbered as they stand there, and `1>2` says that the first should win. The numbers
are those of `metrics.example_metrics`; null where the dimension says nothing about the example. Of
a group of pairs (`amopo.group_by_prompt`), they are means over its pairs. A run that begins at a
step replaces what stands before it about later steps. Every tracker of the run gets the same rows.

The rows come from what the evaluation gathers anyway, so other processes have nothing to do.
"""

import math
from pathlib import Path
from typing import Any

from axolotl.utils.logging import get_logger
from transformers import TrainerCallback

from axolotl_amopo.example import Example
from axolotl_amopo.training.run_log import append
from axolotl_amopo.training.trackers import Trackers, in_line, markdown_table

LOG = get_logger(__name__)

FILE = "_amopo_eval_table.jsonl"  # not uploaded, see `runs.LOG`
NAME = "amopo_examples"  # of the table, in trackers
SHOWN = ("margin", "weight", "prob", "accuracy")  # of metrics.PER_CRITERION
LONGEST = 1000  # characters of a text


class EvalTable(TrainerCallback):
    """Writes the table, on the main process alone."""

    def __init__(self, trainer: Any, trackers: Trackers):
        self.trainer = trainer
        self.trackers = trackers
        self.path: Path | None = None
        self.examples: list[tuple[int, dict[str, Any]]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not state.is_world_process_zero:
            return
        dataset, config = self.trainer.eval_dataset, self.trainer.amopo
        if dataset is None:
            LOG.warning("amopo.eval_table: nothing to show; set val_set_size or test_datasets.")
            return
        self.path = Path(args.output_dir) / FILE
        tokenizer = self.trainer.processing_class
        self.examples = [
            (row["example_id"], describe(row, config.criteria, tokenizer))
            for row in dataset.select(range(min(config.eval_table, len(dataset))))
        ]

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.path:
            when = {"step": state.global_step, "epoch": state.epoch}
            rows = [
                when | {"example": i} | example | numbers
                for i, ((_, example), numbers) in enumerate(
                    zip(self.examples, self._numbers(), strict=True)
                )
            ]
            for row in rows:
                append(self.path, row)
            texts = [row | {"responses": "\n\n".join(numbered(row["responses"]))} for row in rows]
            markdown = as_markdown(rows, self.trainer.amopo.criteria)
            self.trackers.table(NAME, texts, state.global_step, markdown)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.path = None

    def _numbers(self) -> list[dict[str, float | None]]:
        """Each example's numbers by column; null where it was not evaluated."""
        made = []
        for id_, _ in self.examples:
            found = self.trainer.evaluated.get(id_, {})
            values = {
                f"{name}/{metric}": found.get(f"amopo/{name}/{metric}", math.nan)
                for metric in SHOWN
                for name in self.trainer.amopo.criteria
            }
            made.append({n: v if math.isfinite(v) else None for n, v in values.items()})
        return made


def describe(row: dict[str, Any], criteria: list[str], tokenizer: Any) -> dict[str, Any]:
    """Return a prepared row's texts, shortened, and who should win by each criterion.

    The prompt is the first criterion's, with its instruction.
    """
    example = Example.from_row(row)
    numbers: dict[tuple[int, ...], int] = {}
    for ids in example.responses:
        numbers.setdefault(tuple(ids), len(numbers) + 1)
    winners = {}
    for c, name in enumerate(criteria):
        wins = []
        for p, signs in enumerate(example.signs):
            if signs[c]:
                places = example.winner_first(p, c)
                ids = (example.responses[response] for _, response in places)
                wins.append(">".join(str(numbers[tuple(one)]) for one in ids))
        winners[f"{name}/winner"] = ", ".join(wins) or None

    def text(ids: Any) -> str:
        return shortened(tokenizer.decode(ids, skip_special_tokens=True).strip())

    return {
        "prompt": text(example.prompts[example.winner_first(0, 0)[0][0]]),
        "responses": [text(list(ids)) for ids in numbers],
    } | winners


def shortened(text: str, longest: int = LONGEST) -> str:
    half = longest // 2
    return text if len(text) <= longest else f"{text[:half]} [...] {text[-half:]}"


def numbered(texts: list[str]) -> list[str]:
    return [f"{i}: {text}" for i, text in enumerate(texts, start=1)]


def as_markdown(rows: list[dict[str, Any]], criteria: list[str]) -> str:
    """An example after the other: its texts, then a line of numbers for each prompt."""
    parts = []
    for row in rows:
        parts.append(f"**Example {row['example']}:** {in_line(row['prompt'])}")
        parts += map(in_line, numbered(row["responses"]))
        numbers = [
            {"prompt": name} | {what: row[f"{name}/{what}"] for what in ("winner", *SHOWN)}
            for name in criteria
        ]
        parts.append(markdown_table(numbers))
    return "\n\n".join(parts)
