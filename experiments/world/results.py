"""Plans and results: which runs there are, which of them are done.

A plan is a YAML file:

    question: Do the dimension prompts do anything?      what the plan is to answer
    baseline: amopo                                      a variant that others are compared with
    measures: [score, worst]                             of `measures.py`; those that are compared
    seeds: [1, 2, 3, 4, 5]
    tuned: ../tuned.yml                                  learning_rate and rl_beta per objective
    common: {amopo: {dimensions: [detail, terse]}}       settings of all variants
    variants:
      amopo: {}                                          what each changes
      no prompts: {amopo: {instruction: "", overall_instruction: ""}}
      dpo: {amopo: {objective: dpo}, grid: {rl_beta: [0.1, 0.5], learning_rate: [0.001, 0.002]}}

A `grid` stands for a variant of each combination, `dpo rl_beta=0.1 learning_rate=0.001` and so on.
A variant's `against` names another variant that it is compared with, in place of the baseline.

Results are lines of JSON that are only ever appended: settings, seed, measures, seconds, commit. A
run's key is a hash of its settings and its seed, so plans share the runs that they have in common.
"""

import fcntl
import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
RESULTS = HERE / "results.jsonl"
KEYS = {"question", "baseline", "measures", "seeds", "tuned", "common", "variants"}


class PlanError(ValueError):
    """A plan that can't be run, in a sentence."""


@dataclass(frozen=True)
class Plan:
    """A question and the runs that are to answer it."""

    path: Path
    question: str
    measures: list[str]
    seeds: list[int]
    variants: dict[str, dict[str, Any]]  # the settings of each
    against: dict[str, str]  # by variant, the one that it is compared with; not those that are none


def read_plan(path: Path) -> Plan:
    """Return a plan.

    Raises:
        PlanError: for a file that is none.
    """
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise PlanError(f"{path}: can't be read ({error}).") from None
    if not isinstance(given, dict) or not given.keys() >= {"seeds", "variants"}:
        raise PlanError(f"{path}: needs the keys seeds and variants.")
    if unknown := given.keys() - KEYS:
        raise PlanError(f"{path}: {min(unknown)}: is no key of a plan; it has {sorted(KEYS)}.")
    tuned: dict[str, Any] = {}
    if name := given.get("tuned"):
        file = path.parent / name
        if not file.is_file():
            raise PlanError(f"{path}: tuned: {file} is not there; run plans/tune.yml first.")
        tuned = yaml.safe_load(file.read_text(encoding="utf-8"))
    variants: dict[str, dict[str, Any]] = {}
    against: dict[str, str] = {}
    for name, changes in given["variants"].items():
        for variant, own in expanded(str(name), changes or {}):
            if other := own.pop("against", given.get("baseline")):
                against[variant] = str(other)
            settings = merged(given.get("common") or {}, own)
            objective = settings.get("amopo", {}).get("objective", "amopo")
            variants[variant] = merged(tuned.get(objective, {}), settings)
    if unknown := set(against.values()) - variants.keys():
        raise PlanError(f"{path}: {min(unknown)!r} is compared with, but is no variant.")
    return Plan(
        path,
        given.get("question", path.stem),
        given.get("measures", ["score", "worst"]),
        given["seeds"],
        variants,
        {variant: other for variant, other in against.items() if other != variant},
    )


def expanded(name: str, changes: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Return a variant by name, or, where it has a grid, one per combination."""
    own = {key: value for key, value in changes.items() if key != "grid"}
    grid = changes.get("grid", {})
    return [
        (" ".join([name, *(f"{key}={value}" for key, value in chosen)]), merged(own, dict(chosen)))
        for chosen in itertools.product(
            *([(key, value) for value in values] for key, values in grid.items())
        )
    ]


def merged(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Return both, the second one's values where both have a key; blocks are merged likewise."""
    made = dict(first)
    for key, value in second.items():
        both = isinstance(value, Mapping) and isinstance(made.get(key), Mapping)
        made[key] = merged(made[key], value) if both else value
    return made


def key_of(settings: Mapping[str, Any], seed: int) -> str:
    """Return the key of a run, of its whole settings as `experiment.written` has them."""
    text = json.dumps([settings, seed], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()


def read_results(path: Path = RESULTS) -> dict[str, dict[str, Any]]:
    """Return the rows by key; a line that a killed run left unfinished is passed over."""
    rows: dict[str, dict[str, Any]] = {}
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue
            rows[row["key"]] = row
    return rows


def append(path: Path, row: Mapping[str, Any]) -> None:
    """Add a row, whole, also where other processes add theirs."""
    with path.open("ab+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        end = file.seek(0, os.SEEK_END)
        if end:
            file.seek(end - 1)
            if file.read(1) != b"\n":  # a line that was never finished
                file.write(b"\n")
        file.write(json.dumps(row).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def rows_of(
    plan: Plan, keys: Mapping[tuple[str, int], str], rows: Mapping[str, dict[str, Any]]
) -> dict[str, dict[int, dict[str, Any]]]:
    """Return a plan's rows by variant and seed, those that are there."""
    return {
        variant: {
            seed: rows[keys[variant, seed]] for seed in plan.seeds if keys[variant, seed] in rows
        }
        for variant in plan.variants
    }


def unique(paths: Iterable[Path]) -> list[Path]:
    """Return paths, each once, in their order."""
    return list(dict.fromkeys(path.resolve() for path in paths))
