"""Run plans, or repeat a row.

    python experiments/world/run.py experiments/world/plans/objectives.yml
    python experiments/world/run.py experiments/world/plans/*.yml --shard 1/2
    python experiments/world/run.py --row 3f2a90c1d4e7

Runs that `results.jsonl` already has are skipped, so a killed command goes on where it was. With
`--shard i/n` only every n-th run is made, so that n processes share a plan. `--row` runs the
settings of a row once more, and says whether the measures are those of the row.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # what is computed is the same everywhere
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import results
import torch
import transformers
from experiment import read_settings, run_one, written
from results import Plan, PlanError

ROOT = results.HERE.parent.parent


def planned(plans: Sequence[Plan]) -> list[tuple[str, str, int, dict[str, Any]]]:
    """Return key, name, seed and settings of all runs, each once, one seed after the other.

    Raises:
        PlanError: naming plan and variant, for settings that can't be run.
    """
    found: dict[str, tuple[str, str, int, dict[str, Any]]] = {}
    for place in range(max(len(plan.seeds) for plan in plans)):
        for plan in plans:
            for variant, settings in plan.variants.items():
                if place < len(plan.seeds):
                    whole, seed = whole_settings(plan, variant), plan.seeds[place]
                    key = results.key_of(whole, seed)
                    name = f"{plan.path.stem}: {variant}"
                    found.setdefault(key, (key, name, seed, settings))
    return list(found.values())


def whole_settings(plan: Plan, variant: str) -> dict[str, Any]:
    """Return all settings of a variant, defaults included.

    Raises:
        PlanError: where they can't be run.
    """
    try:
        return written(read_settings(plan.variants[variant]))
    except (TypeError, ValueError) as error:
        raise PlanError(f"{plan.path}: {variant}: {error}") from None


def keys_of(plan: Plan) -> dict[tuple[str, int], str]:
    """Return the key of each of a plan's runs, by variant and seed."""
    return {
        (variant, seed): results.key_of(whole, seed)
        for variant in plan.variants
        for whole in [whole_settings(plan, variant)]
        for seed in plan.seeds
    }


def commit() -> str:
    """Return the commit of the checkout, with a mark where files differ from it."""

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
        )
        return done.stdout.strip()

    # What runs append to, and what is made of it, may differ.
    code = ["axolotl_amopo", "experiments/world/*.py"]
    changed = git("status", "--porcelain", "--", *code)
    return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")


def make_row(key: str, seed: int, settings: dict[str, Any]) -> dict[str, Any]:
    """Return a run's row."""
    run = read_settings(settings)
    return {
        "key": key,
        "seed": seed,
        "settings": written(run),
        **run_one(run, seed),
        "commit": commit(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def run_plans(plans: Sequence[Plan], path: Path, shard: tuple[int, int]) -> int:
    """Run what is not there yet; return how many runs were made."""
    number, count = shard
    mine = planned(plans)[number - 1 :: count]
    done = results.read_results(path)
    todo = [one for one in mine if one[0] not in done]
    print(f"{len(mine)} runs, {len(mine) - len(todo)} of them done", flush=True)
    begun, made = time.monotonic(), 0
    for place, (key, name, seed, settings) in enumerate(todo, start=1):
        if key in results.read_results(path):  # another process was faster
            continue
        row = make_row(key, seed, settings)
        results.append(path, row)
        made += 1
        left = (time.monotonic() - begun) / place * (len(todo) - place)
        print(
            f"[{place}/{len(todo)}] {key} {name}, seed {seed}: "
            f"score {row['measures']['score']:.3f}, {row['seconds']['all']:.0f} s; "
            f"{left / 60:.0f} minutes left",
            flush=True,
        )
    return made


def repeat(key: str, path: Path) -> bool:
    """Run a row's settings once more, print what differs, and return whether nothing does."""
    rows = results.read_results(path)
    if key not in rows:
        raise PlanError(f"{path} has no row {key}.")
    row = rows[key]
    again = make_row(key, row["seed"], row["settings"])
    differ = {
        name: (value, again["measures"].get(name))
        for name, value in row["measures"].items()
        if value != again["measures"].get(name)
    }
    for name, (before, now) in differ.items():
        print(f"{name}: {before} in the row, {now} now")
    print(
        f"row {key}: {len(row['measures']) - len(differ)} of {len(row['measures'])} measures are "
        f"the same to the last digit (row: commit {row['commit']}, torch {row['torch']}; now: "
        f"commit {again['commit']}, torch {again['torch']})"
    )
    return not differ


def read_shard(text: str) -> tuple[int, int]:
    """Return i and n of i/n."""
    number, _, count = text.partition("/")
    shard = int(number), int(count)
    if not 1 <= shard[0] <= shard[1]:
        raise argparse.ArgumentTypeError("write i/n with i from 1 to n, e.g. 1/2")
    return shard


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("plans", nargs="*", type=Path, metavar="PLAN.yml")
    parser.add_argument("--shard", type=read_shard, default=(1, 1), metavar="I/N")
    parser.add_argument("--row", metavar="KEY", help="repeat this row of the results")
    parser.add_argument("--results", type=Path, default=results.RESULTS)
    options = parser.parse_args(arguments)
    if bool(options.plans) == bool(options.row):
        parser.error("name plans, or a row")
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    try:
        if options.row:
            return 0 if repeat(options.row, options.results) else 1
        plans = [results.read_plan(path) for path in results.unique(options.plans)]
        run_plans(plans, options.results, options.shard)
    except PlanError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
