"""The head: log-probabilities of chosen tokens without the logits."""

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from axolotl_amopo.model import forward as logprobs
from axolotl_amopo.model.forward import LinearLogps, gather_logps, prepare_model

TOKENS, HIDDEN, VOCABULARY = 37, 16, 101


@pytest.fixture(params=[2**40, 1000], ids=["one chunk", "many chunks"])
def chunk_bytes(request, monkeypatch):
    monkeypatch.setattr(logprobs, "CHUNK_BYTES", request.param)


@pytest.fixture(params=[2**40, 0], ids=["softmax kept", "made again"], autouse=True)
def kept_bytes(request, monkeypatch):
    monkeypatch.setattr(logprobs, "KEPT_BYTES", request.param)


def inputs(dtype=torch.float32, bias=False):
    torch.manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN).to(dtype).requires_grad_()
    weight = torch.randn(VOCABULARY, HIDDEN).to(dtype).requires_grad_()
    shift = torch.randn(VOCABULARY).to(dtype).requires_grad_() if bias else None
    return hidden, weight, shift, torch.randint(VOCABULARY, (TOKENS,))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.3, None), (1.0, 5.0), (2.0, 5.0)])
def test_values_and_gradients(scale, softcap, bias, chunk_bytes):
    hidden, weight, shift, targets = inputs(bias=bias)
    incoming = torch.randn(TOKENS)
    leaves = [leaf for leaf in (hidden, weight, shift) if leaf is not None]
    logits = nn.functional.linear(hidden, weight, shift) * scale
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    slow = logits.log_softmax(-1)[torch.arange(TOKENS), targets]
    ours = LinearLogps.apply(hidden, weight, shift, targets, scale, softcap)
    torch.testing.assert_close(ours, slow, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        gather_logps(
            nn.functional.linear(hidden, weight, shift), targets, scale=scale, softcap=softcap
        ),
        slow,
    )
    expected = torch.autograd.grad(slow, leaves, incoming)
    for got, wanted in zip(torch.autograd.grad(ours, leaves, incoming), expected, strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


def test_a_large_vocabulary_is_summed_exactly():
    """torch's float32 log_softmax on a CPU is off by 3e-5 here."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-8, 9, (152_000, 1), generator=generator) / 4
    hidden, targets = torch.ones(8, 1), torch.arange(8)
    exact = (hidden.double() @ weight.double().t()).log_softmax(-1)[targets, targets]
    ours = LinearLogps.apply(hidden.requires_grad_(), weight, None, targets, 1.0, None)
    assert (ours - exact).abs().max() < 4e-6


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
    model = LlamaForCausalLM(config)
    slow_model = copy.deepcopy(model)
    prepare_model(model)
    prepare_model(model)  # again changes nothing
    input_ids = torch.randint(VOCABULARY, (2, 9))
    predict_M, targets_M = torch.tensor([0, 3, 3, 12]), torch.tensor([5, 6, 7, 8])
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        ours = model(input_ids=input_ids, predict_M=predict_M, targets_M=targets_M)
        logits = slow_model(input_ids=input_ids).logits.flatten(0, 1)[predict_M]
    slow = logits.float().log_softmax(-1)[torch.arange(4), targets_M]
    assert ours.dtype == torch.float32
    tolerance = {"atol": 0.02, "rtol": 0.02} if autocast else {"atol": 1e-6, "rtol": 1e-5}
    torch.testing.assert_close(ours, slow, **tolerance)
    ours.sum().backward()
    slow.sum().backward()
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    for got, wanted in zip(model.parameters(), slow_model.parameters(), strict=True):
        assert got.grad.dtype == torch.float32
        error = (got.grad - wanted.grad).norm() / wanted.grad.norm()
        assert error < (0.03 if autocast else 1e-5)


PEAK = """
import torch
from axolotl_amopo.model.forward import LinearLogps

def peak():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024

torch.set_num_threads(2)
hidden = torch.randn(8 * 512, 64, requires_grad=True)
weight = torch.randn(152_000, 64, requires_grad={trained})
targets = torch.randint(152_000, (8 * 512,))
LinearLogps.apply(hidden[:2], weight, None, targets[:2], 1.0, None).sum().backward()
before = peak()
logps = LinearLogps.apply(hidden, weight, None, targets, 1.0, None)
logps.sum().backward()
print(peak() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
@pytest.mark.parametrize("kept_bytes", [0], indirect=True)  # too large to be kept, by itself
@pytest.mark.parametrize(("trained", "most"), [(False, 170), (True, 220)])
def test_memory_of_a_large_vocabulary(trained, most):
    """8 x 512 response tokens and 152,000 tokens: full float32 logits would take 2.4 GB. One chunk
    of them is 128 MiB, the head's gradient 37."""
    script = PEAK.format(trained=trained)
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=300
    )
    assert 100 < float(done.stdout) < most  # MiB; below 100 the measurement would be broken
