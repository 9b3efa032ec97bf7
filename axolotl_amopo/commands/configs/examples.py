"""List and copy the example configs that come with the plugin."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from axolotl_amopo.errors import AMoPOError, did_you_mean

FOLDER = "example_configs"
PACKAGE = Path(__file__).parent.parent.parent


@dataclass(frozen=True)
class ExampleConfig:
    """Describe an example config by its own first two lines."""

    name: str
    what: str
    hardware: str
    path: Path


def list_configs() -> list[ExampleConfig]:
    """Return the example configs, by name."""
    return [_read_config(path) for path in sorted(_folder().glob("*.yml"))]


def copy_configs(
    names: Sequence[str], output: Path = Path(FOLDER), *, force: bool = False
) -> list[Path]:
    """Copy configs, and the files of folders beside them that they name; paths in them follow.

    Args:
        output: the folder of the copies.
        force: overwrite files that are there and have other contents.

    Returns:
        The copies, also those that were there already.

    Raises:
        AMoPOError: before anything is written, for a name that no config has, or where a file is
            there already, with other contents.
    """
    known = {config.name: config.path for config in list_configs()}
    for name in names:
        if name not in known:
            hint = did_you_mean(name, known)
            raise AMoPOError(f"There is no example config {name!r}.{hint}")
    texts = {}
    for path in (known[name] for name in names):
        text = path.read_text(encoding="utf-8")
        for other in (path.name, *re.findall(rf"\b{FOLDER}/([\w-]+/[\w./-]*\w)", text)):
            copied = (path.parent / other).read_text(encoding="utf-8")
            texts[output / other] = copied.replace(f"{FOLDER}/", f"{output.as_posix()}/")
    for target, text in texts.items():
        same = target.is_file() and target.read_bytes() == text.encode()
        if target.exists() and not same and not force:
            raise AMoPOError(f"{target} is there already; name another --output, or add --force.")
    for target, text in texts.items():
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")
    return list(texts)


def _folder() -> Path:
    """Return the examples' folder: in the package where it was installed, else beside it."""
    return next(path for path in (PACKAGE / FOLDER, PACKAGE.parent / FOLDER) if path.is_dir())


def _read_config(path: Path) -> ExampleConfig:
    what, hardware, *_ = path.read_text(encoding="utf-8").splitlines()
    return ExampleConfig(path.stem, what.lstrip("# "), hardware.removeprefix("# Hardware: "), path)
