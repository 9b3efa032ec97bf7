"""WebNLG 2020's rated texts -> the prompts that are trained on, held out, and used for tuning.

    {"prompt": "...\\n\\nSubject | relation | object", "responses": [4 of {"text", "scores"}],
     "reference": "the text that people rated highest"}

Of a prompt's responses four are drawn by a seed, whose mean ratings over the three dimensions all
differ: so every prompt has six pairs, and all arms see as many. Which prompts serve for tuning is
drawn too; the others are dealt into folds by `axolotl amopo compare`.
"""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

DIMENSIONS = ("correctness", "coverage", "fluency")
RESPONSES = 4
TUNE_HELDOUT, TUNE_TRAIN = 24, 32  # what is left, 120 of 176, is five folds of 24

Row = dict[str, Any]


def mean_rating(response: Row) -> float:
    """Return a response's mean rating over the dimensions, 0 to 100."""
    return round(sum(response["scores"][name] for name in DIMENSIONS) / len(DIMENSIONS), 6)


def choose(row: Row, seed: int) -> Row | None:
    """Return a prompt with four of its responses, or None where it has too few."""
    drawn = list(row["responses"])
    random.Random(f"{seed} {row['prompt']}").shuffle(drawn)
    kept = {mean_rating(response): response for response in reversed(drawn)}
    chosen = [response for response in drawn if kept[mean_rating(response)] is response][:RESPONSES]
    if len(chosen) < RESPONSES:
        return None
    return {
        "prompt": row["prompt"],
        "responses": [
            {"text": one["text"], "scores": {name: one["scores"][name] for name in DIMENSIONS}}
            for one in chosen
        ],
        "reference": max(row["responses"], key=mean_rating)["text"],
    }


def split(rows: list[Row], seed: int = 0) -> dict[str, list[Row]]:
    """Return the rows of the files `tune-heldout`, `tune-train` and `prompts`."""
    chosen = [made for row in rows if (made := choose(row, seed))]
    random.Random(seed).shuffle(chosen)
    ends = TUNE_HELDOUT, TUNE_HELDOUT + TUNE_TRAIN
    return {
        "tune-heldout": chosen[: ends[0]],
        "tune-train": chosen[ends[0] : ends[1]],
        "prompts": chosen[ends[1] :],
    }


def write_data(source: Path, folder: Path) -> dict[str, Path]:
    """Write the three files, and return their paths."""
    with source.open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    paths = {}
    for name, part in split(rows).items():
        text = "".join(json.dumps(row) + "\n" for row in part)
        paths[name] = folder / f"{name}.jsonl"
        # Left alone where it is the same: a comparison looks at when its data changed.
        if not paths[name].is_file() or paths[name].read_text(encoding="utf-8") != text:
            paths[name].write_text(text, encoding="utf-8")
    return paths


def triples(prompt: str) -> Iterator[tuple[str, str, str]]:
    """Yield subject, relation and object of a prompt's facts, as they are written there."""
    for line in prompt.split("\n"):
        parts = [part.strip() for part in line.split("|")]
        if len(parts) == 3:
            yield parts[0], parts[1], parts[2]
