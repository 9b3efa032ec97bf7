"""A YAML file -> its plan."""

import copy
from contextlib import suppress
from pathlib import Path

import torch
from axolotl.integrations.base import PluginManager, normalize_plugin_name
from axolotl.utils.config import prepare_plugins, validate_config
from axolotl.utils.dict import DictDefault
from pydantic import ValidationError

from axolotl_amopo.commands.plan.cards import find_card
from axolotl_amopo.commands.plan.estimate import Plan, advise, estimate
from axolotl_amopo.commands.plan.groups import prepared_folder, prepared_rows
from axolotl_amopo.commands.plan.models import model_config
from axolotl_amopo.commands.plan.step import PairShape, Step
from axolotl_amopo.config.axolotl_keys import check_gradients, check_parts, check_router
from axolotl_amopo.config.block import AMoPOConfig, read_block
from axolotl_amopo.config.files import read_yaml
from axolotl_amopo.config.take_over import take_over
from axolotl_amopo.errors import AMoPOError, ConfigError

# About what the default instruction has; with `instruction_place: after` the rest is shared.
INSTRUCTION_TOKENS = 40


def plan_config(
    path: str,
    *,
    gpu: str | None = None,
    gpu_memory: float | None = None,
    gpu_tflops: float | None = None,
    gpus: int = 1,
    prompt_tokens: int = 480,
    response_tokens: int = 115,
    responses: int | None = None,
    pairs: int = 10_000,
    held_out: int | None = None,
    utilisation: float = 0.4,
    with_advice: bool = True,
) -> tuple[Plan, list[tuple[str, Plan]]]:
    """Return the plan of a config file, and changes that would make it fit, see `estimate`.

    Args:
        with_advice: look for such changes, which takes a plan for each.

    Raises:
        AMoPOError: for a config that training would refuse too, an unknown card, or a model whose
            config can't be had.
    """
    device = "cpu" if gpu == "cpu" else "cuda"
    card = None
    if device == "cuda" and (gpu is not None or gpu_memory is not None):
        card = find_card(gpu or "this card", gpu_memory, gpu_tflops)
    cfg, amopo = load(path, device, gpus)
    if responses and not amopo.group_by_prompt:
        raise ConfigError(
            f"--responses {responses}: a pair has two; write amopo.group_by_prompt: true for "
            "groups, or leave the option out."
        )
    if responses == 1 and amopo.single_responses != "keep":
        raise ConfigError(
            f"--responses 1: a prompt with one response is dropped with objective "
            f"{amopo.objective} (amopo.single_responses: {amopo.single_responses}); give 2 or more."
        )
    rows = None if responses else prepared_rows(cfg, amopo)
    config = model_config(cfg)
    after = amopo.instruction_place == "after"
    beginning = max(0, prompt_tokens - INSTRUCTION_TOKENS) if after else 0

    steps: dict[str, Step] = {}

    def plan(cfg: DictDefault, devices: int) -> Plan:
        amopo = read_block(cfg)
        check_parts(cfg, amopo)
        check_gradients(cfg, amopo)
        check_router(amopo, config.get_text_config().to_dict())
        return estimate(
            cfg,
            config,
            amopo,
            PairShape(prompt_tokens, response_tokens, beginning),
            responses=responses,
            rows=rows,
            card=card,
            devices=devices,
            device=device,
            utilisation=utilisation,
            epoch_pairs=pairs,
            held_out_pairs=held_out,
            steps=steps,
        )

    first = plan(cfg, gpus)
    return first, advise(cfg, first, plan) if with_advice else []


def load(path: str, device: str, gpus: int) -> tuple[DictDefault, AMoPOConfig]:
    """Return a config, validated by the plugin and by axolotl for devices, and its block.

    Raises:
        AMoPOError: saying what is wrong with it.
    """
    values = read_yaml(Path(path))
    if not isinstance(values, dict) or values.get("rl") != "amopo":
        raise ConfigError(f"{path}: has no `rl: amopo`; there is nothing to plan.")
    cfg = DictDefault(copy.deepcopy(values) | {"axolotl_config_path": path})
    _load_plugins(cfg)
    # Before the plugin does, which would hold the config against the devices that are here.
    take_over(cfg, device=device, with_data=False)
    if read_block(cfg).group_by_prompt and prepared_folder(cfg, "").is_dir():
        with_data = DictDefault(values | {"axolotl_config_path": path})
        with suppress(AMoPOError):  # of data that is elsewhere
            take_over(with_data, device=device)
            cfg = with_data
    prepare_plugins(cfg)
    try:
        cfg = validate_config(
            cfg,
            capabilities={
                "bf16": device == "cuda",
                "fp8": device == "cuda",
                "tf32": device == "cuda",
                "n_gpu": gpus,
                "compute_capability": "sm_90" if device == "cuda" else None,
            },
            env_capabilities={"torch_version": torch.__version__.split("+")[0]},
        )
    except ValidationError as error:
        reasons = "; ".join(detail["msg"] for detail in error.errors())
        raise AMoPOError(f"{path}: axolotl refuses it: {reasons}.") from None
    if cfg.bf16 == "auto":
        cfg.bf16 = device == "cuda"
    cfg.micro_batch_size = cfg.micro_batch_size or 1
    return cfg, read_block(cfg)


def _load_plugins(cfg: DictDefault) -> None:
    """Load the plugins that the config names, as `prepare_plugins` does before it asks them.

    Or their keys would be taken for misspelt ones of axolotl's.
    """
    manager = PluginManager.get_instance()
    for name in map(normalize_plugin_name, cfg.plugins or []):
        if name not in manager.plugins:
            manager.register(name, required=True)
