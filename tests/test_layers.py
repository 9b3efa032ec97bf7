"""The law of imports: a layer knows the ones below it, and nothing of ours beside them."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "axolotl_amopo"

# What each layer may import of ours. `errors` and `example` are known by all.
ALLOWED = {
    "errors": set(),
    "example": set(),
    "endpoint": {"config"},
    "objectives": set(),
    "loss": {"objectives"},
    "model": {"objectives"},
    "config": {"objectives"},
    "data": {"config", "objectives"},
    "formats": {"data"},
    "raters": {"config", "data", "endpoint"},
    "steering": {"config", "data", "objectives"},
    "training": {"config", "data", "model", "objectives", "steering"},
    "commands": {
        *("config", "data", "endpoint", "formats", "model", "objectives", "raters"),
        *("steering", "training"),
    },
    "plugin": {"config", "data", "model", "objectives", "steering", "training"},
    "__init__": {"loss", "plugin"},
}
FOR_ALL = {"errors", "example", ""}
# A command imports none of the others, only what they share; but `init` asks `plan` what fits.
SHARED_BY_COMMANDS = "kit"
ASKS = {"init": "plan"}


def imports(path: Path) -> set[str]:
    """The modules of ours that a file imports anywhere, below the package's own name."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: a relative import hides which layer it reaches"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        found |= {n.removeprefix("axolotl_amopo").lstrip(".") for n in names if is_ours(n)}
    return found


def is_ours(name: str) -> bool:
    return name == "axolotl_amopo" or name.startswith("axolotl_amopo.")


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def test_every_layer_is_named() -> None:
    layers = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in sources()}
    assert layers == set(ALLOWED)


@pytest.mark.parametrize("layer", ALLOWED)
def test_nothing_imports_upward(layer: str) -> None:
    for path in sources():
        own, *rest = path.relative_to(PACKAGE).with_suffix("").parts
        if own != layer:
            continue
        for name in imports(path):
            other = name.partition(".")[0]
            version = other.startswith("__")  # of the package itself
            allowed = ALLOWED[layer] | FOR_ALL | {layer}
            assert other in allowed or version, f"{path}: {layer} must not import {name}"
            if layer == "commands" and other == "commands" and len(rest) > 1:
                command = name.split(".")[1]
                asked = (rest[0], SHARED_BY_COMMANDS, ASKS.get(rest[0]))
                assert command in asked, f"{path}: imports {name}"


BARE = """
import sys
for absent in ("axolotl", "datasets", "peft", "pydantic", "accelerate", "deepspeed", "trl"):
    sys.modules[absent] = None  # importing it fails

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from axolotl_amopo.model import (
    choose_layout, make_batch, pair, response_logps, responses, teach
)
from axolotl_amopo.objectives import AMoPO, Draw, example_losses

torch.manual_seed(0)
sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes, **heads))
teach(model)
question = list(range(1, 21))
batch = make_batch([pair([[*question, 30, 31], [*question, 32]], [[40, 41, 2], [42, 2]], id=5)])
choice = choose_layout(model, batch, "auto")
assert choice.layout == "packed" and not choice.why_unshared, choice
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
losses = []
for step in range(3):
    logps, mask, *_ = response_logps(model, batch, choice.layout)
    given = responses(batch, logps, mask)
    loss = example_losses(AMoPO()(given, Draw(seed=0, step=step)), given).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
assert losses[-1] < losses[0], losses
loaded = {name.partition(".")[0] for name, module in sys.modules.items() if module is not None}
assert not loaded & {"axolotl", "datasets", "peft", "pydantic"}
print("trained")
"""


def test_objectives_and_model_need_torch_and_transformers_alone() -> None:
    done = subprocess.run(
        [sys.executable, "-c", BARE], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.stdout.strip().endswith("trained"), done.stderr[-3000:]
