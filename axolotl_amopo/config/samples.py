"""Samples while it trains: `amopo.generate_samples`, and axolotl's own keys for the same.

`generate_samples: true` with `num_generation_samples: N` is `amopo.generate_samples: N`. How tokens
are chosen stands in axolotl's `generation_...` keys either way. Unlike axolotl's, samples are the
likeliest tokens unless a key asks for a draw, so that two evaluations differ by the model alone.
"""

from typing import Any

from axolotl_amopo.config.block import AMoPOConfig
from axolotl_amopo.errors import ConfigError

SWITCH, COUNT = "generate_samples", "num_generation_samples"
#: axolotl's keys that say how tokens are chosen, with what their values must be.
SAMPLING: dict[str, tuple[str, Any]] = {
    "generation_max_new_tokens": ("a whole number above 0", lambda value: value >= 1),
    "generation_temperature": ("a number of at least 0", lambda value: value >= 0),
    "generation_top_p": ("a number above 0, up to 1", lambda value: 0 < value <= 1),
    "generation_top_k": ("a whole number of at least 0", lambda value: value >= 0),
    "generation_do_sample": ("true or false", lambda value: isinstance(value, bool)),
}
# Those that ask for a draw.
DRAWS = ("generation_temperature", "generation_top_p", "generation_top_k")
# axolotl's own number, and a length that shows a collapse and a paragraph.
DEFAULT_COUNT, DEFAULT_TOKENS = 3, 128


def move_samples(cfg: dict) -> None:
    """Move axolotl's switch and number from a raw config into its `amopo:` block.

    Raises:
        ConfigError: where the block has another number, or there is no switch.
    """
    block = cfg.get("amopo")
    if block is not None and not isinstance(block, dict):
        return  # refused as a whole by whoever reads it
    block = dict(block or {})
    switch, count, own = cfg.pop(SWITCH, None), cfg.pop(COUNT, None), block.get(SWITCH)
    if not isinstance(switch, bool | None):
        raise ConfigError(f"{SWITCH}: must be true or false, got {switch!r}.")
    if count is not None and not switch:
        raise ConfigError(
            f"{COUNT}: {count} has no effect without {SWITCH}: true; write amopo.{SWITCH}: {count}."
        )
    if not switch:
        return
    count = DEFAULT_COUNT if count is None else count
    if own is not None and own != count:
        raise ConfigError(
            f"amopo.{SWITCH}: {own} and {SWITCH}: true ({count} samples) are two numbers for one "
            "thing; remove one of them."
        )
    cfg["amopo"] = block | {SWITCH: count}


def check_samples(cfg: dict, config: AMoPOConfig, *, with_data: bool = True) -> None:
    """Check the keys of samples in a raw config, and put our defaults where they are not set.

    Args:
        with_data: false where nothing is evaluated.

    Raises:
        ConfigError: for a key that is out of bounds or has no effect, and where no prompt is held
            out.
    """
    given = {key: cfg[key] for key in SAMPLING if cfg.get(key) is not None}
    if not config.generate_samples:
        names = [*given, *(["amopo.sample_settings"] if config.sample_settings else [])]
        for name in names:
            raise ConfigError(
                f"{name}: has no effect without samples; write amopo.{SWITCH}: {DEFAULT_COUNT}, or "
                "remove it."
            )
        return
    for key, value in given.items():
        what, fits = SAMPLING[key]
        whole = "whole" in what
        number = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
        if not ((number or what.startswith("true")) and fits(value)):
            raise ConfigError(f"{key}: must be {what}, got {value!r}.")
    if with_data and not (cfg.get("val_set_size") or cfg.get("test_datasets")):
        raise ConfigError(
            f"amopo.{SWITCH}: {config.generate_samples} needs prompts that are held out; write "
            "val_set_size or test_datasets."
        )
    if with_data and str(cfg.get("eval_strategy")).lower() in ("no", "false"):
        raise ConfigError(
            f"amopo.{SWITCH}: {config.generate_samples} has no effect with eval_strategy: no, for "
            "samples are taken at evaluations; write eval_strategy: epoch, or eval_steps."
        )
    if given.get("generation_do_sample") is False:
        for key in DRAWS:
            if given.get(key):
                raise ConfigError(
                    f"{key}: {given[key]} has no effect with generation_do_sample: false; remove "
                    "one of the two."
                )
    draws = given.get("generation_do_sample", any(given.get(key) for key in DRAWS))
    if draws and given.get("generation_temperature") == 0:
        raise ConfigError(
            "generation_temperature: 0 draws nothing; remove it, or what asks for a draw "
            "(generation_do_sample, generation_top_p, generation_top_k)."
        )
    cfg["generation_do_sample"] = draws
    cfg.setdefault("generation_max_new_tokens", DEFAULT_TOKENS)
