"""The configs of public models that our examples name, for machines that reach no hub.

Only what shapes the model, as their `config.json` has it; the numbers of parameters that the
model cards give are checked in a test.
"""

from typing import Any

from axolotl.loaders.utils import load_model_config
from transformers import AutoConfig, PreTrainedConfig

from axolotl_amopo.errors import AMoPOError

QWEN2_5 = {"model_type": "qwen2", "max_position_embeddings": 32768, "rms_norm_eps": 1e-6}
LLAMA_3 = {
    "model_type": "llama",
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
}


def _sizes(vocabulary: int, hidden: int, mlp: int, layers: int, heads: int, key_heads: int) -> dict:
    return {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
    }


def _qwen2_5(*sizes: int, tied: bool = False) -> dict[str, Any]:
    return QWEN2_5 | _sizes(*sizes) | {"tie_word_embeddings": tied}


KNOWN: dict[str, dict[str, Any]] = {
    "Qwen/Qwen2.5-0.5B-Instruct": _qwen2_5(151936, 896, 4864, 24, 14, 2, tied=True),
    "Qwen/Qwen2.5-1.5B-Instruct": _qwen2_5(151936, 1536, 8960, 28, 12, 2, tied=True),
    "Qwen/Qwen2.5-3B-Instruct": _qwen2_5(151936, 2048, 11008, 36, 16, 2, tied=True),
    "Qwen/Qwen2.5-7B-Instruct": _qwen2_5(152064, 3584, 18944, 28, 28, 4),
    "Qwen/Qwen2.5-14B-Instruct": _qwen2_5(152064, 5120, 13824, 48, 40, 8),
    "Qwen/Qwen2.5-32B-Instruct": _qwen2_5(152064, 5120, 27648, 64, 40, 8),
    "meta-llama/Llama-3.1-8B-Instruct": LLAMA_3 | _sizes(128256, 4096, 14336, 32, 32, 8),
    "HuggingFaceTB/SmolLM2-135M-Instruct": {
        "model_type": "llama",
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    }
    | _sizes(49152, 576, 1536, 30, 9, 3),
}


def model_config(cfg: Any) -> PreTrainedConfig:
    """The config of `base_model`: a local folder's, ours for a model named above, or the hub's.

    Raises:
        AMoPOError: where none of them has it.
    """
    name = str(cfg.base_model_config or cfg.base_model)
    if name in KNOWN:
        return AutoConfig.for_model(**KNOWN[name])
    try:
        return load_model_config(cfg)
    except (OSError, ValueError) as error:
        raise AMoPOError(
            f"base_model: {name} has no config that can be read ({str(error).splitlines()[0]}). "
            "Give a folder with its config.json (base_model_config: FOLDER will do), or run where "
            "the hub can be reached."
        ) from None
