"""`amopo.reference`: the models that an objective compares with, and where their numbers are kept.

`initial` is the model as training found it. Any other name is a model of somebody else's, whose
log-probabilities `axolotl amopo reference` takes with that model alone in memory. They stand in a
file beside the prepared data, for all runs on it.
"""

import hashlib
import re
from pathlib import Path
from typing import Any

from axolotl.common.const import DEFAULT_DATASET_PREPARED_PATH

from axolotl_amopo.config.block import AMoPOConfig
from axolotl_amopo.errors import ConfigError

INITIAL = "initial"
# In a checkpoint; those of another model have its name in theirs.
FILE = "amopo_reference.npz"


def file_of(model: str) -> str:
    """Return the name of the file that keeps a model's log-probabilities."""
    if model == INITIAL:
        return FILE
    readable = re.sub(r"[^\w.-]+", "-", Path(model).name)
    digest = hashlib.sha256(model.encode()).hexdigest()[:8]
    return f"{Path(FILE).stem}-{readable}-{digest}.npz"


def path_of(cfg: Any, model: str) -> Path:
    """Return where `axolotl amopo reference` writes another model's log-probabilities."""
    return Path(cfg.dataset_prepared_path or DEFAULT_DATASET_PREPARED_PATH) / file_of(model)


def check_references(cfg: Any, config: AMoPOConfig) -> None:
    """Check that other models' log-probabilities have been taken.

    Raises:
        ConfigError: saying which are missing, and the command that takes them.
    """
    for model in config.other_references:
        if not (path := path_of(cfg, model)).is_file():
            raise ConfigError(
                f"amopo.reference: {path}, the log-probabilities of {model}, is not there; run "
                f"`axolotl amopo reference {cfg.axolotl_config_path or 'CONFIG'}` first, which "
                "takes them."
            )
