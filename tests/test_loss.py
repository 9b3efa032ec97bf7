"""The method: against the published computation, against SimPO, and by hand."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from trl.experimental.cpo import CPOTrainer

from axolotl_amopo.loss import MIN_LOGP, WEIGHTINGS, amopo_loss, response_stats

PROMPTS = 4  # of the golden cases
# Rounding of float64 on numbers of about 1 is a million times smaller.
EXACT = {"rtol": 1e-9, "atol": 1e-9}


def published(case):
    """The published computation, from its description (DESIGN.md, section 2), in its own order:
    rows are prompt by prompt, chosen before rejected, then example by example.

    Returns what each row, each pair and the batch come to. Its loss is a mean over all rows, and
    so a quarter of ours with four prompts; its softmax runs over the examples of a batch too.
    """
    labels = case["labels"][:, 1:]
    mask = labels != -100
    logps = case["logits"][:, :-1].log_softmax(-1)
    logps = logps.gather(-1, labels.masked_fill(~mask, 0).unsqueeze(-1)).squeeze(-1)
    averages = (logps * mask).sum(-1) / mask.sum(-1)
    probs = [row[kept].detach().exp() for row, kept in zip(logps, mask, strict=True)]
    means = torch.stack([row.mean() for row in probs])
    stds = torch.stack([row.std() for row in probs])
    scores = means + case["z"] * stds
    # [prompt, side, example]
    by_side = [values.view(PROMPTS, 2, -1) for values in (averages, scores)]
    chosen, rejected = by_side[0].unbind(1)
    losses = -F.logsigmoid(case["beta"] * (chosen - rejected) - case["gamma"])
    weights = by_side[1].sum(1).flatten().softmax(0).view_as(losses)
    return {
        "avg_logp": averages,
        "mean": means,
        "std": stds,
        "sample": scores,
        "pair_losses": losses,
        "loss": (weights * losses).mean(),
    }


def made_up(seed, batch=1):
    """A case of random numbers."""
    random = torch.Generator().manual_seed(seed)
    rows, tokens, vocabulary = 2 * PROMPTS * batch, 9, 11
    lengths = torch.randint(2, tokens, (rows, 1), generator=random)
    labels = torch.randint(vocabulary, (rows, tokens), generator=random)
    return {
        "batch": batch,
        "logits": 3 * torch.randn(rows, tokens, vocabulary, generator=random).double(),
        "labels": labels.masked_fill(torch.arange(tokens) < tokens - lengths, -100),
        "beta": 0.1 + 2 * torch.rand((), generator=random).item(),
        "gamma": 2 * torch.rand((), generator=random).item(),
        "z": torch.randn(rows, generator=random).double(),
    }


def golden_cases(shared):
    """Cases that the published code has computed, with what it gave; the rows of the draws are
    recorded for the chosen ones first."""
    recorded = json.loads((shared / "golden" / "reference_cases.json").read_text())
    for case in recorded:
        made = {name: case[name] for name in ("batch", "beta", "gamma")}
        made["logits"] = torch.tensor(case["logits"], dtype=torch.float64)
        made["labels"] = torch.tensor(case["labels"])
        expected = case["expected"]
        draws = {
            name: torch.tensor([draw[name] for draw in expected["draws"]], dtype=torch.float64)
            .view(2, PROMPTS, -1)
            .transpose(0, 1)
            .flatten()
            for name in ("mean", "std", "z", "sample")
        }
        made["z"] = draws.pop("z")
        yield made, expected | draws


def by_example(values, batch):
    """Rows as published -> [B, K, 2, ...]."""
    return values.view(PROMPTS, 2, batch, *values.shape[1:]).movedim(2, 0)


def ours(case):
    labels = case["labels"][:, 1:]
    logps = case["logits"][:, :-1].log_softmax(-1)
    logps = logps.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    logps, mask, noise = (
        by_example(values, case["batch"]) for values in (logps, labels != -100, case["z"])
    )
    return amopo_loss(logps, mask, beta=case["beta"], gamma=case["gamma"], noise=noise)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("seed", range(3))
def test_equals_the_published_computation(seed, batch):
    case = made_up(seed, batch)
    inputs = [case["logits"].clone().requires_grad_() for _ in range(2)]
    wanted, result = published(case | {"logits": inputs[0]}), ours(case | {"logits": inputs[1]})
    stats = result.stats
    for name, values in zip(
        ("avg_logp", "mean", "std"), (stats.avg_logp, stats.prob_mean, stats.prob_std), strict=True
    ):
        torch.testing.assert_close(values, by_example(wanted[name], batch), **EXACT)
    torch.testing.assert_close(result.pair_losses.t(), wanted["pair_losses"], **EXACT)
    scores = by_example(wanted["sample"], batch).sum(-1)
    torch.testing.assert_close(result.weights, scores.softmax(-1), **EXACT)
    if batch == 1:
        torch.testing.assert_close(result.loss, 4 * wanted["loss"], **EXACT)
        (result.loss / 4).backward()
        wanted["loss"].backward()
        torch.testing.assert_close(inputs[1].grad, inputs[0].grad, **EXACT)


def test_equals_what_the_published_code_gave(shared):
    """Which was in float32, and is recorded: what it is off by is the same on any machine."""
    close = {"rtol": 1e-5, "atol": 1e-5}
    for case, recorded in golden_cases(shared):
        logits = case["logits"].requires_grad_()
        made = published(case)
        for name in ("avg_logp", "mean", "std", "sample"):
            value = torch.as_tensor(recorded[name], dtype=torch.float64)
            torch.testing.assert_close(made[name], value, **close)
        result = ours(case)
        torch.testing.assert_close(result.pair_losses.t(), made["pair_losses"], **EXACT)
        assert made["loss"].item() == pytest.approx(recorded["loss"], rel=1e-5)
        if case["batch"] == 1:
            assert result.loss.item() == pytest.approx(4 * recorded["loss"], rel=1e-5)
            (result.loss / 4).backward()
            grad = logits.grad
            assert grad.norm().item() == pytest.approx(recorded["grad_norm"], rel=1e-5)
            assert grad.abs().sum().item() == pytest.approx(recorded["grad_sum_abs"], rel=1e-5)


def test_one_dimension_is_simpo():
    """TRL's own SimPO loss on the same log-probabilities, value and gradient."""
    torch.manual_seed(0)
    beta, gamma = 2.5, 1.4
    logps = -3 * torch.rand(6, 1, 2, 9).double()
    mask = torch.arange(9) < torch.randint(1, 10, (6, 1, 2, 1))
    ours_in, theirs_in = (logps.clone().requires_grad_() for _ in range(2))
    ours = amopo_loss(ours_in, mask, beta=beta, gamma=gamma, weighting="uniform").loss

    trainer = CPOTrainer.__new__(CPOTrainer)  # its loss needs nothing else of the trainer
    trainer.loss_type, trainer.beta, trainer.label_smoothing = "simpo", beta, 0.0
    trainer.simpo_gamma, trainer.alpha = gamma, 0.0
    trainer.accelerator = type("OnCpu", (), {"device": torch.device("cpu")})
    averages = (theirs_in * mask).sum(-1) / mask.sum(-1)
    losses, rewards_chosen, _ = trainer.cpo_loss(averages[:, 0, 0], averages[:, 0, 1])

    torch.testing.assert_close(ours, losses.mean(), **EXACT)
    result = amopo_loss(logps, mask, beta=beta, gamma=gamma, weighting="uniform")
    torch.testing.assert_close(result.rewards_chosen[:, 0], rewards_chosen, **EXACT)
    ours.backward()
    losses.mean().backward()
    torch.testing.assert_close(ours_in.grad, theirs_in.grad, **EXACT)


def test_by_hand():
    # Two prompts; responses of 2 and 1 tokens; beta 1, gamma 0.
    probs = torch.tensor([[[[0.5, 0.25], [0.5, 9.0]], [[0.2, 0.4], [0.1, 9.0]]]]).double()
    mask = torch.tensor([[[[1, 1], [1, 0]], [[1, 1], [1, 0]]]])
    result = amopo_loss(probs.log(), mask, beta=1.0, gamma=0.0, weighting="mean")
    margin = [
        (math.log(0.5) + math.log(0.25)) / 2 - math.log(0.5),
        (math.log(0.2) + math.log(0.4)) / 2 - math.log(0.1),
    ]
    losses = [math.log(1 + math.exp(-m)) for m in margin]
    scores = [0.375 + 0.5, 0.3 + 0.1]
    weights = [math.exp(s) / sum(map(math.exp, scores)) for s in scores]
    assert result.pair_losses[0].tolist() == pytest.approx(losses)
    assert result.weights[0].tolist() == pytest.approx(weights)
    assert result.loss.item() == pytest.approx(
        sum(w * loss for w, loss in zip(weights, losses, strict=True))
    )
    assert result.stats.prob_std[0, :, 1].tolist() == [0.0, 0.0]
    assert result.stats.prob_std[0, 0, 0].item() == pytest.approx(math.sqrt(2) * 0.125)


def test_weights_carry_no_gradient():
    """The loss' gradient is that of the same loss with the weights as constants."""
    logps = -torch.rand(2, 3, 2, 5).double()
    mask = torch.ones(2, 3, 2, 5)
    noise = torch.randn(2, 3, 2)
    one, other = (logps.clone().requires_grad_() for _ in range(2))
    result = amopo_loss(one, mask, beta=2.0, gamma=1.0, noise=noise)
    result.loss.backward()
    again = amopo_loss(other, mask, beta=2.0, gamma=1.0, noise=noise)
    (result.weights.detach() * again.pair_losses).sum(-1).mean().backward()
    torch.testing.assert_close(one.grad, other.grad, **EXACT)
    assert not result.weights.requires_grad


def test_masked_dimensions_weigh_nothing():
    logps = -torch.rand(3, 4, 2, 5).double()
    mask = torch.ones_like(logps)
    noise = torch.randn(3, 4, 2)
    keep = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 0], [0, 0, 0, 0]]).bool()
    for weighting in WEIGHTINGS:
        static = torch.tensor([4.0, 3.0, 2.0, 1.0]) if weighting == "static" else None
        result = amopo_loss(
            logps,
            mask,
            beta=1.0,
            gamma=0.5,
            weighting=weighting,
            static_weights=static,
            noise=noise,
            dimension_mask=keep,
        )
        assert result.weights[~keep].eq(0).all()
        assert result.weights.sum(-1).tolist() == pytest.approx([1, 1, 0])
        alone = amopo_loss(
            logps[1:2, ::2],
            mask[1:2, ::2],
            beta=1.0,
            gamma=0.5,
            weighting=weighting,
            static_weights=None if static is None else static[::2],
            noise=noise[1:2, ::2],
        )
        torch.testing.assert_close(result.weights[1, ::2], alone.weights[0], **EXACT)
        assert result.loss.isfinite()


def test_same_generator_same_draws():
    logps, mask = -torch.rand(2, 3, 2, 5), torch.ones(2, 3, 2, 5)

    def weights(seed):
        generator = torch.Generator().manual_seed(seed)
        return amopo_loss(logps, mask, beta=1.0, gamma=0.0, generator=generator).weights

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_padding_order_and_company_change_nothing(data):
    """An example's loss is the same alone, padded, and anywhere in a batch."""
    size = data.draw(st.integers(1, 4), label="batch")
    prompts = data.draw(st.integers(1, 4), label="prompts")
    tokens = data.draw(st.integers(1, 6), label="tokens")
    padding = data.draw(st.integers(0, 5), label="padding")
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31), label="seed"))
    logps = -5 * torch.rand(size, prompts, 2, tokens, generator=generator).double()
    lengths = torch.randint(1, tokens + 1, (size, prompts, 2, 1), generator=generator)
    mask = torch.arange(tokens) < lengths
    noise = torch.randn(size, prompts, 2, generator=generator)
    keep = torch.rand(size, prompts, generator=generator) < 0.8
    keep[:, 0] = True

    def loss(rows, extra=0):
        junk = torch.full((len(rows), prompts, 2, extra), torch.nan).double()
        result = amopo_loss(
            torch.cat([logps[rows], junk], -1),
            torch.cat([mask[rows], torch.zeros(junk.shape, dtype=torch.bool)], -1),
            beta=1.3,
            gamma=0.7,
            noise=noise[rows],
            dimension_mask=keep[rows],
        )
        return (result.weights * result.pair_losses).sum(-1), result.loss

    order = torch.randperm(size, generator=generator)
    together, mean = loss(order.tolist(), padding)
    alone = torch.cat([loss([row])[0] for row in order.tolist()])
    torch.testing.assert_close(together, alone, **EXACT)
    torch.testing.assert_close(mean, alone.mean(), **EXACT)


@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [
        ([-0.1], [-0.2]),  # one token: no standard deviation
        ([-200.0, -300.0], [-0.1, -0.1]),  # probabilities that underflow to 0
        ([-1.5, -0.5], [-1.5, -0.5]),  # the same response twice
        ([0.0, 0.0], [-1e-7, 0.0]),  # a model that is certain
        ([-math.inf, -1.0], [-math.inf, -2.0]),  # an overflow upstream
        ([-1e5, -1e5], [0.0, 0.0]),
    ],
    ids=["one token", "underflow", "identical", "confident", "infinite", "huge margin"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_finite_loss_and_gradient(chosen, rejected, dtype):
    logps = torch.tensor([[[chosen, rejected]] * 2], dtype=dtype, requires_grad=True)
    result = amopo_loss(logps, torch.ones_like(logps), beta=0.8, gamma=2.0)
    result.loss.backward()
    assert result.loss.isfinite()
    assert logps.grad.isfinite().all()
    assert all(value.isfinite().all() for value in result.stats)


def test_floor_keeps_infinite_margins_apart():
    stats = response_stats(torch.tensor([[-math.inf, 0.0]]), torch.ones(1, 2))
    assert stats.avg_logp.item() == MIN_LOGP / 2


def test_wrong_arguments_are_named():
    logps, mask = torch.zeros(1, 2, 2, 3), torch.ones(1, 2, 2, 3)
    for problem, change in [
        (r"\[B, K, 2, T\]", {"token_logps": logps[:, :, :1]}),
        ("noise must be", {"noise": torch.zeros(1, 2)}),
        ("dimension_mask must be", {"dimension_mask": torch.ones(2, 2)}),
        ("is not one of gaussian, mean", {"weighting": "gausian"}),
        ("static_weights go with", {"weighting": "static"}),
    ]:
        arguments = {"token_logps": logps, "mask": mask, "beta": 1.0, "gamma": 0.0} | change
        with pytest.raises(ValueError, match=problem):
            amopo_loss(**arguments)
