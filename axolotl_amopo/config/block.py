"""The `amopo:` block of the YAML, and what of axolotl's own keys can't go with it."""

import difflib
import importlib
import math
from dataclasses import fields
from typing import Annotated, Any, Literal

from axolotl.cli.args import EvaluateCliArgs, InferenceCliArgs, PreprocessCliArgs, TrainerCliArgs
from jinja2 import TemplateError, meta
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from axolotl_amopo.config.instructions import ENVIRONMENT, dimension_facts, render
from axolotl_amopo.errors import ConfigError, did_you_mean
from axolotl_amopo.loss import Weighting

COMMAND_ARGUMENTS = (TrainerCliArgs, EvaluateCliArgs, PreprocessCliArgs, InferenceCliArgs)
OVERALL = "overall"
DEFAULT_BETA = 0.8
# Fields of the block that the plugin fills in.
INTERNAL = {"enabled", "datasets"}

Scale = Annotated[
    tuple[float, float],
    Field(description="Lowest and highest rating, e.g. [0, 4]"),
]


class Dimension(BaseModel):
    """One preference dimension."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(min_length=1, description="Name of the rating in the data")
    description: str | None = Field(
        default=None, description="What it means; shown to the model in the instruction"
    )
    scale: Scale | None = Field(
        default=None,
        description="Lowest and highest rating; default: the dataset's, else what the data spans",
    )
    direction: Literal["higher", "lower"] | None = Field(
        default=None,
        description="Which ratings are better; default: the dataset's (severity: lower), else "
        "higher",
    )

    @field_validator("scale")
    @classmethod
    def check_scale(cls, scale):
        if scale and not (all(map(math.isfinite, scale)) and scale[0] < scale[1]):
            raise ValueError("must be [lowest, highest], e.g. [1, 5]")
        return scale

    @field_validator("name")
    @classmethod
    def check_name(cls, name):
        # A name becomes part of a metric's name, where a slash separates.
        if "/" in name or name != name.strip():
            raise ValueError("must not contain a slash, or spaces at its ends")
        return name


class AMoPOConfig(BaseModel):
    """The `amopo:` block. Defaults are the paper's (arXiv 2506.07165)."""

    model_config = ConfigDict(extra="forbid")

    gamma: float = Field(
        default=2.0,
        ge=0.0,
        le=100.0,
        description="Target margin between the rewards; absolute, not a ratio to rl_beta",
    )
    dimensions: list[Dimension] = Field(
        default=["helpfulness", "correctness", "instruction_following"],
        min_length=1,
        validate_default=True,
        description="Preference dimensions: names, or {name, description, scale}",
    )
    overall: bool = Field(
        default=True, description="Add one prompt that names all the dimensions at once"
    )
    weighting: Weighting = Field(
        default="gaussian",
        description="How prompts are weighed: gaussian (draws), mean (no draws), uniform, static",
    )
    weights: dict[str, Annotated[float, Field(ge=0.0, allow_inf_nan=False)]] | None = Field(
        default=None, description="With weighting static: a weight for every prompt, by name"
    )
    winner: Literal["overall", "per_dimension"] = Field(
        default="overall",
        description="overall: one winner a pair; per_dimension: each dimension's ratings decide",
    )
    rating_in_prompt: Literal["chosen", "own", "none"] = Field(
        default="chosen",
        description="The rating a prompt asks for: the chosen response's, each its own, or none",
    )
    instruction: str | None = Field(
        default=None,
        description="Jinja template of a dimension's instruction: dimension, description, min, "
        "max, rating; empty for none",
    )
    overall_instruction: str | None = Field(
        default=None,
        description="Jinja template of the overall instruction: dimensions, a list of the same; "
        "empty for none",
    )
    instruction_place: Literal["before", "after", "system"] = Field(
        default="before",
        description="The instruction stands before the question; after it, which is cheaper: all "
        "prompts of a pair then share the question; or at the end of the system message",
    )
    share_prompt: Literal["auto", True, False] = Field(
        default="auto",
        description="Run a pair's shared prompt once: auto, where the model gives the same "
        "numbers; true, or stop; false, never",
    )
    pairs: Literal["all", "best_worst"] | Annotated[int, Field(ge=1)] = Field(
        default="all",
        description="Which pairs are made of a prompt's rated responses: all, best_worst, or a "
        "number: at most so many, drawn by the seed",
    )
    group_by_prompt: bool = Field(
        default=False,
        description="All pairs of a prompt are one training example, in which each response runs "
        "once under a prompt, whatever the number of its pairs",
    )
    order_by: str | None = Field(
        default=None,
        description="What makes a response the better one overall: mean (of the ratings, each on 0 "
        "to 1), dataset (the data's own order or overall rating), or a dimension; default: the "
        "data's own order where it has one, else mean",
    )
    min_gap: float = Field(
        default=0.0,
        ge=0.0,
        lt=1.0,
        description="Pairs whose overall ratings (0 to 1) differ by less are dropped; with "
        "per_dimension, dimensions that do weigh nothing",
    )
    missing_ratings: Literal["error", "drop", "mask"] = Field(
        default="error",
        description="A response without a rating: stop, drop its pairs, or mask that dimension",
    )
    single_responses: Literal["drop", "error"] = Field(
        default="drop", description="A prompt with one response only: drop and count, or stop"
    )
    bad_rows: Literal["error", "drop"] = Field(
        default="error", description="A row that can't be used: stop, or drop and count"
    )
    eval_table: int = Field(
        default=0,
        ge=0,
        description="So many held-out examples are shown one by one at each evaluation, in a file "
        "and in the trackers",
    )

    # Set by the plugin, kept in the block because axolotl's config carries it to every process.
    enabled: bool = Field(default=False, description="Set by `rl: amopo`; not for users")
    datasets: dict[str, dict[str, Any]] = Field(
        default={}, description="Per-dataset options, moved here by the plugin; not for users"
    )

    @field_validator("dimensions", mode="before")
    @classmethod
    def names_to_dimensions(cls, value):
        if isinstance(value, str):
            value = [value]
        if isinstance(value, list):
            return [{"name": item} if isinstance(item, str) else item for item in value]
        return value

    @field_validator("instruction", "overall_instruction")
    @classmethod
    def check_template(cls, text, info):
        if text is None:
            return text
        facts = dimension_facts("name", None, (1, 5), 3)
        if info.field_name == "overall_instruction":
            facts = {"dimensions": [facts]}
        try:
            unknown = meta.find_undeclared_variables(ENVIRONMENT.parse(text)) - set(facts)
            if unknown:
                raise ValueError(f"uses {', '.join(sorted(unknown))}")
            render(text, facts)
        except (TemplateError, TypeError, ValueError) as error:
            raise ValueError(
                f"is not a Jinja template that works ({error}); it may use {', '.join(facts)}"
            ) from None
        return text

    @model_validator(mode="after")
    def check_together(self):
        names = self.prompt_names
        for name in names:
            if names.count(name) > 1:
                raise ValueError(
                    f"dimensions: '{name}' is there twice"
                    + (" ('overall' is the name of the extra prompt)" if name == OVERALL else "")
                )
        orders = ["mean", "dataset", *self.dimension_names]
        if self.order_by is not None and self.order_by not in orders:
            raise ValueError(
                f"order_by: '{self.order_by}' is neither mean, dataset nor a dimension."
                f"{did_you_mean(self.order_by, orders)}"
            )
        if (self.weighting == "static") != (self.weights is not None):
            raise ValueError(
                "weights and weighting: static go together: write both, or neither of them"
            )
        if self.weights is not None:
            if set(self.weights) != set(names):
                raise ValueError(
                    f"weights must name every prompt once: {', '.join(names)}; "
                    f"they name {', '.join(self.weights)}"
                )
            if not sum(self.weights.values()) > 0:
                raise ValueError("weights must not all be 0")
        return self

    @property
    def dimension_names(self) -> list[str]:
        return [dimension.name for dimension in self.dimensions]

    @property
    def prompt_names(self) -> list[str]:
        """Names of a pair's K prompts, in order: overall first, as in the paper."""
        return ([OVERALL] if self.overall else []) + self.dimension_names


class AMoPOArgs(BaseModel):
    """What the plugin adds to axolotl's config schema."""

    amopo: AMoPOConfig | None = Field(
        default=None, description="AMoPO settings, used with `rl: amopo`"
    )


class DatasetOptions(BaseModel):
    """Keys of a `datasets:` entry that axolotl's schema doesn't have."""

    model_config = ConfigDict(extra="forbid")

    scale: Scale | None = Field(
        default=None, description="Lowest and highest rating of this dataset's dimensions"
    )
    fields: dict[str, str] = Field(
        default={},
        description="Our field names (prompt, chosen, ...) to the data's, or to a path: a.b, a.0",
    )
    template: str | None = Field(
        default=None,
        description="The prompt as a Jinja template of the row's fields (types that say so)",
    )
    responses: list[dict[str, str]] | None = Field(
        default=None,
        min_length=2,
        description="amopo.user_defined: for each response the paths of its text and its ratings",
    )

    check_scale = field_validator("scale")(Dimension.check_scale.__func__)

    @field_validator("template")
    @classmethod
    def check_template(cls, text):
        try:
            ENVIRONMENT.parse(text or "")
        except TemplateError as error:
            raise ValueError(f"is not a Jinja template ({error})") from None
        return text

    @field_validator("responses")
    @classmethod
    def check_responses(cls, responses):
        if any("text" not in paths for paths in responses or []):
            raise ValueError("each response needs a path for its text, e.g. {text: answer_a}")
        return responses


def plain(value: Any) -> Any:
    """axolotl's DictDefault as the plain dicts and lists it stands for."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def parse_block(model: type[BaseModel], block: Any, where: str) -> BaseModel:
    """Validate a block of the YAML, with errors in one sentence each.

    Raises:
        ConfigError: naming the key, what is wrong with it and what may stand there.
    """
    if block is None:
        block = {}
    if not isinstance(block, dict):
        raise ConfigError(f"{where}: must be a block of keys, not {block!r}.")
    if model is AMoPOConfig and (internal := INTERNAL & set(block)):
        raise ConfigError(f"{where}.{min(internal)}: is for the plugin alone; remove it.")
    try:
        return model.model_validate(block)
    except ValidationError as error:
        raise ConfigError(
            " ".join(_sentence(model, where, detail) for detail in error.errors())
        ) from None


def _sentence(model: type[BaseModel], where: str, detail: dict) -> str:
    path = [str(part) for part in detail["loc"]]
    key = ".".join([where, *path]) if path else where
    kind, given, context = detail["type"], detail["input"], detail.get("ctx", {})
    if kind == "extra_forbidden":
        owner = Dimension if len(path) > 1 and path[0] == "dimensions" else model
        known = [name for name in owner.model_fields if name not in INTERNAL]
        if path[-1] == "beta":
            return f"{key}: unknown key; beta is axolotl's own key rl_beta, outside this block."
        return f"{key}: unknown key.{did_you_mean(path[-1], known)} Known: {', '.join(known)}."
    if kind == "literal_error":
        hint = did_you_mean(str(given), context["expected"].replace("'", "").split(", "))
        return f"{key}: {given!r} is not one of {context['expected']}.{hint}"
    if kind == "value_error":
        return f"{key}: {context['error']}."
    return f"{key}: {detail['msg'][0].lower()}{detail['msg'][1:]}, got {given!r}."


# axolotl's keys that can't work with a preference loss over pairs, and what to do instead.
INCOMPATIBLE: dict[str, str] = {
    "sample_packing": "set it to false: a pair's sequences are batched together by the plugin",
    "eval_sample_packing": "set it to false: a pair's sequences are batched by the plugin",
    "batch_flattening": "remove it: a pair's sequences are batched together by the plugin",
    "multipack_real_batches": "remove it: there is no sample packing here",
    "train_on_inputs": "set it to false: the loss is over the responses only",
    "reward_model": "remove it: AMoPO trains without a reward model",
    "process_reward_model": "remove it: AMoPO trains without a reward model",
    "rl_adapter_ref_model": "remove it: AMoPO trains without a reference model",
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
    "precompute_ref_log_probs": "remove it: AMoPO trains without a reference model",
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
    "do_bench_eval": "remove it: per-dimension metrics are logged at every evaluation",
    "eval_table_size": "remove it: it samples completions of single sequences",
    "generate_samples": "remove it: it samples completions of single sequences",
    "balance_labels": "remove it: it counts the labels of single sequences",
    "remove_unused_columns": "remove it: the columns of a pair are all needed",
    "push_dataset_to_hub": "remove it: a prepared dataset is bound to this config and version",
}

# The same for single values of keys.
INCOMPATIBLE_VALUES: dict[str, dict[str, str]] = {
    "attn_implementation": {
        "xformers": "write sdpa or flash_attention_2: axolotl's xformers takes no padding",
        "fp8": "write sdpa or flash_attention_2: FP8 attention takes no mask, so no padding",
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


# What axolotl's commands put into the raw config beside the YAML's keys.
COMMAND_LINE_KEYS = {
    *(field.name for arguments in COMMAND_ARGUMENTS for field in fields(arguments)),
    "axolotl_config_path",
    "is_preprocess",
    "inference",
    "merge_lora",
    "launcher",
}


def check_axolotl_keys(cfg: dict) -> list[str]:
    """Refuse axolotl options that can't work with `rl: amopo`; return those with no effect.

    Raises:
        ConfigError: naming the key and what to write instead.
    """
    for key, advice in INCOMPATIBLE.items():
        if cfg.get(key):
            raise ConfigError(f"{key}: {cfg[key]!r} can't work with rl: amopo; {advice}.")
    for key, values in INCOMPATIBLE_VALUES.items():
        if advice := values.get(str(cfg.get(key))):
            raise ConfigError(f"{key}: {cfg[key]!r} can't work with rl: amopo; {advice}.")
    ours = set(AMoPOConfig.model_fields) - INTERNAL
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
            "can't be cut into one slice a process; remove it: every process makes its own."
        )
    _check_spelling(cfg)
    beta = cfg.get("rl_beta")
    number = isinstance(beta, (int, float)) and not isinstance(beta, bool)
    if beta is not None and not (number and 0 < beta < math.inf):
        raise ConfigError(f"rl_beta: must be a number above 0, e.g. {DEFAULT_BETA}; got {beta!r}.")
    without_effect = [key for key in NO_EFFECT if cfg.get(key)]
    named = any("CutCrossEntropyPlugin" in str(plugin) for plugin in cfg.get("plugins") or [])
    if named and cfg.get("cut_cross_entropy") is None:  # naming its plugin turns it on
        without_effect.append("cut_cross_entropy")
    return without_effect


def _check_spelling(cfg: dict) -> None:
    """axolotl drops keys that it doesn't know; one letter off, that is a mistake.

    A key that resembles none stays: people keep YAML anchors and notes there.
    """
    from axolotl.integrations.base import PluginManager
    from axolotl.utils.schemas.config import AxolotlInputConfig

    known = {*AxolotlInputConfig.model_fields, "plugins", "amopo"}
    for name, field in AxolotlInputConfig.model_fields.items():
        known |= {name, str(field.validation_alias or name), str(field.alias or name)}
    for schema in PluginManager.get_instance().get_input_args():  # of every plugin in this run
        module, _, name = schema.rpartition(".")
        known |= set(getattr(importlib.import_module(module), name).model_fields)
    for key in cfg:
        close = difflib.get_close_matches(str(key), known, n=1, cutoff=0.85)
        if key not in known and key not in COMMAND_LINE_KEYS and close:
            raise ConfigError(f"{key}: axolotl has no such key. Did you mean '{close[0]}'?")
