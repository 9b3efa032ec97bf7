"""`amopo.share_prompt`: what the user is told of the layout that a model can take."""

from typing import Any

from axolotl.loaders.utils import load_model_config
from axolotl.utils.logging import get_logger
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

from axolotl_amopo.model.choose import Choice, cannot_share, refusal

LOG = get_logger(__name__)


def check_before_loading(cfg: Any) -> None:
    """Refuse `share_prompt: true` while only the model's config is known, if that suffices.

    Raises:
        AMoPOError: says why the model can't.
    """
    config = load_model_config(cfg)
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if model_class is not None:
        implementation = cfg.attn_implementation or "sdpa"
        if reason := cannot_share(model_class, config.get_text_config(), implementation):
            raise refusal(reason)


def log_choice(choice: Choice) -> None:
    """Log which layout was chosen, and why not a cheaper one."""
    if choice.own_logits:
        LOG.warning(
            "AMoPO: %s; using the logits of the model's own forward, which take more memory (if it "
            "runs out, amopo.max_tokens or a lower micro_batch_size needs less).",
            choice.why_own_logits,
        )
    if choice.why_unshared:
        LOG.warning(
            "AMoPO: PROMPTS ARE NOT SHARED, every response runs with a prompt of its own: %s. "
            "(amopo.share_prompt: false silences this.)",
            choice.why_unshared,
        )
    elif choice.layout != "sequences":
        why = f", because {choice.why_not_cheaper}" if choice.why_not_cheaper else ""
        LOG.info("AMoPO: prompts are shared (%s layout%s).", choice.layout, why)
