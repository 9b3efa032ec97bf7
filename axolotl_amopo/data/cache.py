"""Prepared datasets on disk: is what lies there whole?

`datasets` writes a prepared dataset's files one after the other into the folder that axolotl looks
for, so a command that is killed meanwhile leaves a part of it: a folder that can't be loaded, or,
where `axolotl preprocess` wrote over an older one, one that loads with fewer rows.
"""

import json
import os
from pathlib import Path

import pyarrow as pa
from axolotl.common.const import DEFAULT_DATASET_PREPARED_PATH
from axolotl.utils.data.lock import LOCK_FILE_NAME
from axolotl.utils.logging import get_logger
from filelock import FileLock

LOG = get_logger(__name__)

OURS = "example_id"  # a column that no other prepared dataset has
ASIDE = "_unfinished-"
# https://arrow.apache.org/docs/format/Columnar.html#ipc-streaming-format
END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"


def set_aside_unfinished(prepared_path: str | None) -> None:
    """Rename what an interrupted command left in the folder of prepared datasets.

    So it is prepared anew, and nothing is deleted. Takes the lock under which axolotl prepares:
    what another process is writing at the moment is waited for.
    """
    folder = Path(prepared_path or DEFAULT_DATASET_PREPARED_PATH)
    if not folder.is_dir():
        return
    with FileLock(str(folder / LOCK_FILE_NAME)):
        for prepared in sorted(folder.iterdir()):
            if prepared.name.startswith(ASIDE) or not list(prepared.glob("*.arrow")):
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
    """What a prepared dataset of ours lacks; None for a whole one, and for another's."""
    try:
        state = json.loads((prepared / "state.json").read_text(encoding="utf-8"))
        info = json.loads((prepared / "dataset_info.json").read_text(encoding="utf-8"))
        if OURS not in info["features"]:
            return None
        shards = [prepared / item["filename"] for item in state["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError):
        # No command can load it; whose it is, its rows say, if there are any.
        others = any(map(_is_anothers, prepared.glob("*.arrow")))
        return None if others else "its description is missing"
    cut = [shard.name for shard in shards if not _has_end(shard)]
    return f"{cut[0]} has no end" if cut else None


def _has_end(shard: Path) -> bool:
    """Whether an Arrow stream was closed; without its end, fewer rows would be read."""
    try:
        with shard.open("rb") as file:
            file.seek(-len(END_OF_STREAM), os.SEEK_END)
            return file.read() == END_OF_STREAM
    except OSError:  # missing, or shorter than that
        return False


def _is_anothers(shard: Path) -> bool:
    try:
        with pa.memory_map(str(shard)) as file, pa.ipc.open_stream(file) as stream:
            return OURS not in stream.schema.names
    except (OSError, pa.ArrowInvalid):
        return False
