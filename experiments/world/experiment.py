"""One run: a seed's data, preference training, measures."""

import time
from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

import base_model
import measures
import torch
from base_model import BaseSettings
from preference import Engine, RunSettings, references, train
from rated import DataSettings, answered, drawn_seed, examples, rated_prompts

NESTED = {"data": DataSettings, "base": BaseSettings}


def read_settings(given: Mapping[str, Any]) -> RunSettings:
    """Return a run's settings, all of them checked.

    Raises:
        ValueError: for a key that there is not, or a block that the package refuses (pydantic's
            ValidationError is one).
    """
    values: dict[str, Any] = {}
    for key, value in given.items():
        if key not in {one.name for one in fields(RunSettings)}:
            raise ValueError(f"{key}: is no setting of a run")
        values[key] = value
        if (kind := NESTED.get(key)) is not None:
            if unknown := value.keys() - {one.name for one in fields(kind)}:
                raise ValueError(f"{key}.{min(unknown)}: is no setting of a run")
            values[key] = kind(**value)
    run = RunSettings(**values)
    _ = run.objective
    return run


def written(run: RunSettings) -> dict[str, Any]:
    """Return all settings, defaults included, as they are kept with a row."""
    return asdict(run)


def run_one(run: RunSettings, seed: int) -> dict[str, Any]:
    """Return what a run finds: `measures`, `means` and `seconds`. The same every time.

    Training with `max_steps: 0` leaves the base model, which then is what is measured.
    """
    begun = time.monotonic()
    torch.manual_seed(drawn_seed("torch", seed))
    base = base_model.load_base(run.base).eval()
    folder, data, config = base_model.folder_of(run.base), run.data, run.config
    train_on = answered(base, folder, data.prompts, data.responses, seed, held_out=False)
    held_out = answered(base, folder, run.heldout_prompts, 4, seed, held_out=True)
    prompts = rated_prompts(train_on, config.dimension_names, data.noise, seed)
    rows = examples(prompts, config, base_model.chat(), seed)
    compared = measures.ordering_examples(run, held_out)

    model = base_model.load_base(run.base).eval()
    engine = Engine(model, rows[:2])
    compared_with = references(engine, run, compared)
    prepared = time.monotonic()
    found = {"examples": float(len(rows))}
    if run.max_steps:
        found |= {f"train/{name}": value for name, value in train(engine, run, rows, seed).items()}
    trained = time.monotonic()
    made, means = measures.measure(engine, base, run, held_out, seed)
    found |= made | measures.ordering(engine, run, compared, compared_with)
    ended = time.monotonic()
    seconds = {
        "prepare": prepared - begun,
        "train": trained - prepared,
        "measure": ended - trained,
        "all": ended - begun,
    }
    return {
        "measures": {name: round(value, 6) for name, value in found.items()},
        "means": {
            ask: {name: round(value, 4) for name, value in values.items()}
            for ask, values in means.items()
        },
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
    }
