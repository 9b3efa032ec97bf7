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
from axolotl_amopo.config.datasets import (
    PREFIX,
    SUPERVISED,
    SUPERVISED_MODULE,
    prepare_entries,
)
from axolotl_amopo.config.devices import check_devices, check_parallel
from axolotl_amopo.config.files import check_yaml
from axolotl_amopo.config.hardware import (
    has_gpu_without_bf16,
    suit_a_cpu,
    suit_a_gpu_without_bf16,
)
from axolotl_amopo.config.overrides import apply_overrides
from axolotl_amopo.config.parse import parse_block
from axolotl_amopo.config.samples import check_samples, move_samples
from axolotl_amopo.config.together import check_needs
from axolotl_amopo.errors import ConfigError

LOG = get_logger(__name__)

# The keys of the block that shape the rows of `type: amopo.ric`.
SUPERVISED_KEYS = (
    "objective",
    "dimensions",
    "overall",
    "prompts",
    "rating_in_prompt",
    "rating_levels",
    "instruction",
    "overall_instruction",
    "instruction_place",
    "missing_ratings",
    "single_responses",
    "bad_rows",
)
# axolotl's keys that would bring other rows than ours, or none.
NOT_SUPERVISED = ("rl", "streaming", "pretraining_dataset", "skip_prepare_dataset")


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
    move_samples(cfg)
    config = parse_block(AMoPOConfig, plain(cfg.get("amopo")), "amopo")
    check_needs(config)
    check_samples(cfg, config, with_data=with_data)
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
    # Merging keeps the base's precision, which is bf16 as a rule. A Ray driver doesn't know.
    elsewhere = device is not None or cfg.get("merge_lora") or cfg.get("use_ray")
    if not elsewhere and has_gpu_without_bf16():
        suit_a_gpu_without_bf16(cfg)
    if cfg.get("use_ray"):
        # Or Ray moves its workers to a folder of its own, where relative paths lead nowhere.
        os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
    _log(config, beta, without_effect)


def has_supervised_rows(cfg: dict) -> bool:
    """Return whether a config has a dataset of `type: amopo.ric`, for a run without `rl: amopo`."""
    return not is_asked_for(cfg) and bool(_types(cfg) & {SUPERVISED, SUPERVISED_MODULE})


def take_over_rows(cfg: dict, *, with_data: bool = True) -> None:
    """Check the datasets of `type: amopo.ric` in a raw config, and rewrite them in place.

    They get their rows from `data.supervised`; the block stays off, so that axolotl trains on them
    as on any other rows. A config that was rewritten before, as a Ray worker gets it, stays.

    Args:
        with_data: as for `take_over`.

    Raises:
        ConfigError: for a key that is unknown, out of bounds, or can't go with the others.
        DataError: for a local data file that can't be read.
    """
    if SUPERVISED not in _types(cfg):
        return
    check_yaml(cfg.get("axolotl_config_path"))
    apply_overrides(cfg)
    block = plain(cfg.get("amopo")) or {}
    kind = f"type: {SUPERVISED}"
    if isinstance(block, dict):  # a null is a key that is not set
        block = {"objective": "ric"} | {k: v for k, v in block.items() if v is not None}
    config = parse_block(AMoPOConfig, block, "amopo")
    if config.objective != "ric":
        raise ConfigError(
            f"amopo.objective: {config.objective} can't go with {kind}, which is supervised; "
            "remove it, or write rl: amopo and the type of the rows."
        )
    for key in block:
        if key not in SUPERVISED_KEYS:
            raise ConfigError(
                f"amopo.{key}: has no effect with {kind}, where axolotl's own trainer runs; remove "
                f"it. Keys that have: {', '.join(SUPERVISED_KEYS)}."
            )
    for key in NOT_SUPERVISED:
        if cfg.get(key):
            raise ConfigError(
                f"{key}: {cfg[key]!r} can't work with {kind}, whose rows are prepared whole for "
                "supervised fine-tuning; remove it."
            )
    if cfg.get("train_on_inputs"):
        LOG.warning(
            "train_on_inputs has no effect with %s: the loss is over responses; remove it.", kind
        )
    if with_data:
        config.datasets = prepare_entries(cfg, config, supervised=True)
    cfg["amopo"] = config.model_dump(exclude_none=True)
    LOG.info(
        "%s: every response is a row under a prompt that states its ratings on %s; the trainer is "
        "axolotl's own.",
        kind,
        ", ".join(config.dimension_names),
    )


def suit_inference(cfg: dict) -> None:
    """Let `axolotl inference`, which takes `rl` away, run a config of ours without a GPU."""
    if cfg.get("inference") and _is_on_cpu(cfg) and _has_our_datasets(cfg):
        suit_a_cpu(cfg)


def _types(cfg: dict) -> set[str]:
    sections = [cfg.get(name) for name in ("datasets", "test_datasets")]
    entries = [entry for section in sections if isinstance(section, list) for entry in section]
    return {str(entry.get("type")) for entry in entries if isinstance(entry, dict)}


def _has_our_datasets(cfg: dict) -> bool:
    return any(kind.startswith(PREFIX) for kind in _types(cfg))


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
        LOG.warning("%s has no effect with rl: amopo, which has its own loss; remove it.", key)


def _setting(name: str, value: Any) -> str:
    return f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"
