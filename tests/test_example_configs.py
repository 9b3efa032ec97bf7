"""Every file in example_configs/ passes axolotl's own validation, loses no key in it, and makes a
step whose types, shapes and devices fit."""

import contextlib
import itertools
import json
import os
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import yaml
from axolotl.cli.config import prepare_plugins
from axolotl.integrations.base import PluginManager
from axolotl.utils.config import validate_config
from axolotl.utils.dict import DictDefault
from runs import load, write_config, write_jsonl
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

from axolotl_amopo.commands.plan.groups import made_up_example
from axolotl_amopo.commands.plan.load import load as load_for
from axolotl_amopo.commands.plan.models import model_config
from axolotl_amopo.commands.plan.step import (
    PairShape,
    build_model,
    micro_batch,
    shaped,
    shortened,
)
from axolotl_amopo.config.block import AMoPOConfig
from axolotl_amopo.errors import AMoPOError, ConfigError
from axolotl_amopo.model import forward
from axolotl_amopo.model.attention import PACKED_SDPA
from axolotl_amopo.model.batch import responses
from axolotl_amopo.model.choose import candidates
from axolotl_amopo.objectives import OBJECTIVES, example_losses
from axolotl_amopo.training.metrics import example_metrics
from axolotl_amopo.training.reference import AdapterOff

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "example_configs").glob("*.yml"))
QUICKSTART = ROOT / "example_configs" / "quickstart.yml"
# One per objective on the quickstart's data.
QUICK = [path for path in CONFIGS if path.stem.startswith("quickstart-")]
SECTIONS = ("datasets", "test_datasets")
# What the plugin and the fixtures below change on purpose.
CHANGED = {"rl", "amopo", "base_model", "dataset_prepared_path", "output_dir", *SECTIONS}

every_config = pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)


def read(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def helpsteer(tmp_path_factory) -> Path:
    """Two prompts with two rated responses each, in HelpSteer's layout."""
    rows = [
        {
            "prompt": f"Question {i // 2}?",
            "response": f"Answer {i}.",
            "helpfulness": i,
            "correctness": 4 - i,
            "coherence": 3,
            "complexity": 1,
            "verbosity": 2,
        }
        for i in range(4)
    ]
    return write_jsonl(tmp_path_factory.mktemp("data") / "helpsteer.jsonl", rows)


@pytest.fixture
def local(tmp_path, tiny_model, helpsteer):
    """A config's values, with what the hub would have to serve replaced by local folders."""

    def replace(values: dict[str, Any]) -> dict[str, Any]:
        values = values | {
            "base_model": str(tiny_model),
            "dataset_prepared_path": str(tmp_path / "prepared"),
            "output_dir": str(tmp_path / "out"),
        }
        for section in SECTIONS:
            if section in values:
                values[section] = [
                    {k: v for k, v in entry.items() if k not in ("name", "data_files", "ds_type")}
                    | {"path": str(helpsteer), "split": "train"}
                    for entry in values[section]
                ]
        return values

    return replace


@pytest.fixture(autouse=True)
def forget_plugins():
    """Those that a config names would stay in this process, for other tests too."""
    yield
    PluginManager.get_instance().plugins.clear()


def validate(values: dict[str, Any], gpu: bool = True) -> DictDefault:
    """The first half of axolotl's `load_cfg`: plugins, then validation.

    `load_cfg` itself asks this machine for its GPU, and goes on to set the environment up for
    FSDP or DeepSpeed; `validate_config` takes the GPUs that a config is written for as arguments.
    Without `gpu`, the plugin sees a machine that has none.
    """
    cfg = DictDefault(values)
    with mock.patch.object(torch.accelerator, "is_available", lambda: gpu):
        prepare_plugins(cfg)
    return validate_config(
        cfg,
        capabilities={
            "bf16": True,
            "fp8": False,
            "tf32": True,
            "n_gpu": 8 if values.get("fsdp_config") or values.get("deepspeed") else 1,
            "compute_capability": "sm_90",
        },
        env_capabilities={"torch_version": torch.__version__.split("+")[0]},
    )


def assert_kept(given: dict[str, Any], validated: dict[str, Any], changed: set[str] = CHANGED):
    """axolotl's schemas drop keys that they don't know without a word."""
    given = {key: value for key, value in given.items() if value is not None and key != "rl"}
    lost = [key for key in given if key not in validated]
    assert not lost, f"axolotl's schema drops {lost}"
    for key in given.keys() - changed:
        if isinstance(given[key], dict):
            assert_kept(given[key], validated[key], set())
        elif not isinstance(given[key], str):  # text may stand for a number, or be `auto`
            assert validated[key] == given[key], key


def test_there_are_configs():
    assert {"qwen2.5-7b-80gb-lora", "qwen2.5-32b-8x80gb-fsdp2", "qwen2.5-32b-8x80gb-zero3"} <= {
        path.stem for path in CONFIGS
    }


@every_config
def test_axolotl_accepts_it(path, local):
    given = read(path)
    cfg = validate(local(given))

    assert_kept(given, cfg)
    assert cfg.rl is None
    assert cfg.amopo.enabled
    assert cfg.amopo.objective == given["amopo"].get("objective", "amopo")
    for key in given["amopo"].keys() - {"dimensions", "weights"}:
        assert cfg.amopo[key] == given["amopo"][key], key
    assert [dimension["name"] for dimension in cfg.amopo.dimensions] == [
        dimension if isinstance(dimension, str) else dimension["name"]
        for dimension in given["amopo"]["dimensions"]
    ]
    assert cfg.rl_beta == given.get("rl_beta", OBJECTIVES[cfg.amopo.objective]().beta)
    assert cfg.adapter == given.get("adapter")
    for section in SECTIONS:
        for entry, validated in zip(given.get(section, []), cfg[section] or [], strict=True):
            assert entry["type"].startswith("amopo.")
            format_name = entry["type"].removeprefix("amopo.")
            assert validated["type"] == f"axolotl_amopo.formats.{format_name}"


@every_config
@pytest.mark.parametrize("gpu", [True, False], ids=["gpu", "cpu"])
def test_fused_lora_kernels_are_on_where_they_work(path, gpu, local):
    given = read(path)
    if given.get("deepspeed") and not gpu:
        with pytest.raises(ConfigError, match="deepspeed: needs a GPU"):
            validate(local(given), gpu)
        return
    cfg = validate(local(given), gpu)
    for part in ("mlp", "qkv", "o", "embedding"):
        assert bool(cfg[f"lora_{part}_kernel"]) is bool(gpu and "adapter" in given), part


# With `deepspeed:`, axolotl already starts a process group (NCCL) while it loads the config. Of the
# quickstart's, which differ in the objective alone, one will do.
@pytest.mark.parametrize(
    "path",
    [path for path in CONFIGS if not read(path).get("deepspeed") and path not in QUICK[1:]],
    ids=lambda path: path.stem,
)
def test_axolotl_loads_it(path, local, tmp_path):
    given = read(path)
    with mock.patch.dict(os.environ):  # axolotl writes variables for its launchers there
        cfg = load(write_config(tmp_path, local(given)))

    assert cfg.amopo.enabled
    assert cfg.batch_size == cfg.micro_batch_size * given["gradient_accumulation_steps"]


@every_config
def test_it_opens_with_how_to_run_it(path):
    text = path.read_text(encoding="utf-8")
    opening = itertools.takewhile(lambda line: line.startswith("#"), text.splitlines())
    assert path.name in "".join(opening)


def test_there_is_one_per_objective_and_it_says_so_in_one_line():
    assert {path.stem.removeprefix("quickstart-") for path in QUICK} == OBJECTIVES.keys() - {
        "amopo"
    }
    shared = set()
    for path in QUICK:
        name = path.stem.removeprefix("quickstart-")
        text = path.read_text(encoding="utf-8")
        notes = list(itertools.takewhile(lambda line: line.startswith("#"), text.splitlines()))
        assert 6 <= len(notes) <= 10 and any("Keys that matter" in line for line in notes)
        own = {f"  objective: {name}", f"output_dir: quickstart-run/{name}"}
        if name == "mrpo":  # the one that takes a line more
            own.add("  reference: [initial, quickstart-run/adapter]")
        rest = text.splitlines()[len(notes) :]
        assert own <= set(rest)
        shared.add("\n".join(line for line in rest if line not in own))
    assert len(shared) == 1
    # And all else is as in the quickstart, where that isn't the objective's to say.
    given, quickstart = read(QUICK[0]), read(QUICKSTART)
    assert given["amopo"].keys() == {"objective", "dimensions"}
    assert given["amopo"]["dimensions"] == quickstart["amopo"]["dimensions"]
    others = given.keys() - {"amopo", "output_dir"}
    assert {key: given[key] for key in others} == {key: quickstart[key] for key in others}
    assert quickstart.keys() - given.keys() == {"rl_beta"}


def test_deepspeed_file_is_there():
    """The path is relative to the folder that the command runs in: the one above."""
    named = {path.stem: read(path).get("deepspeed") for path in CONFIGS}
    named = {stem: file for stem, file in named.items() if file}
    assert named
    for file in named.values():
        assert Path(file).parent == Path("example_configs/deepspeed")
        values = json.loads((ROOT / file).read_text(encoding="utf-8"))
        assert values["bf16"]["enabled"]
        assert values["zero_optimization"]["stage"] == 3


def test_fsdp_shards_layers_of_the_model():
    """A class name that the model doesn't have would shard nothing, at the price of memory."""
    from transformers.models.qwen2 import modeling_qwen2

    fsdp = read(ROOT / "example_configs" / "qwen2.5-32b-8x80gb-fsdp2.yml")["fsdp_config"]
    assert hasattr(modeling_qwen2, fsdp["transformer_layer_cls_to_wrap"])


@pytest.mark.parametrize(
    ("block", "key", "misspelt"),
    [
        (None, "max_grad_norm", "max_gradient_norm"),
        (None, "attn_implementation", "attention_implementation"),
        ("fsdp_config", "activation_checkpointing", "activation_checkpoint"),
    ],
)
def test_a_misspelt_key_is_noticed(block, key, misspelt, local):
    given = read(ROOT / "example_configs" / "qwen2.5-32b-8x80gb-fsdp2.yml")
    holder = given[block] if block else given
    holder[misspelt] = holder.pop(key)
    # Refused by the plugin, or (in a block that axolotl owns) missed in what validation kept.
    with pytest.raises((AMoPOError, AssertionError), match=misspelt):
        assert_kept(given, validate(local(given)))


GPU_CONFIGS = [path for path in CONFIGS if not path.stem.startswith("quickstart")]


@cache  # for both devices
def loaded(path: str, gpus: int) -> tuple[DictDefault, AMoPOConfig]:
    return load_for(path, "cuda", gpus)


@pytest.mark.parametrize("device", ["cuda", "meta"])
@pytest.mark.parametrize("path", GPU_CONFIGS, ids=lambda path: path.stem)
def test_a_step_on_fake_tensors(path, device, monkeypatch):
    """A micro batch of the config's model, two layers of it, on tensors without contents.

    On fake CUDA tensors the forward pass and what follows it (objective, loss, metrics) run under
    autocast, as they will. A backward pass there asks for a driver, so forward and backward run
    once more on fake meta tensors, which no autocast knows. A tensor that is made on the CPU, a
    shape that doesn't fit, a type that an operator does not take fail in one of the two.

    Neither sees a value, a kernel (what CUDA's attention takes; fused LoRA kernels and quantised
    weights, in whose place stand plain ones), autocast in the backward pass, sharding, the
    optimizer, or an objective's draws, which read the examples' ids.
    """
    sharded = read(path).keys() & {"fsdp_config", "deepspeed"}
    cfg, amopo = loaded(str(path), gpus=8 if sharded else 1)
    model = build_model(cfg, shortened(model_config(cfg), 2), device)
    example = shaped(made_up_example(amopo, 2), PairShape(48, 11, 5))
    batch = micro_batch(example, cfg.micro_batch_size)

    def lay_out(*what):
        # From lengths alone, on the CPU, and with operators whose shapes depend on contents.
        with unset_fake_temporarily():
            return plain(*what)

    plain = forward.lay_out
    monkeypatch.setattr(forward, "lay_out", lay_out)
    autocast = contextlib.nullcontext()
    if device == "cuda":
        with monkeypatch.context() as gpu:  # what autocast asks before it is turned on
            for name in ("is_available", "is_bf16_supported"):
                gpu.setattr(torch.cuda, name, lambda *_, **__: True)
            autocast = torch.autocast("cuda", dtype=torch.bfloat16 if cfg.bf16 else torch.float16)
    else:  # our head asks, and turns it off
        monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
        monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    causal = forward.causal_model(model)
    (layout, *_) = candidates(cfg.attn_implementation, torch.device("cuda"))
    if layout == "packed":
        causal.set_attn_implementation(PACKED_SDPA)
    if cfg.gradient_checkpointing:
        causal.gradient_checkpointing_enable(cfg.gradient_checkpointing_kwargs)
    forward.teach(model)
    with FakeTensorMode(allow_non_fake_inputs=True):
        batch |= {k: v.to(device) for k, v in batch.items() if isinstance(v, torch.Tensor)}
        with autocast:
            model.train()
            reference = None
            if "reference" in amopo.needs:
                run = partial(forward.response_logps, model, layout=layout)
                reference = AdapterOff().sums(model, batch, run)
            logps, mask, _ = forward.response_logps(model, batch, layout)
            weights = torch.ones(batch["points"].shape, device=device)
            given = responses(batch, logps, mask, weights=weights, reference=reference)
            outcome = amopo.make_objective(cfg.rl_beta)(given, None)
            loss = (example_losses(outcome, given) * given.counts).mean()
            metrics = example_metrics(outcome, given, amopo.criteria)
        assert loss.dtype == torch.float32
        assert {one.device for one in [loss, *metrics.values()]} == {logps.device}
        assert logps.device.type == device
        if device == "meta":
            loss.backward()
            trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
            assert trained and all(p.grad.dtype == p.dtype for p in trained.values())
