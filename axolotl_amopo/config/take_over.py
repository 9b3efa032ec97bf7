"""`rl: amopo` in a raw config -> a config that axolotl can validate."""

import os
from typing import Any

import torch
from axolotl.utils.logging import get_logger

from axolotl_amopo.config.axolotl_keys import (
    check_axolotl_keys,
    check_gradients,
    check_other_references,
    check_parts,
)
from axolotl_amopo.config.block import AMoPOConfig, plain, read_beta
from axolotl_amopo.config.cpu import suit_a_cpu
from axolotl_amopo.config.datasets import PREFIX, prepare_entries
from axolotl_amopo.config.devices import check_devices, check_parallel
from axolotl_amopo.config.files import check_yaml
from axolotl_amopo.config.overrides import apply_overrides
from axolotl_amopo.config.parse import parse_block
from axolotl_amopo.config.together import check_needs

LOG = get_logger(__name__)


def is_asked_for(cfg: dict) -> bool:
    """Return whether a raw config says `rl: amopo`."""
    return cfg.get("rl") == "amopo"


def is_taken_over(cfg: dict) -> bool:
    """Return whether `take_over` has been here: a Ray worker's config, or one that is planned."""
    block = cfg.get("amopo")
    return not is_asked_for(cfg) and isinstance(block, dict) and bool(block.get("enabled"))


def take_over(cfg: dict, *, device: str | None = None, with_data: bool = True) -> None:
    """Check a raw config with `rl: amopo`, and rewrite it in place.

    axolotl knows a closed list of `rl:` values, so `rl` is cleared and the block is turned on.

    Args:
        device: "cuda" or "cpu" for a run somewhere else; by default what this machine has.
        with_data: false where the data may be elsewhere, and no rows are needed.

    Raises:
        ConfigError: for a key that is unknown, out of bounds, or can't go with the others.
        DataError: for a local data file that can't be read.
    """
    check_yaml(cfg.get("axolotl_config_path"))
    apply_overrides(cfg)
    config = parse_block(AMoPOConfig, plain(cfg.get("amopo")), "amopo")
    check_needs(config)
    without_effect = check_axolotl_keys(cfg)
    check_parallel(cfg)
    check_gradients(cfg, config)
    check_parts(cfg, config)
    check_other_references(cfg, config)
    if device is None:
        check_devices(cfg)
    beta = read_beta(cfg, config)
    config.enabled = True
    if with_data:
        config.datasets = prepare_entries(cfg, config)

    cfg["rl"] = None
    cfg["amopo"] = config.model_dump(exclude_none=True)
    cfg["rl_beta"] = beta
    if device == "cpu" or (device is None and _is_on_cpu(cfg)):
        suit_a_cpu(cfg)
    if cfg.get("use_ray"):
        # Or Ray moves its workers to a folder of its own, where relative paths lead nowhere.
        os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
    _log(config, beta, without_effect)


def suit_inference(cfg: dict) -> None:
    """Let `axolotl inference`, which takes `rl` away, run a config of ours without a GPU."""
    if cfg.get("inference") and _is_on_cpu(cfg) and _has_our_datasets(cfg):
        suit_a_cpu(cfg)


def _has_our_datasets(cfg: dict) -> bool:
    return any(str(entry.get("type")).startswith(PREFIX) for entry in cfg.get("datasets") or [])


def _is_on_cpu(cfg: dict) -> bool:
    # A Ray driver doesn't know its workers' devices.
    return not torch.accelerator.is_available() and not cfg.get("use_ray")


def _log(config: AMoPOConfig, beta: float, without_effect: list[str]) -> None:
    LOG.info(
        "rl: amopo: objective %s, criteria %s; winner %s, rl_beta %s. (axolotl logs its config "
        "with `rl` absent: the plugin has taken over from there.)",
        config.objective,
        ", ".join(config.criteria),
        config.winner,
        ", ".join([f"{beta:g}", *(_setting(*item) for item in config.hyperparameters().items())]),
    )
    for key in without_effect:
        LOG.warning("%s has no effect with rl: amopo, which has its own loss.", key)


def _setting(name: str, value: Any) -> str:
    return f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"
