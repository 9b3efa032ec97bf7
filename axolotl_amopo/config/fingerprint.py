"""All that shapes the prepared rows of a `datasets:` entry, as one short text.

Rows that another command prepared are used again where the fingerprint is the same, so what shapes
rows must be in it, and nothing else should: whoever tunes a learning rate prepares once.
"""

import hashlib
import importlib.util
import json
from pathlib import Path
from typing import Any

from axolotl_amopo.config.block import INTERNAL, AMoPOConfig
from axolotl_amopo.config.files import digest, local_files

# The version of the prepared rows, kept by hand: raise it when the same config and data give other
# rows than before (their columns, their ids, the text of an instruction). Without it, rows of an
# older version would be used again. tests/test_rows_version.py fails where it was forgotten.
ROWS_VERSION = 4

# Keys of the block that change the loss, not the rows; as every hyperparameter of an objective
# does. Of `preset` and `objective` the rows know what other keys of the block have taken.
NOT_IN_ROWS = {
    "preset",
    "objective",
    "weights",
    "reference",
    "share_prompt",
    "max_tokens",
    "one_prompt_at_a_time",
    "gradient_cosines",
    "eval_table",
    "generate_samples",
    "sample_settings",
    "console",
    *INTERNAL,
}
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
)
# axolotl's keys that change the tokenizer that it loads and that its own hash lacks.
TOKENIZER_KEYS = (
    "tokens",
    "tokenizer_type",
    "tokenizer_use_fast",
    "tokenizer_legacy",
    "tokenizer_use_mistral_common",
    "revision_of_model",
)


def shared_facts(cfg: dict, config: AMoPOConfig) -> dict[str, Any]:
    """Return what shapes the rows of every entry, beyond what axolotl's own hash holds."""
    model = Path(str(cfg.get("base_model")))
    tokenizer = Path(str(cfg.get("tokenizer_config") or model))
    files = [tokenizer / name for name in TOKENIZER_FILES]
    files.append(model / "generation_config.json")  # where responses end
    return {
        "rows": ROWS_VERSION,
        "block": config.model_dump(mode="json", exclude={*NOT_IN_ROWS, *config.hyperparameters()}),
        # Of what an objective needs, that alone shapes rows.
        "all_responses": config.all_responses,
        "excess_length_strategy": cfg.get("excess_length_strategy"),
        "seed": cfg.get("seed") if config.rows_are_drawn else None,
        "sequence_len": [cfg.get("sequence_len"), cfg.get("eval_sequence_len")],
        "template": _template_text(cfg),
        "tokenizer": [digest(path) for path in files if path.is_file()],
        "tokenizer_keys": [cfg.get(key) for key in TOKENIZER_KEYS],
    }


def entry_facts(entry: dict, kind: str, ours: bool) -> dict[str, Any]:
    """Return what shapes the rows of one entry.

    Args:
        entry: axolotl's keys.
        kind: its `type:` as the user wrote it. Where the format's module stands in this package
            does not matter, so files can be moved.
        ours: false for a module of somebody else's, whose rows change when its file does.
    """
    return {
        "entry": {k: str(v) for k, v in sorted((entry | {"type": kind}).items()) if v is not None},
        "code": None if ours else _module_digest(kind),
        "files": [digest(path) for path in local_files(entry)],
        "template": _template_text(entry),
    }


def fingerprint(facts: Any) -> str:
    """Return the facts as a short text."""
    text = json.dumps(facts, sort_keys=True, default=str)
    return "amopo-" + hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _module_digest(module: str) -> str | None:
    spec = importlib.util.find_spec(module)
    source = Path(spec.origin) if spec and spec.origin else None
    return digest(source) if source and source.is_file() else None


def _template_text(holder: dict) -> str | None:
    """Return the chat template's text, also where the key names a file."""
    text = holder.get("chat_template_jinja")
    if text and len(str(text)) < 1024 and Path(str(text)).is_file():
        return Path(text).read_text(encoding="utf-8")
    return text
