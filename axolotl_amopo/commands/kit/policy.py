"""Models whose log-probabilities are wanted, loaded as training loads them."""

from pickle import UnpicklingError
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.utils.peft_utils import find_adapter_config_file

from axolotl_amopo.commands.kit.models import NO_WEIGHTS
from axolotl_amopo.errors import AMoPOError
from axolotl_amopo.model.forward import teach


def is_adapter(path: str) -> bool:
    """Return whether a folder or a hub's name holds an adapter."""
    try:
        return find_adapter_config_file(path) is not None
    except OSError:  # neither a folder nor a name that a hub could know
        return False


def load_policy(cfg: Any, tokenizer: Any, path: str) -> nn.Module:
    """Return a model, or an adapter on the config's `base_model`, ready for `response_logps`.

    In the config's precision on a GPU, in float32 on a CPU.

    Raises:
        AMoPOError: where there is none, or it can't be loaded.
    """
    adapter = is_adapter(path)
    on_cpu = not torch.accelerator.is_available()
    device = torch.device("cpu") if on_cpu else torch.accelerator.current_accelerator()
    options: dict[str, Any] = {
        "dtype": torch.float32 if on_cpu else cfg.torch_dtype,
        "device_map": {"": device},
        "trust_remote_code": cfg.trust_remote_code or False,
    }
    if cfg.attn_implementation:
        options["attn_implementation"] = cfg.attn_implementation
    weights = cfg.base_model if adapter else path
    if weights == cfg.base_model and cfg.revision_of_model:
        options["revision"] = cfg.revision_of_model
    if cfg.load_in_4bit:  # as axolotl does for QLoRA
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_compute_dtype=options["dtype"],
            bnb_4bit_use_double_quant=True,
            bnb_4bit_quant_type="nf4",
            **(cfg.bnb_config_kwargs or {}),
        )
    elif cfg.load_in_8bit:
        options["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
    try:
        model = AutoModelForCausalLM.from_pretrained(weights, **options)
        embeddings = model.get_input_embeddings().num_embeddings
        if len(tokenizer) > embeddings:  # tokens that the config adds, as axolotl adds them
            model.resize_token_embeddings(len(tokenizer))
        if adapter:
            model = PeftModel.from_pretrained(model, path)
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise unloadable(path, error) from None
    except UnpicklingError:  # torch says how to load it nevertheless
        raise unloadable(path, ValueError(NO_WEIGHTS)) from None
    model.eval()
    try:
        teach(model)
    except TypeError as error:
        raise AMoPOError(f"{path}: can't be scored: {error}.") from None
    return model


def unloadable(path: str, error: Exception) -> AMoPOError:
    """Return the error that says why a model can't be loaded."""
    reason = str(error).strip().splitlines()[0]
    return AMoPOError(
        f"{path}: can't be loaded as a model ({reason}); name a folder with an adapter or a whole "
        "model."
    )
