"""Find a trained model by its folder or its YAML, and load its tokenizer and its weights.

Example:

    trained = find_model("outputs/adapter")
    trained.steering.instruction({"helpfulness": 5})
"""

import importlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from axolotl_amopo.data.tokenizer import ChatTokenizer, generation_stops
from axolotl_amopo.errors import AMoPOError, ConfigError
from axolotl_amopo.steering.steering import FILE, Steering
from axolotl_amopo.steering.template import unsteered

# A model's name on the hub, mostly with its owner's before it.
HUB_NAME = re.compile(r"(?:\w[\w.-]*/)?\w[\w.-]*", re.ASCII)
ADAPTER = "adapter_config.json"
MODEL_FILES = (ADAPTER, "config.json")
# Of a file that torch does not load.
NO_WEIGHTS = "its weights' file holds more than weights, which could be code"


@dataclass(frozen=True)
class TrainedModel:
    """Say where a trained model is, and how it steers."""

    folder: Path
    base: str | None  # the model that an adapter, or a whole model, was trained from
    is_adapter: bool
    yaml_steering: Steering | None = None

    @property
    def steering(self) -> Steering:
        """Return the folder's steering, else the YAML's.

        Raises:
            AMoPOError: where neither has one.
        """
        if self.yaml_steering and not (self.folder / FILE).exists():
            return self.yaml_steering
        return Steering.load(self.folder)

    @property
    def has_steering(self) -> bool:
        """Return whether anything says what the model can be asked for."""
        return self.yaml_steering is not None or (self.folder / FILE).exists()

    def base_folder(self) -> str:
        """Return the base model's folder or hub name.

        Raises:
            AMoPOError: where none is known, or it isn't there.
        """
        if self.base is None:
            raise AMoPOError(
                f"{self.folder}: is a whole model, which doesn't say what it was trained from; "
                "name its base with --base-model."
            )
        if (Path(self.base) / "config.json").is_file() or is_on_hub(self.base):
            return self.base
        is_name = HUB_NAME.fullmatch(self.base)
        raise AMoPOError(
            f"{self.folder}: its base model '{self.base}' is no model folder as seen from "
            f"{Path.cwd()}{' and not in the hub cache' if is_name else ''}; run the command from "
            "the folder in which training ran, or name it with --base-model."
        )


def is_on_hub(name: str) -> bool:
    """Return whether a model of that name may be had: from the hub's cache, or where one may ask.

    A hub's name has at most one slash and no file of its own here.
    """
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.constants import HF_HUB_OFFLINE

    if not HUB_NAME.fullmatch(name):
        return False
    try:
        if isinstance(try_to_load_from_cache(name, "config.json"), str):
            return True
    except ValueError:  # nothing that a hub could have
        return False
    return not HF_HUB_OFFLINE and not Path(name).exists()


def find_model(
    model_or_config: str,
    base_model: str | None = None,
    *,
    from_hub: bool = False,
    untuned: bool = False,
) -> TrainedModel:
    """Return the model of a folder, or of the YAML of its training; nothing is loaded.

    Args:
        base_model: replaces the base model that the folder or the YAML names.
        from_hub: whether it may be a model's name on the hub.
        untuned: whether a YAML that has not been trained yet stands for its base model, asked as
            its training would ask it.

    Raises:
        AMoPOError: where there is no model, or no `rl: amopo` in the YAML.
    """
    path = Path(model_or_config)
    if path.is_file() and path.suffix in (".yml", ".yaml"):
        return _of_yaml(path, base_model, untuned)
    if from_hub and not path.exists() and is_on_hub(model_or_config):
        return TrainedModel(path, None, False)
    if not path.is_dir():
        raise AMoPOError(
            f"{path}: is neither a model's folder nor a YAML file; name the output_dir of a "
            "training run, or its config."
        )
    return _of_folder(path, base_model)


def _of_folder(
    folder: Path, base_model: str | None, yaml_steering: Steering | None = None
) -> TrainedModel:
    if (folder / ADAPTER).is_file():
        try:
            config = json.loads((folder / ADAPTER).read_text(encoding="utf-8"))
            named = config["base_model_name_or_path"]
        except (ValueError, KeyError, TypeError) as error:
            raise AMoPOError(f"{folder}/{ADAPTER}: is broken ({error!r}).") from None
        return TrainedModel(folder, base_model or named, True, yaml_steering)
    if (folder / "config.json").is_file():
        return TrainedModel(folder, base_model, False, yaml_steering)
    raise AMoPOError(
        f"{folder}: holds no model: neither adapter_config.json nor config.json is there; name "
        "the output_dir of a training run, or a checkpoint in it."
    )


def _of_yaml(path: Path, base_model: str | None, untuned: bool) -> TrainedModel:
    from axolotl.cli.config import load_cfg

    cfg = load_cfg(str(path), is_preprocess=True)
    if not (cfg.amopo and cfg.amopo.enabled):
        raise ConfigError(f"{path}: has no `rl: amopo`; name a config that does, or a folder.")
    folder = Path(cfg.output_dir)
    if untuned and not any((folder / name).is_file() for name in MODEL_FILES):
        start = base_model or cfg.base_model
        return TrainedModel(Path(start), start, False, steering_of(cfg, path))
    if not folder.is_dir():
        raise ConfigError(f"{path}: its output_dir, {folder}, is not there; train first.")
    steering = None if (folder / FILE).exists() else steering_of(cfg, path)
    return _of_folder(folder, base_model or cfg.base_model, steering)


def steering_of(cfg: Any, path: Path) -> Steering:
    """Return the steering of axolotl's config, with the scales of its first dataset.

    Raises:
        ConfigError: where only the data tells a scale.
    """
    entry = cfg.datasets[0]
    strategy = importlib.import_module(entry.type).load(None, cfg, entry)
    for name, scale in strategy.source.scales.items():
        if scale is None:
            raise ConfigError(
                f"{path}: the scale of '{name}' is not in the config, so it was taken from the "
                f"data; write {{name: {name}, scale: [lowest, highest]}} under amopo.dimensions."
            )
    return Steering.from_config(
        strategy.config,
        strategy.source.scales,
        strategy.lower(),
        cfg.chat_template_kwargs,
        cfg.eot_tokens,
    )


def load_tokenizer(trained: TrainedModel) -> Any:
    """Return a model's tokenizer, the base model's where an adapter's folder has none.

    Raises:
        AMoPOError: where there is none.
    """
    from transformers import AutoTokenizer

    own = (trained.folder / "tokenizer_config.json").is_file()
    folder = trained.folder if own or not trained.is_adapter else trained.base_folder()
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        line = str(error).strip().partition("\n")[0]
        raise AMoPOError(f"{folder}: has no tokenizer that can be loaded: {line}") from None


def chat_template(tokenizer: Any, where: Path) -> str:
    """Return the model's own chat template.

    Raises:
        AMoPOError: where there is none.
    """
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if not template:
        raise AMoPOError(
            f"{where}: its tokenizer has no chat template; put the one it was trained with into "
            f"{where}/chat_template.jinja."
        )
    return unsteered(template)


def chat_tokenizer(trained: TrainedModel, tokenizer: Any) -> ChatTokenizer:
    """Return what renders and tokenises conversations as training did.

    Raises:
        AMoPOError: where there is no chat template, or the folder's steering is broken.
    """
    kwargs: dict[str, Any] = {}
    eot_tokens: tuple[str, ...] = ()
    if trained.has_steering:
        steering = trained.steering
        kwargs, eot_tokens = steering.chat_template_kwargs, tuple(steering.eot_tokens)
    template = chat_template(tokenizer, trained.folder)
    stops = generation_stops((trained.is_adapter and trained.base) or str(trained.folder))
    return ChatTokenizer(tokenizer, template, kwargs, eot_tokens, stops)


def load_model(trained: TrainedModel, *, base: bool = False) -> Any:
    """Return the model in evaluation mode, on the accelerator where there is one.

    Args:
        base: load the untuned model instead of the trained one.

    Raises:
        AMoPOError: where it can't be loaded.
    """
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    gpu = torch.accelerator.is_available()
    whole = trained.base_folder() if trained.is_adapter or base else str(trained.folder)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            whole, dtype="auto" if gpu else torch.float32, device_map="auto" if gpu else None
        )
        if trained.is_adapter and not base:
            model = _with_adapter(model, trained)
    except UnpicklingError:  # torch says how to load it nevertheless
        raise AMoPOError(f"{trained.folder}: the model can't be loaded: {NO_WEIGHTS}.") from None
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        line = str(error).strip().partition("\n")[0]
        raise AMoPOError(f"{trained.folder}: the model can't be loaded: {line}") from None
    # A folder's own sampling settings must not mix with those that the caller asks for.
    ends = model.generation_config.eos_token_id
    model.generation_config = GenerationConfig(eos_token_id=ends)
    return model.eval()


def _with_adapter(model: Any, trained: TrainedModel) -> Any:
    from peft import PeftModel

    tokens = len(load_tokenizer(trained))
    if tokens > model.get_input_embeddings().num_embeddings:  # training added some
        model.resize_token_embeddings(tokens)
    return PeftModel.from_pretrained(model, trained.folder)
