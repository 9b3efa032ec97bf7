"""Tokens -> log-probabilities: batches that share prompts, on any transformers causal model.

torch and transformers alone, so that any trainer can use it:

    >>> teach(model)  # a causal model of transformers, before it is wrapped
    >>> batch = make_batch([pair(prompts=[ids_0, ids_1], responses=[chosen, rejected])])
    >>> choice = choose_layout(model, batch, share_prompt="auto")
    >>> logps, mask, *_ = response_logps(model, batch, choice.layout)  # [B, K, N, T]
    >>> outcome = AMoPO()(responses(batch, logps, mask), None)
    >>> example_losses(outcome, responses(batch, logps, mask)).mean().backward()
"""

from axolotl_amopo.example import Example, pair
from axolotl_amopo.model.batch import make_batch, responses
from axolotl_amopo.model.choose import Choice, choose_layout
from axolotl_amopo.model.forward import response_logps, teach

__all__ = [
    "Choice",
    "Example",
    "choose_layout",
    "make_batch",
    "pair",
    "response_logps",
    "responses",
    "teach",
]
