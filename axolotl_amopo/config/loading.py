"""Local files as `datasets` loads them: what is wrong with them, in one sentence."""

from pathlib import Path
from typing import Any

from axolotl.utils.data.shared import get_dataset_type
from axolotl.utils.dict import DictDefault
from datasets import load_dataset

from axolotl_amopo.config.files import check_files, check_json_lines
from axolotl_amopo.errors import DataError


def check_loads(entry: dict[str, Any], where: str) -> None:
    """Load local files once, the way axolotl will, to say clearly what is wrong with them.

    `datasets` keeps what it loaded, so axolotl's own load right after costs nothing.

    Raises:
        ConfigError: for a path that looks local and isn't there.
        DataError: naming file and row.
    """
    for file in check_files(entry, where):
        try:
            load_dataset(get_dataset_type(DictDefault(entry)), data_files=str(file), split="train")
        except Exception as error:  # by kind of damage, `datasets` raises a dozen different ones
            raise _diagnose(file, error) from None


def _diagnose(path: Path, error: Exception) -> DataError:
    """Return why `datasets` could not load a file; of JSON lines, the first row that is none."""
    if path.suffix == ".jsonl":
        try:
            check_json_lines(path)
        except DataError as bad_row:
            return bad_row
    return DataError(f"{path}: can't be loaded: {error.__cause__ or error}")
