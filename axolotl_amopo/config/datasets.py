"""The `datasets:` entries of the YAML: our own keys, module paths, and what the cache must know.

axolotl's schema drops keys it doesn't know, and its prepared-dataset hash knows nothing of the
`amopo:` block. So, before validation, our keys move into the block, and a fingerprint of all that
shapes the prepared rows goes into the entry's `conversation` field: a field of axolotl's schema
that is part of that hash and that only its removed ShareGPT formats read.
"""

import hashlib
import importlib.util
import json
from pathlib import Path
from typing import Any

from axolotl.utils.schemas.datasets import SFTDataset

import axolotl_amopo
from axolotl_amopo.config.block import AMoPOConfig, DatasetOptions, parse_block, plain
from axolotl_amopo.config.files import check_loads, digest, local_files
from axolotl_amopo.errors import ConfigError, did_you_mean

FORMATS_PACKAGE = "axolotl_amopo.formats"
PREFIX = "amopo."

# Settings of the block that change the loss, not the prepared rows.
NOT_IN_ROWS = {"gamma", "weighting", "weights", "share_prompt", "eval_table", "datasets", "enabled"}
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
)


def formats() -> list[str]:
    """The `type:` names that come with this package."""
    folder = Path(__file__).parent.parent / "formats"
    return sorted(PREFIX + path.stem.rstrip("_") for path in folder.glob("[a-z]*.py"))


def prepare_entries(cfg: dict, config: AMoPOConfig) -> dict[str, dict[str, Any]]:
    """Rewrite `datasets:` and `test_datasets:` in place.

    Returns:
        For every entry's fingerprint: its own options, and whether it is for evaluation.

    Raises:
        ConfigError: for a type or key that is unknown.
        DataError: for a local file that can't be loaded, naming file and row.
    """
    if not cfg.get("datasets"):
        raise ConfigError(
            "datasets: is missing or empty; write at least one entry with path: and type:, e.g. "
            "type: amopo.helpsteer."
        )
    stored: dict[str, dict[str, Any]] = {}
    shared = _shared_facts(cfg, config)
    for section in ("datasets", "test_datasets"):
        entries = cfg.get(section) or []
        if not isinstance(entries, list) or not all(isinstance(e, dict) for e in entries):
            raise ConfigError(f"{section}: must be a list of entries with path: and type:.")
        for i, entry in enumerate(entries):
            where = f"{section}[{i}]"
            options = _take_options(entry, where)
            entry["type"] = _module_of(entry.get("type"), where)
            if not entry.get("path"):
                raise ConfigError(f"{where}.path: is missing; name a file, folder or hub dataset.")
            check_loads(entry, where)
            facts = {
                "shared": shared,
                "options": options.model_dump(),
                "eval": section == "test_datasets",
                "entry": {k: str(v) for k, v in sorted(entry.items()) if v is not None},
                "files": [digest(path) for path in local_files(entry)],
                "template": _template_text(entry),
            }
            fingerprint = "amopo-" + _hash(facts)
            entry["conversation"] = fingerprint
            stored[fingerprint] = {
                "options": options.model_dump(exclude_none=True),
                "eval_split": section == "test_datasets",
            }
    return stored


def _take_options(entry: dict, where: str) -> DatasetOptions:
    own = set(DatasetOptions.model_fields)
    for key in entry:
        if key not in SFTDataset.model_fields and key not in own:
            known = [*own, "path", "type", "split", "name", "data_files", "ds_type", "weight"]
            raise ConfigError(
                f"{where}.{key}: unknown key.{did_you_mean(key, known)} Keys here are axolotl's "
                f"own (path, type, split, ...) and {', '.join(sorted(own))}."
            )
    taken = {key: entry.pop(key) for key in own if key in entry}
    return parse_block(DatasetOptions, plain(taken), where)


def _module_of(kind: Any, where: str) -> str:
    """The module that a `type:` names: one of ours, or any package's with a `load`."""
    if isinstance(kind, str) and "." in kind:
        module = kind
        if kind.startswith(PREFIX):
            module = f"{FORMATS_PACKAGE}.{kind.removeprefix(PREFIX)}"
            # axolotl takes every module of that name for its own format, and fails.
            module += "_" * module.endswith(".user_defined")
        try:
            if importlib.util.find_spec(module):
                return module
        except ModuleNotFoundError:
            pass
    raise ConfigError(
        f"{where}.type: {kind!r} is not a dataset format for rl: amopo."
        f"{did_you_mean(str(kind), formats())} Known: {', '.join(formats())}, or the import path "
        "of a module of your own."
    )


def _shared_facts(cfg: dict, config: AMoPOConfig) -> dict[str, Any]:
    """What shapes every dataset's rows, beyond what axolotl's own hash holds."""
    tokenizer = Path(str(cfg.get("tokenizer_config") or cfg.get("base_model")))
    package = Path(__file__).parent.parent
    sources = sorted([*package.glob("data/*.py"), *package.glob("formats/*.py")])
    return {
        "version": axolotl_amopo.__version__,
        "code": [digest(path) for path in sources],
        "block": config.model_dump(mode="json", exclude=NOT_IN_ROWS),
        "excess_length_strategy": cfg.get("excess_length_strategy"),
        "seed": cfg.get("seed") if isinstance(config.pairs, int) else None,  # of the pairs drawn
        "sequence_len": [cfg.get("sequence_len"), cfg.get("eval_sequence_len")],
        "template": _template_text(cfg),
        "tokenizer": [
            digest(tokenizer / name) for name in TOKENIZER_FILES if (tokenizer / name).is_file()
        ],
    }


def _template_text(holder: dict) -> str | None:
    """The chat template's text, also where the key names a file."""
    text = holder.get("chat_template_jinja")
    if text and len(str(text)) < 1024 and Path(str(text)).is_file():
        return Path(text).read_text(encoding="utf-8")
    return text


def _hash(facts: Any) -> str:
    text = json.dumps(facts, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
