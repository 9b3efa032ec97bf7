"""Data of runs: folds by prompt, and pairs in axolotl's own format. Called in forked processes."""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

from axolotl_amopo.commands.compare.comparison import Comparison, Folds, fold_file
from axolotl_amopo.data.examples import unpack
from axolotl_amopo.data.pipeline import Preparation
from axolotl_amopo.data.rows import Message, Row
from axolotl_amopo.errors import AMoPOError, ConfigError, DataError

FACTS = "folds.json"


def check_values(values: dict[str, Any]) -> None:
    """Let the plugin and axolotl validate a config, as `axolotl train` does, and load its files.

    Raises:
        AMoPOError: with the sentence of whoever refuses it.
    """
    from axolotl.cli.config import load_cfg
    from pydantic import ValidationError

    with tempfile.TemporaryDirectory() as folder:
        path = write_yaml(Path(folder) / "config.yml", values | {"output_dir": folder})
        try:
            load_cfg(str(path))
        except ValidationError as error:
            reasons = "; ".join(detail["msg"] for detail in error.errors())
            raise ConfigError(f"axolotl refuses it: {reasons}.") from None
        except AMoPOError:
            raise
        except (ValueError, KeyError, TypeError, OSError) as error:
            line = str(error).strip().partition("\n")[0]
            raise ConfigError(f"axolotl refuses it: {line}.") from None


def write_yaml(path: Path, values: dict[str, Any]) -> Path:
    """Write a config, and return its path."""
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    path.write_text(text, encoding="utf-8")
    return path


def prepared(values: dict[str, Any]) -> tuple[Any, Any, list[Preparation]]:
    """Prepare a config's training data anew.

    Returns:
        axolotl's config, the prepared rows in the order of training, and how each entry was made.
    """
    from axolotl.cli.config import load_cfg
    from axolotl.loaders import load_tokenizer

    from axolotl_amopo.commands.kit.prepare import prepared_anew

    with tempfile.TemporaryDirectory() as folder:
        path = write_yaml(Path(folder) / "config.yml", values | {"output_dir": folder})
        cfg = load_cfg(str(path))
        with prepared_anew(cfg, load_tokenizer(cfg)) as made:
            return cfg, made.train, made.preparations


def keyed_rows(preparation: Preparation) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Yield the rows that can be used, each with the key of its prompt."""
    bad, number = preparation.survey.bad, 0
    for batch in preparation.dataset.iter(batch_size=1000):
        for values in unpack(batch):
            number += 1
            if number - 1 not in bad:
                row = Row(values, number, preparation.format.source)
                yield preparation.format.prompt_of(row).key(), values


def deal(keys: Iterable[bytes], folds: Folds) -> list[list[bytes]]:
    """Return the prompts of each fold's held-out part: of equal size, each prompt in one fold.

    The order depends on the prompts' texts and the seed alone, so that rows can be moved about.
    """
    order = sorted(set(keys), key=lambda key: _rank(key, folds.seed))
    return [order[number :: folds.count] for number in range(folds.count)]


def _rank(key: bytes, seed: int) -> bytes:
    return hashlib.blake2b(key, digest_size=16, key=str(seed).encode()).digest()


def make_folds(comparison: Comparison) -> int:
    """Write every fold's training and held-out rows, where they are not there yet.

    Returns:
        The number of prompts.

    Raises:
        AMoPOError: for data that can't be used, too few prompts, or folds of other data.
    """
    folds, output = comparison.folds, comparison.output
    folder = output / "folds"
    values = comparison.base | {"datasets": comparison.base["datasets"], "val_set_size": 0}
    _, _, preparations = prepared(values)
    rows = [list(keyed_rows(preparation)) for preparation in preparations]
    keys = {key for part in rows for key, _ in part}
    if len(keys) < 2 * folds.count:
        raise DataError(
            f"folds: {folds.count} of {len(keys)} prompts leave less than two for each; write "
            "fewer, or add data."
        )
    facts = {"folds": folds.model_dump(), "prompts": sorted(key.hex() for key in keys)}
    if (folder / FACTS).is_file():
        if json.loads((folder / FACTS).read_text(encoding="utf-8")) != facts:
            raise ConfigError(
                f"{folder}: holds folds of other data or of another number; name another output, "
                "or delete it with its runs."
            )
        return len(keys)
    parts = deal(keys, folds)
    new = Path(tempfile.mkdtemp(prefix="_folds-", dir=output))
    for fold, heldout in enumerate(parts, start=1):
        rest = [key for other in parts if other is not heldout for key in other]
        rest.sort(key=lambda key: _rank(key, folds.seed))
        chosen = {"heldout": set(heldout[: folds.heldout]), "train": set(rest[: folds.train])}
        (new / str(fold)).mkdir()
        for number, part in enumerate(rows):
            for name, wanted in chosen.items():
                lines = [json.dumps(row, default=str) for key, row in part if key in wanted]
                file = fold_file(output, fold, name, number)
                (new / file.relative_to(folder)).write_text("\n".join([*lines, ""]), "utf-8")
    (new / FACTS).write_text(json.dumps(facts), encoding="utf-8")
    if folder.exists():
        shutil.rmtree(folder)  # without its facts: the half of one that was being written
    new.replace(folder)
    return len(keys)


def overlap(train: dict[str, Any], heldout: dict[str, Any]) -> dict[str, int]:
    """Return how many prompts are held out, and how many of them are trained on too.

    Args:
        train, heldout: configs whose `datasets:` are the two parts.
    """
    keys = [
        {key for preparation in prepared(values)[2] for key, _ in keyed_rows(preparation)}
        for values in (train, heldout)
    ]
    return {"heldout": len(keys[1]), "shared": len(keys[0] & keys[1])}


def export_pairs(values: dict[str, Any], path: Path) -> int:
    """Write the pairs of a config's training data in axolotl's format, and return their number.

        {"messages": [...], "chosen": {"role": "assistant", ...}, "rejected": {...}}

    They are the pairs that training would use, in its order: made, drawn and filtered alike.

    Raises:
        DataError: for conversations with tools, which that format has no place for.
    """
    _, train, preparations = prepared(values)
    by_id: dict[int, list[dict[str, Any]]] = {}
    for preparation in preparations:
        examples = [group for _, groups in preparation.prompts() for group in groups]
        ids = preparation.prepared["example_id"]
        for number, identity in zip(preparation.kept, ids, strict=True):
            by_id[identity] = [
                _exported(pair, preparation) for pair in examples[number] if not pair.alone
            ]
    rows = [row for identity in train["example_id"] for row in by_id[identity]]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return len(rows)


def _exported(pair: Any, preparation: Preparation) -> dict[str, Any]:
    prompt = pair.prompt
    if prompt.tools:
        raise DataError(
            f"{preparation.format.where([pair])}: has tools, which axolotl's format of pairs has "
            "no place for; leave axolotl's own methods out of the comparison."
        )
    chosen, rejected = (_message(prompt.responses[index].turn) for index in pair.responses)
    return {"messages": prompt.messages, "chosen": chosen, "rejected": rejected}


def _message(turn: str | Message) -> Message:
    return {"role": "assistant"} | ({"content": turn} if isinstance(turn, str) else turn)


def exported_entry(entry: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return the `datasets:` entry by which axolotl's own methods read exported pairs."""
    templates = {
        key: entry[key] for key in ("chat_template", "chat_template_jinja") if key in entry
    }
    return {
        "path": str(path),
        "ds_type": "json",
        "split": "train",
        "type": "chat_template.default",
        "field_messages": "messages",
        "field_chosen": "chosen",
        "field_rejected": "rejected",
    } | templates
