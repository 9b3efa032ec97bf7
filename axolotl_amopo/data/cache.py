"""Prepared datasets on disk: is what lies there whole?

`datasets` writes a prepared dataset's files one after the other into the folder that axolotl looks
for, so a command that is killed meanwhile leaves a part of it: a folder that can't be loaded, or,
where `axolotl preprocess` wrote over an older one, one that loads with fewer rows.

Other people's data may lie beside it, in the same formats. So a folder is marked as ours before
anything is written into it, and without a mark nothing is touched.
"""

import json
import os
from pathlib import Path
from typing import Any

from axolotl.common.const import DEFAULT_DATASET_PREPARED_PATH
from axolotl.utils.data.lock import LOCK_FILE_NAME
from axolotl.utils.data.shared import (
    generate_dataset_hash_from_config,
    get_prepared_dataset_path,
)
from axolotl.utils.logging import get_logger
from filelock import FileLock

LOG = get_logger(__name__)

# The mark of FOLDER is the file FOLDER.amopo beside it: axolotl takes a folder with any file in it
# for a prepared dataset.
MARK = ".amopo"
ASIDE = "_unfinished-"
# https://arrow.apache.org/docs/format/Columnar.html#ipc-streaming-format
END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"


def mark_as_ours(cfg: Any, datasets: list[Any], tokenizer: Any) -> None:
    """Mark the folder that axolotl will save prepared rows into.

    Args:
        cfg: axolotl's validated config.
        datasets: its entries that are prepared, all that go into the folder.
    """
    # As axolotl names it before and after it prepares (utils/data/sft.py).
    name = generate_dataset_hash_from_config(cfg, datasets, tokenizer.name_or_path)
    folder = get_prepared_dataset_path(cfg, name)
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.with_suffix(MARK).touch()


def set_aside_unfinished(prepared_path: str | None) -> None:
    """Rename what an interrupted command left in the folder of prepared datasets.

    So it is prepared anew, and nothing is deleted. Takes the lock under which axolotl prepares:
    what another process is writing at the moment is waited for.
    """
    folder = Path(prepared_path or DEFAULT_DATASET_PREPARED_PATH)
    if not folder.is_dir():
        return
    with FileLock(str(folder / LOCK_FILE_NAME)):
        for mark in sorted(folder.glob(f"*{MARK}")):
            prepared = mark.with_suffix("")
            if not list(prepared.glob("*.arrow")):
                continue
            if problem := unfinished(prepared):
                aside = folder / f"{ASIDE}{prepared.name}"
                number = 1
                while aside.exists():
                    number += 1
                    aside = folder / f"{ASIDE}{prepared.name}-{number}"
                prepared.rename(aside)
                LOG.warning(
                    "%s: was not written to its end (%s); it is now %s, and the data is prepared "
                    "anew. Delete it when you like.",
                    prepared,
                    problem,
                    aside.name,
                )


def unfinished(prepared: Path) -> str | None:
    """Return what a prepared dataset lacks; None for a whole one."""
    try:
        json.loads((prepared / "dataset_info.json").read_text(encoding="utf-8"))
        state = json.loads((prepared / "state.json").read_text(encoding="utf-8"))
        shards = [prepared / item["filename"] for item in state["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError):
        return "its description is missing"
    cut = [shard.name for shard in shards if not _has_end(shard)]
    return f"{cut[0]} has no end" if cut else None


def _has_end(shard: Path) -> bool:
    """Return whether an Arrow stream was closed; without its end, fewer rows would be read."""
    try:
        with shard.open("rb") as file:
            file.seek(-len(END_OF_STREAM), os.SEEK_END)
            return file.read() == END_OF_STREAM
    except OSError:  # missing, or shorter than that
        return False
