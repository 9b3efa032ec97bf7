"""The head: log-probabilities of chosen tokens without the logits.

What must be the same number is computed in float64, see `test_layouts`; float32 and bfloat16 are
held to what their rounding is known to cost.
"""

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from axolotl_amopo.model import head as logprobs
from axolotl_amopo.model.forward import teach
from axolotl_amopo.model.head import LinearLogps, gather_logps

TOKENS, HIDDEN, VOCABULARY = 37, 16, 101
EXACT = {"rtol": 1e-9, "atol": 1e-9}


@pytest.fixture(params=[2**40, 1000], ids=["one chunk", "many chunks"])
def chunk_bytes(request, monkeypatch):
    monkeypatch.setattr(logprobs, "CHUNK_BYTES", request.param)


@pytest.fixture(params=[2**40, 0], ids=["softmax kept", "made again"], autouse=True)
def kept_bytes(request, monkeypatch):
    monkeypatch.setattr(logprobs, "KEPT_BYTES", request.param)


def inputs(dtype=torch.float64, bias=False):
    torch.manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN).to(dtype).requires_grad_()
    weight = torch.randn(VOCABULARY, HIDDEN).to(dtype).requires_grad_()
    shift = torch.randn(VOCABULARY).to(dtype).requires_grad_() if bias else None
    return hidden, weight, shift, torch.randint(VOCABULARY, (TOKENS,))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.3, None), (1.0, 5.0), (2.0, 5.0)])
def test_values_and_gradients(scale, softcap, bias, chunk_bytes):
    hidden, weight, shift, targets = inputs(bias=bias)
    incoming = torch.randn(TOKENS, dtype=torch.float64)
    leaves = [leaf for leaf in (hidden, weight, shift) if leaf is not None]
    logits = nn.functional.linear(hidden, weight, shift) * scale
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    slow = logits.log_softmax(-1)[torch.arange(TOKENS), targets]
    ours = LinearLogps.apply(hidden, weight, shift, targets, scale, softcap)
    torch.testing.assert_close(ours, slow, **EXACT)
    logits = nn.functional.linear(hidden, weight, shift)
    gathered = gather_logps(logits, targets, scale=scale, softcap=softcap)
    torch.testing.assert_close(gathered, slow, **EXACT)
    expected = torch.autograd.grad(slow, leaves, incoming)
    for got, wanted in zip(torch.autograd.grad(ours, leaves, incoming), expected, strict=True):
        torch.testing.assert_close(got, wanted, **EXACT)


def test_a_large_vocabulary_is_summed_exactly():
    """torch's float32 log_softmax on a CPU is off by 3e-5 here, where a float32 is to 1e-6."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-8, 9, (152_000, 1), generator=generator) / 4
    hidden, targets = torch.ones(8, 1), torch.arange(8)
    exact = (hidden.double() @ weight.double().t()).log_softmax(-1)[targets, targets]
    ours = LinearLogps.apply(hidden.requires_grad_(), weight, None, targets, 1.0, None)
    assert (ours - exact).abs().max() < 3e-6


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_only_what_is_trained_gets_a_gradient(frozen, chunk_bytes):
    hidden, weight, _, targets = inputs()
    {"hidden": hidden, "weight": weight}[frozen].requires_grad_(False)
    LinearLogps.apply(hidden, weight, None, targets, 1.0, None).sum().backward()
    assert (hidden.grad is None) == (frozen == "hidden")
    assert (weight.grad is None) == (frozen == "weight")


def test_half_precision_is_summed_in_float32(chunk_bytes):
    """No further from exact than the rounding of the inputs and of the logits."""
    hidden, weight, _, targets = inputs(torch.bfloat16)
    exact = (hidden.double() @ weight.double().t()).log_softmax(-1)
    exact = exact[torch.arange(TOKENS), targets]
    ours = LinearLogps.apply(hidden, weight, None, targets, 1.0, None)
    assert ours.dtype == torch.float32
    assert (ours - exact).abs().mean() < 2**-8 * exact.abs().max()
    wanted = torch.autograd.grad(exact.sum(), [hidden, weight])
    for got, exact_gradient in zip(
        torch.autograd.grad(ours.sum(), [hidden, weight]), wanted, strict=True
    ):
        assert got.dtype == torch.bfloat16
        error = (got.double() - exact_gradient.double()).norm() / exact_gradient.double().norm()
        assert error < 0.02


def test_extreme_logits_stay_finite(chunk_bytes):
    hidden, weight, _, targets = inputs()
    logps = LinearLogps.apply(hidden * 1e4, weight, None, targets, 1.0, None)
    assert logps.isfinite().all()
    assert logps.min() < -1e4
    logps.sum().backward()
    assert hidden.grad.isfinite().all()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_models_head(tied, autocast):
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=tied,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    if not autocast:
        model.double()
    slow_model = copy.deepcopy(model)
    teach(model)
    teach(model)  # again changes nothing
    input_ids = torch.randint(VOCABULARY, (2, 9))
    predict_M, targets_M = torch.tensor([0, 3, 3, 12]), torch.tensor([5, 6, 7, 8])
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        ours, _ = model(input_ids=input_ids, predict_M=predict_M, targets_M=targets_M)
        logits = slow_model(input_ids=input_ids).logits.flatten(0, 1)[predict_M]
    slow = logits.to(ours.dtype).log_softmax(-1)[torch.arange(4), targets_M]
    assert ours.dtype == (torch.float32 if autocast else torch.float64)
    ours.sum().backward()
    slow.sum().backward()
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    for got, wanted in zip(
        [ours, *(p.grad for p in model.parameters())],
        [slow, *(p.grad for p in slow_model.parameters())],
        strict=True,
    ):
        assert got.dtype == ours.dtype  # the weights' own, for gradients
        error = (got - wanted).norm() / wanted.norm()
        # bfloat16 has 8 bits, a rounding of 0.002 per number.
        assert error < (0.03 if autocast else 1e-9)


PEAK = """
import torch
from axolotl_amopo.model import head

def memory(name):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024

torch.set_num_threads(2)
head.KEPT_BYTES = 0  # as for more tokens than there are here
hidden = torch.randn(512, 64, requires_grad=True)
weight = torch.randn(152_000, 64)
targets = torch.randint(152_000, (512,))
head.LinearLogps.apply(hidden[:2], weight, None, targets[:2], 1.0, None).sum().backward()
before = memory("VmRSS")
for trained in (False, True):
    weight.requires_grad_(trained)
    head.LinearLogps.apply(hidden, weight, None, targets, 1.0, None).sum().backward()
    print(memory("VmHWM") - before)  # the second is the higher one
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
@pytest.mark.parametrize("kept_bytes", [0], indirect=True)  # once; the script says it itself
def test_memory_of_a_large_vocabulary(kept_bytes):
    """512 response tokens and 152,000 tokens: full float32 logits would take 297 MiB. One chunk of
    them is 128 MiB, the gradient of a head that is trained 37."""
    done = subprocess.run(
        [sys.executable, "-c", PEAK], capture_output=True, text=True, check=True, timeout=600
    )
    print(done.stdout)
    frozen, trained = map(float, done.stdout.split())  # MiB
    chunk, gradient = 128, 152_000 * 64 * 4 / 2**20
    # Half a chunk of room: a second copy of one would be too much, and less than one can't be.
    assert 0.75 * chunk < frozen < 1.5 * chunk
    assert frozen < trained < 1.5 * chunk + gradient
