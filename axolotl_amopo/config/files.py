"""Local files: whether they are what they seem, and whether they have changed."""

import functools
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import yaml

from axolotl_amopo.errors import ConfigError, DataError

SPACE = re.compile(r"\s*")
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


def read_yaml(path: Path) -> Any:
    """Return what a YAML file holds.

    Raises:
        ConfigError: naming file and line, where it is not YAML.
    """
    try:
        return yaml.safe_load(path.read_bytes())
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        where = f"{path}, line {mark.line + 1}" if mark else str(path)
        raise ConfigError(f"{where}: is not YAML ({problem or error}).") from None


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


def check_files(entry: dict[str, Any], where: str) -> list[Path]:
    """Return the local files that an entry's rows come from, one by one; of a folder none.

    Raises:
        ConfigError: for a path that looks local and isn't there.
        DataError: for a file that is empty or not UTF-8, or a folder without files.
    """
    path = Path(str(entry["path"]))
    if not path.exists():
        if path.is_absolute() or path.suffix in (*TEXT, ".parquet"):
            raise ConfigError(f"{where}.path: there is no file or folder '{path}'.")
        return []
    files = local_files(entry)
    if not files:
        raise DataError(f"{where}: '{path}' holds no data files.")
    if path.is_dir() and not entry.get("data_files"):
        return []
    for file in files:
        if file.stat().st_size == 0:
            raise DataError(f"{where}: '{file}' is empty: no rows to train on.")
        if file.suffix in TEXT:
            _check_utf8(file)  # `datasets` would find out only when it reads that row
    return files


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


def check_json_lines(path: Path) -> None:
    """Refuse a file with a line that is not a JSON object, unless it is JSON of another shape.

    `datasets` loads objects over several lines too, and one list of objects.

    Raises:
        DataError: naming the first such row.
    """
    with open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if wrong := _wrong_with_row(line):
                if not _is_other_json(path):
                    raise DataError(f"{path}, row {number}: {wrong}.")
                return


def _wrong_with_row(line: str) -> str:
    try:
        row = json.loads(line) if line.strip() else {}
    except json.JSONDecodeError as broken:
        return f"is not JSON ({broken})"
    return "" if isinstance(row, dict) else f"must be an object, got {line.strip()[:60]}"


def _is_other_json(path: Path) -> bool:
    text = path.read_text(encoding="utf-8-sig").strip()
    decoder, at, kinds = json.JSONDecoder(), 0, []
    while at < len(text):
        try:
            value, at = decoder.raw_decode(text, at)
        except json.JSONDecodeError:
            return False
        kinds.append(type(value))
        at = SPACE.match(text, at).end()
    return kinds == [list] or set(kinds) <= {dict}
