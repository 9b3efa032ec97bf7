"""Local files: whether they are what they seem, and whether they have changed."""

import functools
import hashlib
import json
from pathlib import Path
from typing import Any

import yaml
from axolotl.utils.data.shared import get_dataset_type
from axolotl.utils.dict import DictDefault
from datasets import load_dataset

from axolotl_amopo.errors import ConfigError, DataError

TEXT = (".json", ".jsonl", ".csv", ".txt")


def digest(path: Path) -> str:
    """Return a hash of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(
            file, functools.partial(hashlib.blake2b, digest_size=16)
        ).hexdigest()


def local_files(entry: dict[str, Any]) -> list[Path]:
    """Return the files of a `datasets:` entry that lie on this machine."""
    named = entry.get("data_files")
    if named:
        paths = [Path(str(name)) for name in ([named] if isinstance(named, str) else named)]
        return [path for path in paths if path.is_file()]
    path = Path(str(entry["path"]))
    if path.is_dir():
        return sorted(p for p in path.rglob("*") if p.is_file() and ".cache" not in p.parts)
    return [path] if path.is_file() else []


def check_yaml(path: Any) -> None:
    """Refuse a YAML in which a key stands twice: YAML's parser would take the last silently.

    Raises:
        ConfigError: naming file, line and key.
    """
    if not path or not Path(str(path)).is_file():
        return
    with open(path, encoding="utf-8") as file:
        _check_mapping(yaml.compose(file, yaml.SafeLoader), path)


def _check_mapping(node: yaml.Node | None, path: Any) -> None:
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _check_mapping(item, path)
    if not isinstance(node, yaml.MappingNode):
        return
    seen: dict[str, int] = {}
    for key, value in node.value:
        _check_mapping(value, path)
        if not isinstance(key, yaml.ScalarNode) or key.value == "<<":  # merges may repeat
            continue
        line = key.start_mark.line + 1
        if key.value in seen:
            raise ConfigError(
                f"{path}, line {line}: the key '{key.value}' is there twice (first on line "
                f"{seen[key.value]}); keep one."
            )
        seen[key.value] = line


def check_loads(entry: dict[str, Any], where: str) -> None:
    """Load local files once, the way axolotl will, to say clearly what is wrong with them.

    `datasets` keeps what it loaded, so axolotl's own load right after costs nothing.

    Raises:
        ConfigError: for a path that looks local and isn't there.
        DataError: naming file and row.
    """
    path = Path(str(entry["path"]))
    if not path.exists():
        if path.is_absolute() or path.suffix in (*TEXT, ".parquet"):
            raise ConfigError(f"{where}.path: there is no file or folder '{path}'.")
        return
    files = local_files(entry)
    if not files:
        raise DataError(f"{where}: '{path}' holds no data files.")
    if path.is_dir() and not entry.get("data_files"):
        return
    for file in files:
        if file.stat().st_size == 0:
            raise DataError(f"{where}: '{file}' is empty: no rows to train on.")
        if file.suffix in TEXT:
            _check_utf8(file)  # `datasets` would find out only when it reads that row
        try:
            load_dataset(get_dataset_type(DictDefault(entry)), data_files=str(file), split="train")
        except Exception as error:  # by kind of damage, `datasets` raises a dozen different ones
            raise _diagnose(file, error) from None


def _check_utf8(path: Path) -> None:
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as broken:
                unit = "row" if path.suffix == ".jsonl" else "line"
                raise DataError(
                    f"{path}, {unit} {number}: is not UTF-8 (byte {line[broken.start]:#04x} at "
                    f"position {broken.start}); save the file as UTF-8."
                ) from None


def _diagnose(path: Path, error: Exception) -> DataError:
    """Return why `datasets` could not load a file; of JSON lines, the first row that is none."""
    if path.suffix == ".jsonl":
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                try:
                    row = json.loads(line) if line.strip() else {}
                except json.JSONDecodeError as broken:
                    return DataError(f"{path}, row {number}: is not JSON ({broken}).")
                if not isinstance(row, dict):
                    return DataError(
                        f"{path}, row {number}: must be an object, got {line.strip()[:60]}."
                    )
    return DataError(f"{path}: can't be loaded: {error.__cause__ or error}")
