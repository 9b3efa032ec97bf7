"""AMoPO for axolotl: `rl: amopo` aligns a model with several human preferences at once."""

from importlib.metadata import version
from typing import Any

__all__ = ["AMoPOPlugin", "amopo_loss"]


def __getattr__(name: str) -> Any:
    # `axolotl --help` imports this package for the summary of `axolotl amopo`; it must not wait
    # for torch.
    if name == "__version__":
        return version("axolotl-amopo")  # not at once: `model` also works from a bare checkout
    if name == "AMoPOPlugin":
        from axolotl_amopo.plugin import AMoPOPlugin

        return AMoPOPlugin
    if name == "amopo_loss":
        from axolotl_amopo.loss import amopo_loss

        return amopo_loss
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
