"""What a config asks of processes, GPUs and files and can't have: one sentence, before loading."""

import copy
import json
from functools import partial
from types import SimpleNamespace

import pytest
import runs
import torch
import torch.distributed as dist
from accelerate import FullyShardedDataParallelPlugin, ParallelismConfig
from axolotl.integrations.base import PluginManager
from axolotl.utils import config as axolotl_config
from axolotl.utils.dict import DictDefault
from axolotl.utils.distributed import _get_parallel_config_kwargs
from axolotl.utils.schemas.config import AxolotlInputConfig
from axolotl.utils.schemas.enums import CustomSupportedOptimizers
from bitsandbytes.optim import PagedAdamW8bit
from pydantic import ValidationError
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import MixtralConfig, trainer_optimizer
from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig
from transformers.training_args import OptimizerNames

from axolotl_amopo.config.axolotl_keys import SEQUENCE_LEN, steps_in_backward
from axolotl_amopo.config.before_launch import check_before_launch
from axolotl_amopo.config.devices import BITSANDBYTES, check_devices, check_layers, check_parallel
from axolotl_amopo.config.take_over import take_over
from axolotl_amopo.errors import ConfigError

DATA = runs.QUICKSTART / "train.jsonl"
ZERO3 = {
    "zero_optimization": {"stage": 3},
    "bf16": {"enabled": True},
    "train_micro_batch_size_per_gpu": "auto",
}
FSDP = {"fsdp_version": 2, "fsdp_config": {"state_dict_type": "FULL_STATE_DICT"}}

# name: (changes to the config, parts of the error's text)
REFUSED = {
    "no such file": (
        {"deepspeed": "zero3.json"},
        ["deepspeed: zero3.json", "no such file in /", "axolotl fetch deepspeed_configs"],
    ),
    "no such file, by its whole path": (
        {"deepspeed": "/nowhere/zero3.json"},
        ["deepspeed: /nowhere/zero3.json: there is no such file; ", "axolotl fetch"],
    ),
    "DeepSpeed without ZeRO": ({"deepspeed": {"bf16": {"enabled": True}}}, ["zero_optimization"]),
    "a stage that does not exist": (
        {"deepspeed": {"zero_optimization": {"stage": 4}}},
        ["deepspeed", "N from 0 to 3"],
    ),
    "ZeRO-3 and DoRA": (
        {"deepspeed": ZERO3, "bf16": True, "adapter": "lora", "peft_use_dora": True},
        ["peft_use_dora", "peft_use_rslora"],
    ),
    "FSDP2 and modules to save": (
        FSDP | {"adapter": "lora", "lora_modules_to_save": ["lm_head"]},
        ["lora_modules_to_save", "fsdp_config", "DeepSpeed"],
    ),
    "uneven batches": (
        {"accelerator_config": {"even_batches": False}},
        ["accelerator_config.even_batches", "remove it"],
    ),
    "another micro batch": (
        {"deepspeed": ZERO3 | {"train_micro_batch_size_per_gpu": 4}},
        ["micro_batch_size: 2", "train_micro_batch_size_per_gpu: 4", '"auto"'],
    ),
    "another accumulation": (
        {"deepspeed": ZERO3 | {"gradient_accumulation_steps": 8}},
        ["gradient_accumulation_steps: 1", "gradient_accumulation_steps: 8", '"auto"'],
    ),
    "another clipping": (
        {"deepspeed": ZERO3 | {"gradient_clipping": 1.0}, "max_grad_norm": 3.0},
        ["max_grad_norm: 3.0", "gradient_clipping: 1.0", '"auto"'],
    ),
    "another precision": ({"deepspeed": ZERO3}, ["bf16: False", "bf16.enabled: True", '"auto"']),
    "FSDP2 without its block": ({"fsdp_version": 2}, ["fsdp_version", "fsdp_config: {"]),
    "a state dict of FSDP1": (
        {"fsdp_config": {"state_dict_type": "LOCAL_STATE_DICT"}},
        ["LOCAL_STATE_DICT", "write FULL_STATE_DICT"],
    ),
    "shards of the model only": (
        {"fsdp_config": {"fsdp_state_dict_type": "SHARDED_STATE_DICT"}, "save_only_model": True},
        ["save_only_model", "SHARDED_STATE_DICT", "write FULL_STATE_DICT"],
    ),
    "checkpointing twice": (
        {"fsdp_config": {"activation_checkpointing": True}, "gradient_checkpointing": True},
        ["gradient_checkpointing", "fsdp_config.activation_checkpointing", "keep one"],
    ),
    "an optimizer that can't be sharded": (
        FSDP | {"optimizer": "paged_adamw_8bit"},
        ["optimizer: paged_adamw_8bit", "write adamw_torch_8bit"],
    ),
}
ACCEPTED = {
    "ZeRO-3": {"deepspeed": ZERO3, "bf16": True},
    "ZeRO-3, precision to be seen": {"deepspeed": ZERO3, "bf16": "auto", "max_grad_norm": 3.0},
    "ZeRO-2": {
        "deepspeed": {"zero_optimization": {"stage": 2}},
        "optimizer": "paged_adamw_8bit",
    },
    "FSDP2": FSDP | {"save_only_model": True, "gradient_checkpointing": True},
    "FSDP2, its own checkpointing": {
        "fsdp_config": {"activation_checkpointing": True, "state_dict_type": "SHARDED_STATE_DICT"},
        "optimizer": "adamw_torch_8bit",
    },
    "FSDP2, offloading in place of checkpointing": {
        "fsdp_config": {"activation_checkpointing": True},
        "gradient_checkpointing": True,
        "activation_offloading": True,
    },
}


def refusal(check, *arguments) -> str:
    with pytest.raises(ConfigError) as error:
        check(*arguments)
    return str(error.value)


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name, tmp_path, tiny_model):
    changes, parts = REFUSED[name]
    text = refusal(check_parallel, runs.config(tmp_path, tiny_model, DATA) | changes)
    assert all(part in text for part in parts), text
    assert "\n" not in text


@pytest.mark.parametrize("name", ACCEPTED)
def test_accepted(name, tmp_path, tiny_model):
    check_parallel(runs.config(tmp_path, tiny_model, DATA) | ACCEPTED[name])


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ("{'stage': 3}", ["is not JSON", "line 1"]),
        (b"\xff\xfe", ["is not JSON"]),
        ("[3]", ["is no DeepSpeed config"]),
        ('{"model_type": "llama"}', ["is no DeepSpeed config", "zero_optimization"]),
    ],
    ids=["no JSON", "no text", "a list", "another file"],
)
def test_deepspeed_file_of_another_kind(content, parts, tmp_path):
    path = tmp_path / "zero3.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    text = refusal(check_parallel, {"deepspeed": str(path)})
    assert all(part in text for part in [str(path), "axolotl fetch deepspeed_configs", *parts])
    path.write_text(json.dumps(ZERO3))
    check_parallel({"deepspeed": str(path), "bf16": True})


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"deepspeed": "zero3.json"}, "there is no such file"),
        ({"deepspeed": ZERO3, "bf16": True}, "deepspeed: needs a GPU"),
    ],
    ids=["config", "devices"],
)
def test_refused_while_the_config_is_loaded(changes, text, tmp_path, tiny_model):
    values = runs.config(tmp_path, tiny_model, DATA) | changes
    with pytest.raises(ConfigError, match=text):
        runs.load(runs.write_config(tmp_path, values))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (FSDP | {"fsdp_version": 1}, "fsdp_version: 1 is no longer supported.*Use fsdp_version: 2"),
        ({"fsdp": ["full_shard"]}, "`fsdp` list is no longer supported.*Use `fsdp_config`"),
        (FSDP | {"deepspeed": ZERO3, "bf16": True}, "deepspeed and fsdp cannot be used together"),
        (FSDP | {"optimizer": "adamw_8bit"}, "FSDP2 not compatible with adamw_8bit"),
        ({"deepspeed": ZERO3, "optimizer": "muon", "bf16": True}, "Muon .* with DeepSpeed"),
    ],
    ids=["version 1", "fsdp", "both", "an 8-bit optimizer", "muon"],
)
def test_axolotl_refuses_by_itself(changes, text, tmp_path, tiny_model, monkeypatch):
    """So the plugin does not: where this fails, it has to."""
    monkeypatch.setattr("axolotl_amopo.config.take_over.check_devices", lambda cfg: None)
    values = runs.config(tmp_path, tiny_model, DATA) | changes
    with pytest.raises(ValidationError, match=text):
        runs.load(runs.write_config(tmp_path, values))


# name: (GPUs of the machine, LOCAL_RANK, the config, a part of the error's text or nothing)
DEVICES = {
    "a GPU for each": (8, "7", FSDP, None),
    "more processes than GPUs": (4, "4", {}, "8 processes .* has 4 GPUs; .*nproc_per_node 4"),
    "no launcher for one GPU": (1, None, {"deepspeed": ZERO3}, None),
    "no launcher for more": (8, None, {"deepspeed": ZERO3}, "needs a launcher .* with 8 GPUs"),
    "DeepSpeed": (8, "7", {"deepspeed": ZERO3}, None),
    "no GPU": (0, None, {"deepspeed": ZERO3}, "deepspeed: needs a GPU"),
    "no GPU, DeepSpeed on several processes": (0, "1", {"deepspeed": ZERO3}, None),
    "no GPU, FSDP2": (0, "0", FSDP, "fsdp_config: needs a GPU"),
    "no GPU, DDP": (0, "1", {}, None),
    "no GPU, preprocessing": (0, None, {"deepspeed": ZERO3, "is_preprocess": True}, None),
    "no GPU, merging": (0, None, FSDP, None),
    "no GPU on a Ray driver": (0, None, {"deepspeed": ZERO3, "use_ray": True}, None),
}


@pytest.mark.parametrize("name", DEVICES)
def test_devices(name, monkeypatch):
    gpus, local_rank, cfg, text = DEVICES[name]
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: gpus > 0)
    _launched(monkeypatch, local_rank, 8)
    if text:
        with pytest.raises(ConfigError, match=text):
            check_devices(cfg)
    else:
        check_devices(cfg)


@pytest.mark.parametrize(
    ("major", "changes", "dtype"),
    [
        (7, {}, torch.float16),
        (7, {"adapter": None}, torch.float32),
        (7, {"adapter": None, "deepspeed": {"zero_optimization": {"stage": 2}}}, torch.float16),
        (7, {"fp16": False}, torch.float32),
        (7, {"bf16": True, "lora_o_kernel": True}, torch.bfloat16),
        (7, {"merge_lora": True}, torch.bfloat16),
        (8, {}, torch.bfloat16),
    ],
)
def test_auto_precision_by_the_gpu(major, changes, dtype, monkeypatch):
    """A T4 is 7.5: torch says that it has bf16, which axolotl believes, and emulates it."""
    _launched(monkeypatch, None, 1)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(major=major))
    monkeypatch.setattr(torch.cuda, "_check_bf16_tensor_supported", lambda _: True)
    # transformers keeps this answer for the process's life.
    asked = torch.cuda.is_bf16_supported
    monkeypatch.setattr(axolotl_config, "is_torch_bf16_gpu_available", asked)
    values = {"rl": "amopo", "amopo": {"dimensions": ["a"]}, "bf16": "auto", "adapter": "lora"}
    cfg = DictDefault(values | changes)
    take_over(cfg, with_data=False)
    axolotl_config.resolve_dtype(cfg)
    assert cfg.torch_dtype == dtype
    assert (bool(cfg.bf16), bool(cfg.fp16)) == (dtype == torch.bfloat16, dtype == torch.float16)
    touched = major < 8 and not {"merge_lora", "lora_o_kernel"} & changes.keys()
    assert cfg.lora_mlp_kernel is (False if touched else None)


def _launched(monkeypatch, local_rank: str | None, world: int) -> None:
    for name, value in [
        ("LOCAL_RANK", local_rank),
        ("LOCAL_WORLD_SIZE", local_rank and str(world)),
        ("WORLD_SIZE", local_rank and str(world)),
        ("MASTER_ADDR", local_rank and "127.0.0.1"),
    ]:
        if value:
            monkeypatch.setenv(name, value)
        else:
            monkeypatch.delenv(name, raising=False)


def enabled_plugin():
    from axolotl_amopo.plugin import AMoPOPlugin

    plugin = AMoPOPlugin()
    plugin.enabled = True
    return plugin


def run_hook(changes, preprocess=False):
    """The hook that `axolotl train` calls first, with a validated config."""
    cfg = DictDefault({"amopo": {"enabled": True}} | changes)
    assert enabled_plugin().load_datasets(cfg, preprocess=preprocess) is None


# name: (axolotl's keys, the block's, parts of the error's text)
IN_PARTS = {
    "fewer tokens than a sequence": (
        {"sequence_len": 1024},
        {"max_tokens": 1000},
        ["amopo.max_tokens: 1000", "sequence_len, 1024", "write at least 1024"],
    ),
    "fewer tokens than axolotl's default": (
        {"sequence_len": None},
        {"max_tokens": 511},
        ["amopo.max_tokens: 511", "sequence_len, 512"],
    ),
    "fewer tokens than an evaluated sequence": (
        {"eval_sequence_len": "2048"},
        {"max_tokens": 512},
        ["amopo.max_tokens: 512", "eval_sequence_len, 2048"],
    ),
    "an optimizer in the backward pass": (
        {"optimizer": "lomo"},
        {"max_tokens": 512, "one_prompt_at_a_time": True},
        ["optimizer: lomo", "remove amopo.max_tokens and amopo.one_prompt_at_a_time."],
    ),
    "a router's loss": (
        {"overrides_of_model_config": {"output_router_logits": True}},
        {"one_prompt_at_a_time": True},
        ["output_router_logits: true", "remove amopo.one_prompt_at_a_time", "_logits: false}"],
    ),
}
WHOLE = {
    "a sequence per part": ({}, {"max_tokens": 512}),
    "the same, by default": ({"sequence_len": None}, {"max_tokens": 512}),
    "optimizers, whole": ({"optimizer": "lomo"}, {}),
    "optimizers, in parts": ({"optimizer": "galore_adamw"}, {"one_prompt_at_a_time": True}),
    "a router, whole": ({"overrides_of_model_config": {"output_router_logits": True}}, {}),
    "a router without a say": (
        {"overrides_of_model_config": {"output_router_logits": True, "router_aux_loss_coef": 0}},
        {"one_prompt_at_a_time": True},
    ),
}


def values_in_parts(tmp_path, tiny_model, changes, block):
    values = runs.config(tmp_path, tiny_model, DATA, amopo={"dimensions": ["help"]} | block)
    return {key: value for key, value in (values | changes).items() if value is not None}


@pytest.mark.parametrize("name", IN_PARTS)
def test_refused_in_parts(name, tmp_path, tiny_model):
    changes, block, parts = IN_PARTS[name]
    values = values_in_parts(tmp_path, tiny_model, changes, block)
    with_data = {"with_data": False}
    for check in (partial(check_before_launch, **with_data), partial(take_over, **with_data)):
        text = refusal(check, copy.deepcopy(values))
        assert all(part in text for part in parts), text
        assert "\n" not in text


@pytest.mark.parametrize("name", WHOLE)
def test_accepted_in_parts(name, tmp_path, tiny_model):
    changes, block = WHOLE[name]
    check_before_launch(values_in_parts(tmp_path, tiny_model, changes, block), with_data=False)


def test_a_router_of_the_models_own_config(tmp_path):
    """Its config.json asks for the loss; the YAML may say otherwise."""
    MixtralConfig(output_router_logits=True).save_pretrained(tmp_path)
    path = runs.write_config(tmp_path, {})
    cfg = DictDefault(
        base_model=str(tmp_path),
        amopo={"enabled": True, "max_tokens": 512},
        axolotl_config_path=str(path),
    )
    hook = enabled_plugin().pre_model_load
    assert "remove amopo.max_tokens" in refusal(hook, cfg)
    cfg.overrides_of_model_config = {"output_router_logits": False}
    hook(cfg)
    del cfg["overrides_of_model_config"], cfg["amopo"]["max_tokens"]
    hook(cfg)


def test_what_steps_in_the_backward_pass():
    """By name, all of transformers'; whoever adds one must look at it. axolotl's own have none."""
    known = {name.value for name in OptimizerNames}
    found = {name for name in known if steps_in_backward(name)}
    assert found == {name for name in known if "lomo" in name or "layerwise" in name}
    assert len(found) == 6
    assert not any(steps_in_backward(name.value) for name in CustomSupportedOptimizers)


def test_axolotls_default_length():
    assert AxolotlInputConfig.model_fields["sequence_len"].default == SEQUENCE_LEN


def test_sharding_in_a_single_process(monkeypatch):
    _launched(monkeypatch, None, 1)
    text = refusal(run_hook, FSDP)
    assert "fsdp_config: needs one process per GPU" in text
    assert "--launcher torchrun -- --nproc_per_node gpu" in text
    run_hook(FSDP, preprocess=True)
    run_hook({})
    _launched(monkeypatch, "0", 1)
    run_hook(FSDP)


def test_several_gpus_in_a_single_process(tmp_path, tiny_model, monkeypatch):
    """Seen before the data is prepared, and by `axolotl evaluate` before the model is loaded."""
    cfg = runs.load(runs.write_config(tmp_path, runs.config(tmp_path, tiny_model, DATA)))
    hook = PluginManager.get_instance().pre_model_load
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    _launched(monkeypatch, None, 1)
    for check, changed in ((run_hook, {}), (hook, cfg)):
        text = refusal(check, changed)
        assert text.startswith("one process sees 2 GPUs, and can't train on several (device_map:")
        assert "--nproc_per_node gpu" in text and "CUDA_VISIBLE_DEVICES=0" in text
    cfg.merge_lora = True
    hook(cfg)
    del cfg["merge_lora"]
    _launched(monkeypatch, "0", 2)
    run_hook({})
    hook(cfg)
    _launched(monkeypatch, None, 1)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    run_hook({})
    hook(cfg)


def test_sizes_without_fsdp(monkeypatch):
    _launched(monkeypatch, "0", 8)
    assert "dp_shard_size: 8 shards nothing" in refusal(run_hook, {"dp_shard_size": 8})
    assert "dp_replicate_size: 4" in refusal(run_hook, {"dp_replicate_size": 4})
    run_hook({"dp_replicate_size": 8})


@pytest.mark.parametrize("world", [1, 2, 4, 6, 8, 16])
@pytest.mark.parametrize("shard", [None, 1, 2, 3, 8])
@pytest.mark.parametrize("replicate", [None, 1, 2, 4])
def test_sizes_that_make_up_the_processes(world, shard, replicate, monkeypatch):
    """Refused where axolotl's mesh or accelerate's, once the model is loaded, fails, only there."""
    possible = True
    try:
        _get_parallel_config_kwargs(
            world, is_fsdp=True, dp_shard_size=shard, dp_replicate_size=replicate
        )
        # axolotl tells accelerate of the sizes that are written and above 1, if there are any.
        if (shard or 1) * (replicate or 1) > 1:
            accelerator = SimpleNamespace(num_processes=world, multi_device=True, is_fsdp2=True)
            config = ParallelismConfig(dp_shard_size=shard or 1, dp_replicate_size=replicate or 1)
            config._validate_accelerator(accelerator)
            possible = config.dp_shard_enabled  # axolotl takes this question out of the above
    except ValueError:
        possible = False
    _launched(monkeypatch, "0", world)
    changes = FSDP | {"dp_shard_size": shard, "dp_replicate_size": replicate}
    if possible:
        run_hook(changes)
    else:
        assert f"the {world} processes of this run" in refusal(run_hook, changes)


def test_layers_of_another_model(tmp_path, tiny_model):
    """From the config alone, with no weights there, right before they would be loaded."""
    values = runs.config(tmp_path, tiny_model, DATA) | {
        "fsdp_config": {"transformer_layer_cls_to_wrap": "Qwen2DecoderLayer"}
    }
    cfg = runs.load(runs.write_config(tmp_path, values))
    text = refusal(PluginManager.get_instance().pre_model_load, cfg)
    assert "LlamaForCausalLM has no layer 'Qwen2DecoderLayer'" in text
    assert "Did you mean 'LlamaDecoderLayer'?" in text
    for right in ("LlamaDecoderLayer", "LlamaAttention,LlamaMLP"):
        cfg.fsdp_config.transformer_layer_cls_to_wrap = right
        check_layers(cfg)
    assert "'LlamaMLPs'" in refusal(
        check_layers,
        DictDefault(
            {
                "base_model": str(tiny_model),
                "fsdp_config": {"transformer_layer_cls_to_wrap": "LlamaMLP,LlamaMLPs"},
            }
        ),
    )


# Why: where one of these fails, a library has mended it, and the refusal can go.


def test_bitsandbytes_takes_no_sharded_tensor():
    known = trainer_optimizer._BITSANDBYTES_OPTIMIZERS
    assert {name.value for name in known} == BITSANDBYTES | {"adamw_8bit", "adamw_bnb_8bit"}
    layer = torch.nn.Linear(8, 8)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        fully_shard(layer, mesh=init_device_mesh("cpu", (1,)))
        layer(torch.ones(1, 8)).sum().backward()
        with pytest.raises((RuntimeError, NotImplementedError), match="bitsandbytes"):
            PagedAdamW8bit(layer.parameters()).step()
    finally:
        dist.destroy_process_group()


def test_fsdp2_has_no_local_state_dict():
    with pytest.raises(ValueError, match="FSDP2 does not support LOCAL_STATE_DICT"):
        FullyShardedDataParallelPlugin(fsdp_version=2, state_dict_type="LOCAL_STATE_DICT")


def test_transformers_wants_the_same_values_of_deepspeed():
    settings = HfTrainerDeepSpeedConfig(ZERO3 | {"gradient_clipping": 1.0})
    settings.fill_match("gradient_clipping", 3.0, "max_grad_norm")
    settings.fill_match("bf16.enabled", False, "bf16")
    assert len(settings.mismatches) == 2
