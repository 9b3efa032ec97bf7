"""axolotl's accelerators train the same model as plain code: after real runs, the weights agree.

What needs CUDA can't run here; of Triton's kernels, those that its interpreter takes. What can is
the code around them, and whatever patches a model: that it is in place, and that the loss still
goes through it (or past it). docs/performance.md lists what waits for a GPU.
"""

import json
import math
import os
import sys
from unittest import mock

import pytest
import runs
import torch
import transformers.loss.loss_utils as loss_utils
import transformers.modeling_utils as modeling_utils
from accelerate import Accelerator
from axolotl.integrations.base import PluginManager
from axolotl.kernels import lora as lora_kernels
from axolotl.kernels import swiglu
from safetensors.torch import load_file
from torch._dynamo.utils import counters
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaForCausalLM

from axolotl_amopo.errors import ConfigError

STEPS = 3
CHECKPOINTING = {"gradient_checkpointing": True}
REENTRANT = CHECKPOINTING | {"gradient_checkpointing_kwargs": {"use_reentrant": True}}
LIGER = {"plugins": ["axolotl.integrations.liger.LigerPlugin"]}
# What axolotl and its plugins replace in this process, for good.
PATCHED = [
    (LlamaForCausalLM, "forward"),
    (LlamaAttention, "forward"),
    (modeling_llama, "apply_rotary_pos_emb"),
    (modeling_llama, "LlamaRMSNorm"),
    (modeling_llama, "LlamaMLP"),
    (modeling_utils, "checkpoint"),
    (loss_utils, "ForCausalLMLoss"),
    (torch.nn.functional, "cross_entropy"),
]


@pytest.fixture
def restored(monkeypatch):
    """Puts back what a run patches, so that no other test trains with it."""
    for holder, name in PATCHED:
        monkeypatch.setattr(holder, name, getattr(holder, name))
    monkeypatch.setitem(
        loss_utils.LOSS_MAPPING, "ForCausalLM", loss_utils.LOSS_MAPPING["ForCausalLM"]
    )
    # axolotl tells accelerate to compile through the environment, and Dynamo to go on if it can't.
    with (
        mock.patch.dict(os.environ),
        torch._dynamo.config.patch(suppress_errors=False, accumulated_cache_size_limit=256),
    ):
        yield monkeypatch
    if "_original_forward" in vars(LlamaAttention):  # axolotl's note that it is patched
        del LlamaAttention._original_forward
    PluginManager.get_instance().plugins.clear()


@pytest.fixture(scope="module")
def train(tmp_path_factory, tiny_model):
    """Trains on the quickstart's pairs, with plain SGD, and returns the trainer."""
    prepared = tmp_path_factory.mktemp("prepared")

    def run(**changes):
        folder = tmp_path_factory.mktemp("run")
        settings = {
            "amopo": {"dimensions": ["helpfulness"], "weighting": "mean", "pairs": "best_worst"},
            "dataset_prepared_path": str(prepared),
            "max_steps": STEPS,
            "optimizer": "sgd",
            "learning_rate": 1.0,
            "max_grad_norm": 0.0,
        } | changes
        data = runs.QUICKSTART / "train.jsonl"
        values = runs.config(folder, tiny_model, data, **settings)
        return runs.train(runs.write_config(folder, values))

    return run


@pytest.fixture(scope="module")
def moved(tiny_model):
    """How far training moved each weight. LoRA's A start at random, its B at zero: only those."""
    before = load_file(tiny_model / "model.safetensors")

    def change(trainer):
        weights = {
            name.replace("_checkpoint_wrapped_module.", ""): weight.detach()
            for name, weight in trainer.model.named_parameters()
            if weight.requires_grad and "lora_A" not in name
        }
        return {name: weight - before.get(name, 0) for name, weight in weights.items()}

    return change


@pytest.fixture(scope="module")
def same(train, moved):
    """Asserts that a run did what plain full fine-tuning, or LoRA, does."""
    plain = {"full": moved(train()), "lora": moved(train(**runs.LORA))}

    def compare(trainer, method="full", tolerance=1e-3):
        changes = moved(trainer)
        assert changes.keys() == plain[method].keys()
        for name, expected in plain[method].items():
            assert expected.norm() > 1e-6, name
            assert (changes[name] - expected).norm() < tolerance * expected.norm(), name

    return compare


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("changes", [CHECKPOINTING, REENTRANT], ids=["", "reentrant"])
def test_gradient_checkpointing(method, changes, train, same):
    trainer = train(**changes, **(runs.LORA if method == "lora" else {}))
    assert trainer.model.is_gradient_checkpointing
    assert trainer.args.gradient_checkpointing_kwargs == {"use_reentrant": changes is REENTRANT}
    same(trainer, method)


@pytest.mark.parametrize(
    "changes",
    [
        {"selective_checkpointing": True},
        {"activation_offloading": "hidden_states"},
        {"activation_offloading": "legacy"},
    ],
    ids=lambda changes: "-".join(f"{key}-{value}" for key, value in changes.items()),
)
def test_what_builds_on_checkpointing(changes, train, same, restored):
    """Offloading needs a GPU to save anything, but these run, and compute the same, without."""
    trainer = train(**CHECKPOINTING, **changes)
    assert trainer.args.activation_offloading == changes.get("activation_offloading")
    same(trainer)


def test_fused_lora_kernels(train, same, restored):
    """axolotl's own autograd functions for attention and MLP, with torch in place of Triton."""

    def forward(gate, up):
        return torch.nn.functional.silu(gate) * up

    def backward(grad, gate, up):
        sigmoid = gate.sigmoid()
        active = gate * sigmoid
        grad_gate = grad * up * sigmoid * (1 + gate * (1 - sigmoid))
        return active * up, grad_gate, grad * active

    restored.setattr(swiglu, "swiglu_forward", forward)
    restored.setattr(swiglu, "swiglu_backward", backward)
    parts = ("mlp", "qkv", "o", "embedding")
    trainer = train(**runs.LORA, **{f"lora_{part}_kernel": True for part in parts})

    layer = trainer.model.get_base_model().model.layers[0]
    assert layer.self_attn.apply_qkv.__func__ is lora_kernels.apply_lora_qkv
    assert layer.self_attn.apply_o.__func__ is lora_kernels.apply_lora_o
    assert layer.mlp.forward.__func__ is lora_kernels.apply_lora_mlp_swiglu
    same(trainer, "lora")


def test_triton_kernels_in_its_interpreter(tmp_path):
    """Liger's rotary embedding, and axolotl's LoRA functions with their own SwiGLU kernels."""
    worker = runs.ROOT / "tests" / "triton_worker.py"
    done = runs.command(sys.executable, str(worker), cwd=tmp_path, TRITON_INTERPRET="1")
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == 4
    for name, differences in found.items():
        assert max(differences) < 1e-5, name


def test_fp16_with_gradient_scaling(train, same, monkeypatch):
    """As on a T4, which has no bf16; accelerate turns neither autocast nor scaling on on a CPU."""
    plain, scalers = Accelerator.__init__, []

    def on_a_gpu(self, *args, **options):
        plain(self, *args, **options)
        if self.mixed_precision == "fp16":
            self.native_amp, self.scaler = True, torch.amp.GradScaler("cpu")
            scalers.append(self.scaler)

    monkeypatch.setattr(Accelerator, "__init__", on_a_gpu)
    trainer = train(**runs.LORA, fp16=True)
    assert trainer.model.dtype == torch.float16
    assert trainer.choice.layout == "packed" and not trainer.choice.why_own_logits
    assert all(math.isfinite(loss) for loss in runs.losses(trainer))
    (scaler,) = scalers
    assert scaler.get_scale() == 2.0**16  # less, once a step has been skipped
    same(trainer, "lora", tolerance=5e-3)


@pytest.mark.parametrize("changes", [{}, runs.LORA | {"peft_autocast_adapter_dtype": False}])
def test_weights_in_fp16_are_not_trained(changes, train):
    with pytest.raises(ConfigError, match="fp16: true trains adapters alone"):
        train(**changes, fp16=True)
    weight = torch.nn.Parameter(torch.ones(1, dtype=torch.float16))
    optimizer, scaler = torch.optim.SGD([weight]), torch.amp.GradScaler("cpu")
    scaler.scale(weight.sum()).backward()
    with pytest.raises(ValueError, match="unscale FP16 gradients"):
        scaler.unscale_(optimizer)


def test_torch_compile(train, same, restored):
    """Few graphs for batches of all lengths; compiled by the backend that only traces."""
    torch._dynamo.reset()
    counters.clear()
    trainer = train(torch_compile=True, torch_compile_backend="eager")
    assert 1 <= counters["stats"]["unique_graphs"] <= 6
    same(trainer)


@pytest.mark.parametrize(
    "changes",
    [
        LIGER | {"liger_fused_linear_cross_entropy": True},
        LIGER | {"liger_cross_entropy": True},
        {"chunked_cross_entropy": True},
    ],
    ids=lambda changes: [*changes][-1],
)
def test_losses_of_others_have_no_effect(changes, train, same, restored):
    before = [LlamaForCausalLM.forward, torch.nn.functional.cross_entropy]
    before.append(loss_utils.LOSS_MAPPING["ForCausalLM"])
    trainer = train(**changes)
    after = [LlamaForCausalLM.forward, torch.nn.functional.cross_entropy]
    after.append(loss_utils.LOSS_MAPPING["ForCausalLM"])
    assert before != after, "nothing was patched"
    same(trainer)


@pytest.mark.parametrize(
    "changes",
    [CHECKPOINTING | {"activation_offloading": True}, {"gradient_checkpointing": "offload"}],
    ids=["", "old name"],
)
def test_what_needs_a_gpu_is_off_without_one(changes, train, same, restored, caplog):
    kernels = ["liger_rms_norm", "liger_rope", "liger_glu_activation"]
    with caplog.at_level("WARNING"):
        trainer = train(**LIGER, **changes, **dict.fromkeys(kernels, True))
    line = next(line for line in caplog.messages if "No GPU here" in line)
    assert all(name in line for name in [*kernels, "offloading"])
    assert trainer.model.is_gradient_checkpointing
    same(trainer)


def test_tiled_mlp_is_refused_for_a_reason():
    """Where this fails, axolotl has mended it, and `tiled_mlp` can go with rl: amopo."""
    from axolotl.monkeypatch.tiled_mlp.base import TiledMLP

    def gradient(rows, tiled):
        torch.manual_seed(0)
        layer, values = torch.nn.Linear(4, 4), torch.randn(rows, 6, 4, requires_grad=True)
        out = layer(values)
        if tiled:
            parameters = list(layer.parameters())
            out = TiledMLP.apply(lambda mlp, x: mlp(x), layer, values, 2, parameters)
        (out * torch.randn(rows, 6, 4)).sum().backward()
        return layer.weight.grad

    assert torch.allclose(gradient(1, True), gradient(1, False), atol=1e-5)
    assert not torch.allclose(gradient(2, True), gradient(2, False), atol=1e-2)


@pytest.mark.parametrize(
    "changes",
    [
        {"pad_to_sequence_len": True, "attn_implementation": "eager"},
        {"include_tkps": True, "include_tokens_per_second": True},
        {"dataloader_num_workers": 1, "dataloader_prefetch_factor": 2},
    ],
    ids=["padding", "counting", "data loading"],
)
def test_the_same_otherwise(changes, train, same):
    same(train(**changes))


def test_neftune_is_noise_in_training_alone(train):
    heldout = {"path": str(runs.QUICKSTART / "heldout.jsonl"), "type": "amopo.rated"}
    changes = {
        "test_datasets": [heldout | {"scale": [1, 5]}],
        "val_set_size": None,
        "eval_steps": STEPS,
        "eval_on_start": False,
        "learning_rate": 0.0,
    }
    quiet, noisy = (train(**changes, neftune_noise_alpha=alpha) for alpha in (None, 5.0))
    assert all(
        abs(a - b) > 1e-4 for a, b in zip(runs.losses(quiet), runs.losses(noisy), strict=True)
    )
    quiet, noisy = (
        [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
        for trainer in (quiet, noisy)
    )
    assert quiet == pytest.approx(noisy, abs=1e-6)
    assert len(quiet) == 1
