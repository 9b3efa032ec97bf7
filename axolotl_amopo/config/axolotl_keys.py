"""axolotl's own keys that can't go with `rl: amopo`, and keys that are no keys at all."""

import difflib
import importlib
from collections.abc import Mapping, Set
from dataclasses import fields
from typing import Any

from axolotl.cli.args import EvaluateCliArgs, InferenceCliArgs, PreprocessCliArgs, TrainerCliArgs

from axolotl_amopo.config.block import AMoPOConfig, known_keys, read_block
from axolotl_amopo.errors import ConfigError

COMMAND_ARGUMENTS = (TrainerCliArgs, EvaluateCliArgs, PreprocessCliArgs, InferenceCliArgs)

# axolotl's keys that can't work with a preference loss over pairs, and what to do instead.
INCOMPATIBLE: dict[str, str] = {
    "sample_packing": "set it to false: a pair's sequences are batched together by the plugin",
    "eval_sample_packing": "set it to false: a pair's sequences are batched by the plugin",
    "batch_flattening": "remove it: a pair's sequences are batched together by the plugin",
    "multipack_real_batches": "remove it: there is no sample packing here",
    "train_on_inputs": "set it to false: the loss is over the responses only",
    "reward_model": "remove it: AMoPO trains without a reward model",
    "process_reward_model": "remove it: AMoPO trains without a reward model",
    "rl_adapter_ref_model": "remove it: amopo.reference says what an objective compares with",
    "pretraining_dataset": "use datasets: with a type of amopo.*",
    "streaming": "set it to false: pairs are made from the whole dataset",
    "skip_prepare_dataset": "set it to false: pairs are made while the dataset is prepared",
    "trainer_cls": "remove it: rl: amopo brings its own trainer",
    "simpo_gamma": "write amopo.gamma (an absolute margin, as simpo_gamma is)",
    "dpo_beta": "write rl_beta",
    "dpo_label_smoothing": "remove it: it belongs to rl: dpo",
    "dpo_loss_type": "remove it: it belongs to rl: dpo",
    "dpo_loss_weights": "remove it: it belongs to rl: dpo",
    "dpo_use_weighting": "remove it: it belongs to rl: dpo",
    "dpo_ld_alpha": "remove it: it belongs to rl: dpo",
    "dpo_padding_free": "remove it: it belongs to rl: dpo; amopo.share_prompt saves more",
    "dpo_use_liger_kernel": "remove it: it belongs to rl: dpo; logits are made in chunks here too",
    "precompute_ref_log_probs": "remove it: see amopo.reference, taken once where needed",
    "center_rewards_coefficient": "remove it: AMoPO trains without a reward model",
    "rpo_alpha": "remove it: it belongs to rl: dpo",
    "cpo_alpha": "remove it: it belongs to rl: simpo",
    "orpo_alpha": "remove it: it belongs to rl: orpo",
    "kto_desirable_weight": "remove it: it belongs to rl: kto",
    "kto_undesirable_weight": "remove it: it belongs to rl: kto",
    "trl": "remove the block: it belongs to axolotl's other rl methods",
    "ebft": "remove the block: it belongs to rl: ebft",
    "use_eaft": "remove it: it replaces the loss",
    "use_dft": "remove it: it replaces the loss",
    "diffusion_lm": "remove the block: it replaces the loss",
    "diffusion": "remove the block: it replaces the loss",
    "diffusion_decision": "remove the block: it replaces the loss",
    "kd_trainer": "remove it: it brings a trainer and a loss of its own",
    "hatchery": "remove the block: it brings a trainer of its own",
    "use_pose": "remove it: it changes the positions of single sequences",
    # Forward it cuts the sequences, backward the flattened batch.
    "tiled_mlp": "remove it: its gradients are wrong for several sequences in a batch",
    "xformers_attention": "write attn_implementation: sdpa: axolotl's xformers takes no padding",
    "processor_type": "remove it: images are not supported, only text",
    "do_causal_lm_eval": "remove it: per-dimension metrics are logged at every evaluation",
    "eval_causal_lm_metrics": "remove it: per-dimension metrics are logged at every evaluation",
    "do_bench_eval": "remove it: per-dimension metrics are logged at every evaluation",
    "eval_table_size": "write amopo.generate_samples: it samples completions of single sequences",
    "eval_max_new_tokens": "write amopo.generate_samples and generation_max_new_tokens",
    "generation_prompt_ratio": "remove it: samples answer whole prompts",
    "balance_labels": "remove it: it counts the labels of single sequences",
    "remove_unused_columns": "remove it: the columns of a pair are all needed",
    "max_prompt_len": "remove it: sequence_len and excess_length_strategy hold for whole sequences",
    "default_system_message": "write the message into the rows' `system` field: axolotl's chatml "
    "has no default message that it could replace",
    # On a full GPU, transformers starts again with smaller batches behind our back: the order of
    # the rows, and what checkpoints say of it, would be those of other batches.
    "auto_find_batch_size": "remove it, and set micro_batch_size; `axolotl amopo plan` says what "
    "fits a GPU",
    "push_dataset_to_hub": "remove it: a prepared dataset is bound to this config and version",
}

# The same for single values of keys.
INCOMPATIBLE_VALUES: dict[str, dict[str, str]] = {
    "attn_implementation": {
        "xformers": "write sdpa or flash_attention_2: axolotl's xformers takes no padding",
        "fp8": "write sdpa or flash_attention_2: FP8 attention takes no mask, so no padding",
        "sage": "write sdpa or flash_attention_2: axolotl's Sage attention takes no padding",
        "varlen": "write sdpa: this is axolotl's attention for diffusion models",
    },
    "adapter": {"mixlora": "write lora: a trainer of its own saves MixLoRA's routers"},
}

# Keys that are harmless but do nothing: the loss never goes through them.
NO_EFFECT: tuple[str, ...] = (
    "cut_cross_entropy",
    "chunked_cross_entropy",
    "liger_fused_linear_cross_entropy",
    "liger_cross_entropy",
    "flash_attn_cross_entropy",
)


# axolotl's default. Its schema takes too long to import for the check before a launch.
SEQUENCE_LEN = 512

# What `axolotl lm-eval` reads of the YAML (integrations/lm_eval/cli.py), its plugin or no.
LM_EVAL_KEYS = {"lm_eval_tasks", "lm_eval_batch_size", "lm_eval_post_train", "lm_eval_model"}

# What axolotl's commands put into the raw config beside the YAML's keys.
COMMAND_LINE_KEYS = {
    *(field.name for arguments in COMMAND_ARGUMENTS for field in fields(arguments)),
    "axolotl_config_path",
    "is_preprocess",
    "inference",
    "merge_lora",
    "launcher",
}


def check_axolotl_keys(cfg: dict, known: Set[str] | None = None) -> list[str]:
    """Return the keys of axolotl's that are set and have no effect with `rl: amopo`.

    Args:
        known: the keys that there are; by default those of axolotl's schema and of the plugins of
            this run.

    Raises:
        ConfigError: for a key that can't work with it, naming what to write instead.
    """
    for key, advice in INCOMPATIBLE.items():
        if cfg.get(key):
            raise ConfigError(f"{key}: {cfg[key]!r} can't work with rl: amopo; {advice}.")
    for key, values in INCOMPATIBLE_VALUES.items():
        if advice := values.get(str(cfg.get(key))):
            raise ConfigError(f"{key}: {cfg[key]!r} can't work with rl: amopo; {advice}.")
    ours = set(known_keys())
    for key in cfg:
        if key in ours or (key != "amopo" and str(key).lower().startswith(("amopo", "amop_"))):
            raise ConfigError(
                f"{key}: is not a key of axolotl's; the plugin's keys stand in a block, "
                f"amopo: {{{str(key).lower().removeprefix('amopo').strip('._-') or 'key'}: ...}}."
            )
    sizes = {
        key: cfg.get(key)
        for key in ("context_parallel_size", "sequence_parallel_degree", "tensor_parallel_size")
    }
    sizes["context_parallel.size"] = (cfg.get("context_parallel") or {}).get("size")
    for key, size in sizes.items():
        if (size or 1) > 1:
            raise ConfigError(
                f"{key}: {size} can't work with rl: amopo, whose pairs must stay whole on one "
                "device; shard the model with FSDP2 or DeepSpeed ZeRO-3 instead."
            )
    if (cfg.get("accelerator_config") or {}).get("dispatch_batches"):
        raise ConfigError(
            "accelerator_config.dispatch_batches: true can't work with rl: amopo, whose batches "
            "can't be cut into one slice per process; remove it: every process makes its own."
        )
    _check_spelling(cfg, schema_keys() if known is None else known)
    without_effect = [key for key in NO_EFFECT if cfg.get(key)]
    named = any("CutCrossEntropyPlugin" in str(plugin) for plugin in cfg.get("plugins") or [])
    if named and cfg.get("cut_cross_entropy") is None:  # naming its plugin turns it on
        without_effect.append("cut_cross_entropy")
    return without_effect


def check_parts(cfg: dict, config: AMoPOConfig) -> None:
    """Refuse what can't go with a batch that runs in parts.

    Raises:
        ConfigError: naming the keys and what to write instead.
    """
    if not config.in_parts:
        return
    optimizer = str(cfg.get("optimizer"))
    if steps_in_backward(optimizer):
        raise ConfigError(
            f"optimizer: {optimizer} takes its step inside the backward pass, and a batch in parts "
            f"has several of those; write another, such as adamw_torch_8bit, or remove "
            f"{config.in_parts}."
        )
    check_router(config, cfg.get("overrides_of_model_config") or {})
    for key in ("sequence_len", "eval_sequence_len"):
        length = str(cfg.get(key) or (SEQUENCE_LEN if key == "sequence_len" else 0))
        if config.max_tokens and length.isdigit() and config.max_tokens < int(length):
            raise ConfigError(
                f"amopo.max_tokens: {config.max_tokens} is less than {key}, {length}, which is "
                f"what a prompt and one response may have; write at least {length}, or a smaller "
                f"{key}."
            )


def steps_in_backward(optimizer: str) -> bool:
    """Return whether an optimizer changes each weight as soon as its gradient is there.

    In axolotl 0.21 these are transformers' own (`trainer_optimizer.py`), and none of axolotl's.
    """
    return optimizer in ("lomo", "adalomo") or optimizer.endswith("_layerwise")


def check_models_router(cfg: Any) -> None:
    """Do what `check_router` does for the model's own config, of axolotl's validated one."""
    config = read_block(cfg)
    if config.in_parts or _gradient_rule(config):
        from axolotl.loaders.utils import load_model_config

        check_router(config, load_model_config(cfg).get_text_config().to_dict())


def check_router(config: AMoPOConfig, model: Mapping[str, Any]) -> None:
    """Refuse the auxiliary loss of a mixture of experts where it would be wrong or left out.

    Args:
        model: keys of the model's config.

    Raises:
        ConfigError: naming the keys and what to write instead.
    """
    asked = model.get("output_router_logits") and model.get("router_aux_loss_coef", 1)
    if config.in_parts and asked:
        raise ConfigError(
            "output_router_logits: true adds a loss over all tokens of a batch, which is not the "
            f"sum over its parts; remove {config.in_parts}, or write overrides_of_model_config: "
            "{output_router_logits: false}."
        )
    if asked and (rule := _gradient_rule(config)):
        raise ConfigError(
            f"output_router_logits: true adds a loss that amopo.{rule} would leave out; remove "
            "one of the two, or write overrides_of_model_config: {output_router_logits: false}."
        )


def _gradient_rule(config: AMoPOConfig) -> str | None:
    """Return the key and value by which a step is made of each criterion's gradient."""
    if config.gradient_cosines:
        return f"gradient_cosines: {config.gradient_cosines}"
    rules = (s.gradients for s in config.make_settings() if "gradients" in s.needs)
    return next((f"gradients: {rule}" for rule in rules), None)


def schema_keys() -> set[str]:
    """Return the keys that axolotl and the plugins of this run know."""
    from axolotl.integrations.base import PluginManager
    from axolotl.utils.schemas.config import AxolotlInputConfig

    known = {*AxolotlInputConfig.model_fields}
    for name, field in AxolotlInputConfig.model_fields.items():
        known |= {name, str(field.validation_alias or name), str(field.alias or name)}
    for schema in PluginManager.get_instance().get_input_args():  # of every plugin in this run
        module, _, name = schema.rpartition(".")
        known |= set(getattr(importlib.import_module(module), name).model_fields)
    return known


def _check_spelling(cfg: dict, known: Set[str]) -> None:
    """Refuse a key that is one letter off one of axolotl's, which axolotl would drop in silence.

    A key that resembles none stays: people keep YAML anchors and notes there.
    """
    known = {*known, *LM_EVAL_KEYS, "plugins", "amopo"}
    for key in cfg:
        close = difflib.get_close_matches(str(key), known, n=1, cutoff=0.85)
        if key not in known and key not in COMMAND_LINE_KEYS and close:
            raise ConfigError(f"{key}: axolotl has no such key. Did you mean '{close[0]}'?")


def check_other_references(cfg: dict, config: AMoPOConfig) -> None:
    """Refuse to shorten rows that another model, with its own tokenizer, can't shorten alike.

    Raises:
        ConfigError: naming the key, and what to write instead.
    """
    strategy = str(cfg.get("excess_length_strategy") or "drop").lower()
    if config.other_references and strategy == "truncate":
        raise ConfigError(
            "excess_length_strategy: truncate does not go with amopo.reference: "
            f"{config.other_references[0]}, which would read a longer text than the model that is "
            "trained; write drop."
        )


def check_gradients(cfg: dict, config: AMoPOConfig) -> None:
    """Refuse what can't go with a step that is made of several gradients.

    Raises:
        ConfigError: naming the key, and what to do instead.
    """
    rule = _gradient_rule(config)
    if rule is None:
        return
    check_router(config, cfg.get("overrides_of_model_config") or {})
    if cfg.get("deepspeed"):
        raise ConfigError(
            f"amopo.{rule} can't go with deepspeed, whose engine sums gradients up by "
            "itself; take DDP or FSDP2."
        )
    for key in ("max_tokens", "one_prompt_at_a_time"):
        if getattr(config, key):
            raise ConfigError(
                f"amopo.{rule} can't go with amopo.{key}, which runs a batch in parts; "
                "remove one of the two."
            )
