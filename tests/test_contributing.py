"""The recipe of CONTRIBUTING.md for an objective: its code, as it stands there, trains."""

import importlib
import inspect
import math
from typing import Any

import pytest
import runs
import test_objectives
import torch
from test_readme import blocks, page
from transformers import AutoModelForCausalLM

from axolotl_amopo import objectives
from axolotl_amopo.config.block import known_keys
from axolotl_amopo.errors import ConfigError
from axolotl_amopo.example import Example

MODULE, ENTRY = blocks(page("CONTRIBUTING.md"), "python")
# Properties that test_objectives.py holds every entry of OBJECTIVES to.
PROPERTIES = [
    test
    for name, test in vars(test_objectives).items()
    if name.startswith("test_")
    and list(inspect.signature(test).parameters) in (["objective"], ["paired"])
]


@pytest.fixture(scope="module")
def slic(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The objective's class, from a module with the text of the page."""
    folder = tmp_path_factory.mktemp("recipe")
    (folder / "slic_of_the_recipe.py").write_text(MODULE, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield importlib.import_module("slic_of_the_recipe").SLiC


@pytest.fixture
def registered(slic: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The objective in OBJECTIVES, by the page's own line."""
    names = vars(objectives) | {"SLiC": slic}
    exec(ENTRY, names)
    assert names["OBJECTIVES"].items() <= (objectives.OBJECTIVES | {"slic": slic}).items()
    assert names["OBJECTIVES"]["slic"] is slic
    monkeypatch.setitem(objectives.OBJECTIVES, "slic", slic)


@pytest.mark.parametrize("test", PROPERTIES, ids=lambda test: test.__name__)
def test_the_recipe_keeps_what_holds_for_every_objective(test: Any, slic: Any) -> None:
    test(slic())


def test_the_recipe_trains(registered: None, tmp_path, tiny_model) -> None:
    row = {
        "prompt": "Why is the sky blue?",
        "responses": [
            # The chosen one is longer, so its sum is lower and the pair costs something.
            {"text": "Air scatters blue light best.", "scores": {"help": 5, "truth": 4}},
            {"text": "No idea.", "scores": {"help": 1, "truth": 3}},
        ],
    }
    data = runs.write_jsonl(tmp_path / "data.jsonl", [row])
    block = {"objective": "slic", "delta": 2.0, "dimensions": ["help", "truth"]}
    values = runs.config(tmp_path, tiny_model, data, amopo=block, rl_beta=0.5, max_steps=2)
    trainer = runs.train(runs.write_config(tmp_path, values))

    example = Example.from_row(trainer.train_dataset[0])
    assert len(example.prompts) == 1  # no instruction, so all criteria read the same prompt
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    (places,) = example.comparisons
    chosen, rejected = (
        sum_of_logps(model, example.prompts[0], example.responses[place]) for place in places
    )
    by_hand = max(0.0, 2.0 - 0.5 * chosen + 0.5 * rejected)
    first, second = runs.losses(trainer)
    assert math.isclose(first, by_hand, rel_tol=1e-4)  # both in float32
    assert second < first
    logged = trainer.state.log_history[0]
    margin = 0.5 * (chosen - rejected)
    for criterion in ("overall", "help", "truth"):
        assert math.isclose(logged[f"amopo/{criterion}/margin"], margin, rel_tol=1e-4)


def sum_of_logps(model: Any, prompt: list[int], response: list[int]) -> float:
    with torch.no_grad():
        logps = model(torch.tensor([prompt + response])).logits[0].log_softmax(-1)
    return sum(logps[len(prompt) - 1 + i, token].item() for i, token in enumerate(response))


def test_its_key_is_its_own(registered: None, tmp_path, tiny_model) -> None:
    assert "delta" in known_keys("slic") and "delta" not in known_keys("amopo", "simpo")
    data = runs.QUICKSTART / "train.jsonl"
    for block, sentence in (
        ({"delta": 2.0}, "amopo.delta: belongs to objective slic; objective amopo has gamma"),
        ({"objective": "slic", "gamma": 2.0}, "amopo.gamma: belongs to objectives amopo, simpo"),
        ({"objective": "slic", "delta": -1.0}, "amopo.delta: "),
    ):
        values = runs.config(tmp_path, tiny_model, data, amopo=block)
        with pytest.raises(ConfigError, match=sentence):
            runs.load(runs.write_config(tmp_path, values))
