"""`axolotl amopo plan`: against training itself, and as a command."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from axolotl.utils.dict import DictDefault
from click.testing import CliRunner
from runs import LORA, config, prepare, write_config, write_jsonl
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from axolotl_amopo.commands import amopo
from axolotl_amopo.commands.plan.estimate import RESPONSES, advise, memory, sharding
from axolotl_amopo.commands.plan.groups import made_up_group, tokens
from axolotl_amopo.commands.plan.load import load, plan_config
from axolotl_amopo.commands.plan.models import KNOWN, model_config
from axolotl_amopo.commands.plan.step import (
    Moment,
    PairShape,
    Step,
    made_up_batch,
    micro_batch,
    run_step,
)
from axolotl_amopo.config.axolotl_keys import check_parts
from axolotl_amopo.config.block import AMoPOConfig, read_block
from axolotl_amopo.example import Example, pair

WORKER = Path(__file__).parent / "plan_worker.py"
ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "example_configs"
SIZED = sorted(path for path in EXAMPLES.glob("*.yml") if path.stem != "quickstart")
LORA_7B = EXAMPLES / "qwen2.5-7b-80gb-lora.yml"

# As the model cards and the models' files have it.
PUBLISHED = {
    "Qwen/Qwen2.5-0.5B-Instruct": 494_032_768,
    "Qwen/Qwen2.5-1.5B-Instruct": 1_543_714_304,
    "Qwen/Qwen2.5-3B-Instruct": 3_085_938_688,
    "Qwen/Qwen2.5-7B-Instruct": 7_615_616_512,
    "Qwen/Qwen2.5-14B-Instruct": 14_770_033_664,
    "Qwen/Qwen2.5-32B-Instruct": 32_763_876_352,
    "meta-llama/Llama-3.1-8B-Instruct": 8_030_261_248,
    "HuggingFaceTB/SmolLM2-135M-Instruct": 134_515_008,
}

# Words of a response, and responses. Starting to train takes some 50 MB on a CPU that no step
# needs again; where a step takes little, longer rows make it outweigh that.
USUAL = (30, 2)
LARGER = {"lora_checkpointed": (300, 2), "group_in_parts": (150, 4)}
# Of real steps. Nothing of the loss is left out: memory is that of AdamW's too.
MEASURED = {
    "full_two_pairs": {"micro_batch_size": 2},
    "full_checkpointed_accumulated": {
        "gradient_checkpointing": True,
        "gradient_accumulation_steps": 2,
    },
    "full_unshared": {"amopo": {"dimensions": ["helpfulness"], "share_prompt": False}},
    "lora_checkpointed": LORA | {"gradient_checkpointing": True, "sequence_len": 2048},
    # Without states of an optimizer, which would hide what a part takes.
    "group_in_parts": {
        "micro_batch_size": 1,
        "optimizer": "sgd",
        "sequence_len": 1024,
        "amopo": {"dimensions": ["helpfulness"], "group_by_prompt": True, "max_tokens": 1024},
    },
    "dora_head_saved": LORA | {"peft_use_dora": True, "lora_modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("name", KNOWN)
def test_known_models_have_their_parameters(name):
    with FakeTensorMode():
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**KNOWN[name]))
    assert model.num_parameters() == PUBLISHED[name]


def row(number, words, responses):
    rated = [("yes ", 5), ("no ", 2), ("so ", 4), ("and ", 1)][:responses]
    responses = [
        {"text": f"{number} " + word * words, "scores": {"helpfulness": score, "honesty": score}}
        for word, score in rated
    ]
    return {"prompt": f"Question {number}: " + "what else is there? " * 4, "responses": responses}


@pytest.fixture(scope="module")
def measured(tokenizer, tmp_path_factory) -> dict[str, dict]:
    """Each of MEASURED, trained and planned, on a model that outweighs the noise."""
    folder = tmp_path_factory.mktemp("plan")
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=4096,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        bos_token_id=1,
        eos_token_id=3,
        pad_token_id=0,
    )
    LlamaForCausalLM(shape).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    data = {
        shape: write_jsonl(folder / f"{shape}.jsonl", [row(i, *shape) for i in range(8)])
        for shape in {USUAL, *LARGER.values()}
    }
    for name, changes in MEASURED.items():
        own = folder / name
        own.mkdir()
        rows = data[LARGER.get(name, USUAL)]
        values = config(own, folder / "model", rows, micro_batch_size=1) | changes
        write_config(folder, values, f"{name}.yml")
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1048576", "MALLOC_TRIM_THRESHOLD_": "1048576"}
    done = subprocess.run(
        [sys.executable, WORKER, folder], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return {name: json.loads((folder / f"{name}.json").read_text()) for name in MEASURED}


@pytest.mark.parametrize("name", MEASURED)
def test_plan_equals_training(measured, name):
    training, plan = measured[name]["measured"], measured[name]["planned"]
    for exact in ("parameters", "trainable", "trained", "weights", "layout", "parts"):
        assert plan[exact] == training[exact], exact
    assert plan["flops"] == pytest.approx(training["flops"], rel=0.02)
    # Within a tenth here; what else the system does to this process's memory only adds.
    assert 0.85 < plan["memory"] / training["memory"] < 1.15, plan["lines"]


# Memory of many devices, by hand.

ON_ONE = Step(
    layout="tree",
    parameters=1000,
    trainable=1000,
    weights=2000,  # 16 bits
    trained=2000,
    largest_unit=300,
    unpacked=0,
    moments=(Moment(70, 20, 10, 0), Moment(30, 0, 10, 400)),
    flops=1,
    tokens=1,
    tokens_unshared=1,
)


def lines(cfg, devices, *moments):
    cfg = DictDefault({"optimizer": "adamw_torch_fused", "gradient_accumulation_steps": 1} | cfg)
    step = replace(ON_ONE, moments=moments or ON_ONE.moments)
    return memory(step, cfg, sharding(cfg, devices), None)


def zero(stage, **options):
    return {"deepspeed": {"zero_optimization": {"stage": stage} | options}}


def fsdp2(reshard):
    return {"fsdp_version": 2, "fsdp_config": {"reshard_after_forward": reshard}}


# Full in the forward pass, and full at the end of the backward pass.
FORWARD = Moment(90_000, 0, 0, 0)
END = Moment(90_000, 0, 0, 2000)


@pytest.mark.parametrize(
    ("cfg", "devices", "weights", "optimizer", "gradients", "gathered"),
    [
        ({}, 1, 2000, 4000, 2000, 0),
        ({}, 4, 2000, 4000, 2000 + 2000, 0),  # and once more in the buckets that are sent
        # Float32 weights and two states of 4 bytes each, over four devices.
        (zero(1), 4, 2000, 3000, 2000, 0),
        (zero(2), 4, 2000, 3000, 500 + 300, 0),
        (zero(3), 4, 500, 3000, 500 + 300, 2000),
        (fsdp2(True), 4, 500, 1000, 500 + 300, 600),
        (fsdp2(False), 4, 500, 1000, 500 + 300, 2000),
        ({"optimizer": "adamw_bnb_8bit"}, 1, 2000, 2032, 2000, 0),
    ],
)
def test_sharding_divides(cfg, devices, weights, optimizer, gradients, gathered):
    got = lines(cfg, devices, END)
    assert (got["weights"], got["optimizer"]) == (weights, optimizer)
    assert (got["gradients"], got["gathered"]) == (gradients, gathered)


def test_the_fullest_moment_counts():
    # Unsharded, when the gradients are there; sharded, when the activations are.
    late = Moment(60, 0, 0, 2000)
    assert lines({}, 1, Moment(1900, 0, 0, 0), late)["activations"] == 60
    assert lines(fsdp2(True), 64, Moment(1900, 0, 0, 0), late)["activations"] == 1900
    # In the optimizer's step all gradients exist, and nothing of the forward pass does.
    assert lines({}, 1)["gradients"] == 2000
    assert "activations" not in lines({}, 1)


def test_accumulated_gradients_are_there_all_the_time():
    assert lines({}, 1, FORWARD)["gradients"] == 0
    assert lines({"gradient_accumulation_steps": 2}, 1, FORWARD)["gradients"] == 2000


def test_offloading_leaves_the_device():
    offloaded = zero(3, offload_optimizer={"device": "cpu"}, offload_param={"device": "cpu"})
    got = lines(offloaded, 4)
    assert got["weights"] == got["optimizer"] == 0
    assert lines(zero(3, offload_optimizer={"device": "none"}), 4)["optimizer"] > 0


# Batches in parts, and groups.


@pytest.fixture
def small(tmp_path, tiny_model):
    """Writes a config that trains a model of two layers on pairs under four prompts."""

    def write(block=(), **changes):
        dimensions = {"dimensions": ["helpfulness", "honesty", "harmlessness"]}
        data = tmp_path / "rows.jsonl"
        values = {"optimizer": "sgd", "micro_batch_size": 1, "amopo": dimensions | dict(block)}
        return write_config(tmp_path, config(tmp_path, tiny_model, data, **values | changes))

    return write


def one_step(path, usual=None, largest=None):
    """A step of a config on a CPU, with the examples' memory counted of `largest`."""
    cfg, amopo = load(str(path), "cpu", 1)
    usual, largest = (
        made_up_batch(1, 4, PairShape(100, 60)) if example is None else micro_batch(example, 1)
        for example in (usual, largest)
    )
    return run_step(cfg, model_config(cfg), amopo, usual, largest, "cpu")


def test_parts_take_the_memory_of_one_and_one_more_forward_pass(small):
    whole, parts = (one_step(small({"one_prompt_at_a_time": one})) for one in (False, True))
    assert (whole.parts, parts.parts) == (1, 4) and whole.tokens == parts.tokens
    # A backward pass costs two forward passes; the head, a little otherwise.
    assert parts.flops / whole.flops == pytest.approx(4 / 3, rel=0.03)
    ratio = parts.moments[0].activations / whole.moments[0].activations
    assert ratio == pytest.approx(1 / 4, rel=0.05)
    # The gradients of the parts before it are there while a part runs.
    assert parts.moments[1].activations == pytest.approx(parts.moments[0].activations, rel=0.05)
    assert parts.moments[1].gradients == pytest.approx(parts.trained, rel=0.01)


def test_parts_of_what_shares_nothing(small):
    """Split as training splits, before every response gets a prompt of its own."""
    for block, parts in (({"one_prompt_at_a_time": True}, 4), ({"max_tokens": 512}, 2)):
        step = one_step(small(block | {"share_prompt": False}))
        assert step.layout == "sequences" and step.tokens == step.tokens_unshared == 1280
        assert step.parts == parts


def test_the_largest_part_counts(small):
    """Of a pair in which one response is ten times as long as the other."""
    path = small({"max_tokens": 512})
    long = replace(pair([[1] * 32, [2] * 32], [[]] * 2), responses=[[3] * 40, [4] * 450])
    other = replace(long, responses=[[3], [4] * 450])
    short = replace(long, responses=[[3] * 40, [3] * 40])
    of_long, of_other = (one_step(path, short, largest) for largest in (long, other))
    assert (of_long.parts, of_long.largest_parts, of_other.largest_parts) == (1, 4, 2)
    activations = [step.moments[0].activations for step in (of_long, of_other)]
    assert activations[0] == pytest.approx(activations[1], rel=0.02)


# name: (settings, prompts and sequences of a group of 4 responses, each rated otherwise)
GROUPS = {
    # A prompt per rating that wins: behind it the winner and whom it beats, 4 + 3 + 2.
    "chosen": ({}, 3 * 3, 3 * 9),
    # Levels 0, 1/2, 1: of the ratings 1, 2/3 and 1/3 two round to one half, 4 + 3.
    "chosen, in three levels": ({"rating_levels": 3}, 2 * 3, 7 * 3),
    "own": ({"rating_in_prompt": "own"}, 4 * 3, 4 * 3),
    "own, in two levels": ({"rating_in_prompt": "own", "rating_levels": 2}, 2 * 3, 4 * 3),
    "none": ({"rating_in_prompt": "none"}, 3, 4 * 3),
    "no instruction": ({"objective": "simpo"}, 1, 4),
    "one pair": ({"pairs": "best_worst"}, 3, 2 * 3),
}


@pytest.mark.parametrize("name", GROUPS)
def test_a_made_up_group(name):
    block, prompts, sequences = GROUPS[name]
    amopo = AMoPOConfig(dimensions=["a", "b"], group_by_prompt=True, **block)
    made = made_up_group(amopo, 4)
    assert (len(made.prompts), len(made.places())) == (prompts, sequences)
    assert len(made.comparisons) == (1 if name == "one pair" else 6)


@pytest.mark.parametrize(
    ("block", "changes", "proposed"),
    [
        ({}, {}, ["one_prompt_at_a_time: true"]),
        ({"group_by_prompt": True}, {}, ["one_prompt_at_a_time: true", "max_tokens: 512"]),
        # There is one prompt, and nothing to take one by one.
        ({"objective": "simpo"}, {}, []),
        # A run would refuse it with the optimizer, but not with another one.
        ({}, {"optimizer": "lomo"}, ["one_prompt_at_a_time: true"]),
        ({}, {"overrides_of_model_config": {"output_router_logits": True}}, []),
    ],
)
def test_parts_are_proposed(small, block, changes, proposed):
    def again(cfg, devices):
        amopo = read_block(cfg)
        check_parts(cfg, amopo)
        fits = bool(amopo.in_parts)
        return SimpleNamespace(fits=fits, sharding=SimpleNamespace(devices=devices))

    cfg, _ = load(str(small(block, **changes)), "cpu", 1)
    found = [text for text, plan in advise(cfg, again(cfg, 1), again) if plan.fits]
    before = "gradient_checkpointing: true; optimizer: paged_adamw_8bit; "
    assert found == [f"{before * ('optimizer' in changes)}amopo.{text}" for text in proposed]


# The command.


def plan(*arguments):
    return CliRunner().invoke(amopo, ["plan", *map(str, arguments)])


@pytest.mark.parametrize("path", SIZED, ids=lambda path: path.stem)
def test_shipped_configs_fit_the_machine_that_they_name(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    text = path.read_text(encoding="utf-8")
    command, summary = re.search(r"# Plan: axolotl amopo (plan .+)\n#   (.+)\n", text).groups()
    done = plan(*command.split()[1:])
    assert done.exit_code == 0, done.output
    assert summary in done.output


def test_json_is_for_programs():
    done = plan(LORA_7B, "--gpu", "h100-80gb", "--json")
    values = json.loads(done.stdout.splitlines()[-1])  # axolotl's own lines stand before it
    assert values["total"] == sum(values["memory"].values())
    assert values["fits"] is True
    assert values["changes"] == []


def test_groups(small):
    """Each of 3 responses rated otherwise, so 2 prompts per criterion with 3 and 2 responses."""
    block = {"group_by_prompt": True, "max_tokens": 512}
    values = []
    for names in (["group_by_prompt", "max_tokens"], ["group_by_prompt"]):
        path = small({name: block[name] for name in names}, gradient_accumulation_steps=2)
        arguments = ("--gpu", "cpu", "--responses", 3, "--prompt-tokens", 100)
        done = plan(path, *arguments, "--response-tokens", 60, "--json")
        assert done.exit_code == 0, done.output
        values.append(json.loads(done.stdout.splitlines()[-1]))
    capped, whole = values
    assert (whole["groups_per_step"], whole["pairs_per_step"]) == (2, 6)
    assert (whole["responses"], whole["prompts"], whole["parts"]) == (3, 8, 1)
    assert whole["tokens_per_step"] == 2 * 4 * (2 * 100 + 5 * 60)
    assert whole["tokens_per_step_unshared"] == 2 * 4 * 5 * 160
    assert whole["largest"] == "groups of 3 responses that fill sequence_len (512)"
    # A sequence of 512 tokens, where 20 of them ran at once.
    assert capped["largest_parts"] == 20
    assert capped["memory"]["activations"] < 0.1 * whole["memory"]["activations"]


def test_groups_of_prepared_data(tmp_path, tiny_model):
    """The group of median length says how many responses there are, the longest what it takes."""
    rows = [
        {
            "prompt": "Why?" * 8,
            "responses": [
                {"text": f"{i} " * words, "scores": {"helpfulness": 1 + i, "honesty": 1}}
                for i in range(count)
            ],
        }
        for count, words in ((2, 1), (4, 60), (2, 3), (3, 40), (2, 150))
    ]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    block = {"dimensions": ["helpfulness", "honesty"], "group_by_prompt": True}
    values = config(tmp_path, tiny_model, data, amopo=block, micro_batch_size=1)
    path = write_config(tmp_path, values)
    made, _ = plan_config(str(path), gpu="cpu")
    assert made.responses == RESPONSES and "that fill sequence_len (512)" in made.largest
    _, datasets = prepare(path)
    examples = [Example.from_row(row) for row in datasets.train_dataset]
    longest = max(examples, key=tokens)
    assert len(longest.responses) == 4
    made, _ = plan_config(str(path), gpu="cpu")
    said = f"{len(longest.responses)} responses, {len(longest.prompts)} prompts"
    assert made.largest == f"the data's largest group ({said}, {tokens(longest):,} tokens)"
    assert made.responses == len(sorted(examples, key=tokens)[2].responses)
    batch = made_up_batch(1, 1, PairShape(8, 8))
    cfg, amopo = load(str(path), "cpu", 1)
    step = run_step(cfg, model_config(cfg), amopo, batch, micro_batch(longest, 1), "cpu")
    assert made.memory == memory(step, cfg, sharding(cfg, 1), None)
    # Named, or gone.
    made, _ = plan_config(str(path), gpu="cpu", responses=3)
    assert made.responses == 3 and "sequence_len" in made.largest
    data.unlink()
    made, _ = plan_config(str(path), gpu="cpu")
    assert made.responses == RESPONSES and "sequence_len" in made.largest


def test_what_does_not_fit_is_told_what_would(tmp_path):
    values = yaml.safe_load(LORA_7B.read_text(encoding="utf-8"))
    values |= {"base_model": "HuggingFaceTB/SmolLM2-135M-Instruct", "sequence_len": 512}
    del values["gradient_checkpointing"]
    done = plan(write_config(tmp_path, values), "--gpu-memory", "4", "--gpu-tflops", "100")
    assert done.exit_code == 3
    assert "It does not fit" in done.output
    for change in ("gradient_checkpointing: true", "amopo.one_prompt_at_a_time: true"):
        assert f"with {change} it would fit" in done.output


@pytest.mark.parametrize(
    ("changes", "arguments", "said"),
    [
        ({"rl": None}, [], "rl: amopo"),
        ({}, ["--gpu", "h100-80g"], "Did you mean 'h100-80gb'"),
        ({"base_model": "somebody/unknown"}, [], "base_model: somebody/unknown"),
        ({"deepspeed": "nowhere.json"}, [], "nowhere.json"),
        ({"amopo": {"gama": 1}}, [], "amopo.gama"),
        ({"sample_packing": True}, [], "sample_packing"),
        ({}, ["--responses", "4"], "amopo.group_by_prompt: true"),
        ({"amopo": {"max_tokens": 64}}, [], "amopo.max_tokens: 64"),
    ],
)
def test_bad_input_is_one_sentence(tmp_path, changes, arguments, said):
    values = yaml.safe_load(LORA_7B.read_text(encoding="utf-8"))
    values = {k: v for k, v in (values | changes).items() if v is not None}
    done = plan(write_config(tmp_path, values), *arguments)
    assert done.exit_code == 1
    assert said in done.output
    assert "Traceback" not in done.output
