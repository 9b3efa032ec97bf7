"""`TRITON_INTERPRET=1 triton_worker.py`: real Triton kernels under our forward, without a GPU.

Triton's interpreter runs a kernel's Python line by line, on CPU tensors; it must be on before
Triton is imported, so in a process of its own. Prints, per kernel and layout, how far the
log-probabilities (nats) and the gradients (largest relative norm of a difference) are from those
of the same model without it.

A kernel's own code runs, at other tiles and speeds than on a GPU: what compiling it, or launching
it there, makes of it stays unseen.
"""

import json
from typing import Any

import torch
from axolotl.kernels import swiglu
from axolotl.monkeypatch import lora_kernels
from axolotl.utils.dict import DictDefault
from liger_kernel.transformers import apply_liger_kernel_to_llama
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama import modeling_llama
from triton.runtime.interpreter import InterpretedFunction

from axolotl_amopo.example import pair
from axolotl_amopo.model.attention import PACKED_SDPA
from axolotl_amopo.model.batch import make_batch
from axolotl_amopo.model.forward import causal_model, response_logps, teach

LAYOUTS = ("tree", "packed")
PROMPTS = [[5, 6, 7, 8, 9], [5, 6, 1, 2, 3, 4]]
BATCH = make_batch([pair(PROMPTS, [[10, 11, 12], [13, 14]])] * 2, pad_to_multiple_of=8)
# Liger's other kernels take floats as arguments, which the interpreter (Triton 3.8) can't hand on.
ROPE_ALONE = dict.fromkeys(
    ("rms_norm", "swiglu", "cross_entropy", "fused_linear_cross_entropy"), False
)


class OnCPU:
    """Stand in for `torch` in axolotl's swiglu.py, whose forward makes its output on "cuda"."""

    made = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def empty(self, *size: Any, **options: Any) -> Tensor:
        OnCPU.made += 1
        return torch.empty(*size, **options | {"device": "cpu"})


def llama(layout: str, lora: bool = False) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads))
    if lora:
        model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
        for name, weight in model.named_parameters():
            if "lora_B" in name:  # zero, which would hide what A does
                nn.init.normal_(weight, std=0.1)
    if layout == "packed":
        causal_model(model).set_attn_implementation(PACKED_SDPA)
    return model


def step(model: nn.Module, layout: str) -> tuple[Tensor, dict[str, Tensor]]:
    teach(model)
    logps, *_ = response_logps(model, BATCH, layout)
    logps.square().sum().backward()
    return logps.detach(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


def compare(one: tuple, other: tuple) -> list[float]:
    grads = [((one[1][n] - g).norm() / g.norm()).item() for n, g in other[1].items()]
    return [(one[0] - other[0]).abs().max().item(), max(grads)]


def main() -> None:
    plain = {layout: step(llama(layout), layout) for layout in LAYOUTS}
    plain_lora = {layout: step(llama(layout, lora=True), layout) for layout in LAYOUTS}

    rotate = modeling_llama.apply_rotary_pos_emb
    apply_liger_kernel_to_llama(rope=True, **ROPE_ALONE)
    assert modeling_llama.apply_rotary_pos_emb is not rotate
    found = {f"rope {at}": compare(step(llama(at), at), plain[at]) for at in LAYOUTS}
    modeling_llama.apply_rotary_pos_emb = rotate

    assert isinstance(swiglu._swiglu_fwd_kernel, InterpretedFunction)
    swiglu.torch = OnCPU()
    flags = [f"lora_{part}_kernel" for part in ("mlp", "qkv", "o")]
    cfg = DictDefault(dict.fromkeys(flags, True))
    lora_kernels.get_attention_cls_from_config = lambda _: modeling_llama.LlamaAttention
    lora_kernels.patch_self_attn_lora(cfg)
    for layout in LAYOUTS:
        model = lora_kernels.apply_lora_kernel_patches(llama(layout, lora=True), cfg)
        found[f"lora {layout}"] = compare(step(model, layout), plain_lora[layout])
    assert OnCPU.made == 2 * len(LAYOUTS)  # once per layer and forward
    print(json.dumps(found))


if __name__ == "__main__":
    main()
