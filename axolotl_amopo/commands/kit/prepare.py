"""Prepare a config's data anew, as training would: what is prepared already lacks the texts."""

import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from axolotl.utils.data import prepare_datasets
from datasets import Dataset

from axolotl_amopo.data.pipeline import Preparation, watch_preparations


class Prepared(NamedTuple):
    """Hold a config's prepared rows, and how each of its entries was made."""

    train: Dataset
    held_out: Dataset | None
    preparations: list[Preparation]


@contextmanager
def prepared_anew(cfg: Any, tokenizer: Any) -> Iterator[Prepared]:
    """Yield what training would prepare of a config, in a folder that goes again.

    Raises:
        AMoPOError: for a row that training would refuse too.
    """
    kept = cfg.dataset_prepared_path
    with tempfile.TemporaryDirectory() as folder, watch_preparations() as preparations:
        cfg.dataset_prepared_path = folder
        try:
            with _spawned_without_main():
                train, held_out, *_ = prepare_datasets(cfg, tokenizer)
        finally:
            cfg.dataset_prepared_path = kept
        yield Prepared(train, held_out, preparations)


@contextmanager
def _spawned_without_main() -> Iterator[None]:
    """Keep processes that are spawned here from importing this one's main module.

    `datasets` spawns two to save rows, however few. The main module is axolotl's command line; to
    import it takes seconds in each, and nothing in it is asked for there.
    """
    main = vars(sys.modules["__main__"])
    # A notebook's has no file, and shall have none afterwards.
    hidden = {name: main[name] for name in ("__file__", "__spec__") if name in main}
    main.pop("__file__", None)
    main["__spec__"] = None
    try:
        yield
    finally:
        main.update(hidden)
