"""`axolotl amopo plan`: against training itself, and as a command."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from axolotl.utils.dict import DictDefault
from click.testing import CliRunner
from runs import LORA, config, write_config, write_jsonl
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from axolotl_amopo.commands import amopo
from axolotl_amopo.commands.plan.estimate import memory, sharding
from axolotl_amopo.commands.plan.models import KNOWN
from axolotl_amopo.commands.plan.step import Moment, Step

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

# Words of a response. Starting to train takes some 50 MB on a CPU that no step needs again; where
# a step takes little, longer rows make it outweigh that.
SHORT, LONG = 30, 300
LONGER = {"lora_checkpointed"}
# Of real steps. Nothing of the loss is left out: memory is that of AdamW's too.
MEASURED = {
    "full_two_pairs": {"micro_batch_size": 2},
    "full_checkpointed_accumulated": {
        "gradient_checkpointing": True,
        "gradient_accumulation_steps": 2,
    },
    "full_unshared": {"amopo": {"dimensions": ["helpfulness"], "share_prompt": False}},
    "lora_checkpointed": LORA | {"gradient_checkpointing": True, "sequence_len": 2048},
    "dora_head_saved": LORA | {"peft_use_dora": True, "lora_modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("name", KNOWN)
def test_known_models_have_their_parameters(name):
    with FakeTensorMode():
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**KNOWN[name]))
    assert model.num_parameters() == PUBLISHED[name]


def row(number, words):
    responses = [
        {"text": f"{number} " + word * words, "scores": {"helpfulness": score, "honesty": score}}
        for word, score in (("yes ", 5), ("no ", 2))
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
        words: write_jsonl(folder / f"{words}.jsonl", [row(i, words) for i in range(8)])
        for words in (SHORT, LONG)
    }
    for name, changes in MEASURED.items():
        own = folder / name
        own.mkdir()
        rows = data[LONG if name in LONGER else SHORT]
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
    for exact in ("parameters", "trainable", "trained", "weights", "layout"):
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


def test_what_does_not_fit_is_told_what_would(tmp_path):
    values = yaml.safe_load(LORA_7B.read_text(encoding="utf-8"))
    values |= {"base_model": "HuggingFaceTB/SmolLM2-135M-Instruct", "sequence_len": 512}
    del values["gradient_checkpointing"]
    done = plan(write_config(tmp_path, values), "--gpu-memory", "4", "--gpu-tflops", "100")
    assert done.exit_code == 3
    assert "It does not fit" in done.output
    assert "with gradient_checkpointing: true it would fit" in done.output


@pytest.mark.parametrize(
    ("changes", "arguments", "said"),
    [
        ({"rl": None}, [], "rl: amopo"),
        ({}, ["--gpu", "h100-80g"], "Did you mean 'h100-80gb'"),
        ({"base_model": "somebody/unknown"}, [], "base_model: somebody/unknown"),
        ({"deepspeed": "nowhere.json"}, [], "nowhere.json"),
        ({"amopo": {"gama": 1}}, [], "amopo.gama"),
        ({"sample_packing": True}, [], "sample_packing"),
        ({"amopo": {"group_by_prompt": True}}, [], "group_by_prompt: false"),
    ],
)
def test_bad_input_is_one_sentence(tmp_path, changes, arguments, said):
    values = yaml.safe_load(LORA_7B.read_text(encoding="utf-8"))
    values = {k: v for k, v in (values | changes).items() if v is not None}
    done = plan(write_config(tmp_path, values), *arguments)
    assert done.exit_code == 1
    assert said in done.output
    assert "Traceback" not in done.output
