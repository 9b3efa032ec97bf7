"""What must hold for every objective, whatever it computes; and SimPO's published numbers."""

import dataclasses
import json
from typing import Any

import pytest
import torch
from torch import Tensor

from axolotl_amopo.objectives import OBJECTIVES, Draw, Outcome, Responses, example_losses
from axolotl_amopo.objectives.amopo import AMoPO
from axolotl_amopo.objectives.simpo import SimPO

B, K, N, T, C = 3, 2, 4, 6, 3
# Rounding of float64 on numbers of about 1.
EXACT = {"rtol": 1e-12, "atol": 1e-12}


@pytest.fixture(params=OBJECTIVES)
def objective(request: pytest.FixtureRequest) -> Any:
    return OBJECTIVES[request.param]()


def groups(seed: int = 0) -> Responses:
    """Three examples of four responses, with 1, 3 and 2 comparisons, all kinds of signs in them."""
    random = torch.Generator().manual_seed(seed)
    logps = -3 * torch.rand(B, K, N, T, dtype=torch.float64, generator=random)
    lengths = torch.randint(1, T + 1, (B, 1, N, 1), generator=random)
    mask = (torch.arange(T) < lengths).expand(B, K, N, T)
    comparisons = [[0, 0, 1], [1, 2, 0], [1, 1, 3], [1, 0, 1], [2, 3, 2], [2, 0, 3]]
    signs = [[1, -1, 0], [1, 1, 1], [-1, 0, 1], [0, 0, 1], [1, -1, -1], [-1, 1, 1]]
    return Responses(
        logps.requires_grad_(),
        mask,
        torch.tensor(comparisons),
        torch.tensor([[0, 0, 1]] * len(comparisons)),
        torch.tensor(signs),
        ratings=torch.rand(B, N, C, dtype=torch.float64, generator=random),
        points=torch.full((B, C), 4.0, dtype=torch.float64),
        weights=torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).expand(B, C),
        counts=torch.ones(B),
        ids=torch.tensor([11, 12, 13]),
    )


def losses(objective: Any, responses: Responses, draw: Draw | None = None) -> Tensor:
    return example_losses(objective(responses, draw), responses)


def test_swapped_responses_with_swapped_signs_are_the_same(objective) -> None:
    given = groups()
    swapped = given._replace(comparisons=given.comparisons[:, [0, 2, 1]], signs=-given.signs)
    torch.testing.assert_close(losses(objective, swapped), losses(objective, given), **EXACT)


def test_the_order_of_criteria_does_not_matter(objective) -> None:
    given, order = groups(), [2, 0, 1]
    moved = given._replace(
        reads=given.reads[:, order],
        signs=given.signs[:, order],
        ratings=given.ratings[..., order],
        weights=given.weights[:, order],
    )
    torch.testing.assert_close(losses(objective, moved), losses(objective, given), **EXACT)


def test_padding_does_not_matter(objective) -> None:
    given = groups()
    tokens = torch.cat([given.logps, torch.full_like(given.logps[..., :2], torch.nan)], dim=-1)
    mask = torch.cat([given.mask, torch.zeros_like(given.mask[..., :2])], dim=-1)
    padded = given._replace(logps=tokens, mask=mask)
    torch.testing.assert_close(losses(objective, padded), losses(objective, given), **EXACT)


def test_examples_do_not_see_each_other(objective) -> None:
    given, draw = groups(), Draw(seed=3, step=7)
    together = losses(objective, given, draw)
    for b in range(B):
        own = given.comparisons[:, 0] == b
        alone = Responses(
            *(value[b : b + 1] for value in given[:2]),
            comparisons=given.comparisons[own] * torch.tensor([0, 1, 1]),
            reads=given.reads[own],
            signs=given.signs[own],
            **{
                name: value[b : b + 1]
                for name, value in given._asdict().items()
                if name in ("ratings", "points", "weights", "counts", "ids")
            },
        )
        torch.testing.assert_close(losses(objective, alone, draw), together[b : b + 1], **EXACT)


def test_a_group_costs_the_mean_of_its_pairs(objective) -> None:
    given = groups()
    pairs = given._replace(
        logps=given.logps[given.comparisons[:, 0]],
        mask=given.mask[given.comparisons[:, 0]],
        comparisons=torch.cat(
            [torch.arange(len(given.comparisons))[:, None], given.comparisons[:, 1:]], dim=1
        ),
        weights=given.per_comparison(given.weights),
        ids=torch.arange(len(given.comparisons)),
    )
    apart, together = losses(objective, pairs), losses(objective, given)
    for b in range(B):
        torch.testing.assert_close(together[b], apart[given.comparisons[:, 0] == b].mean(), **EXACT)


def test_a_criterion_without_a_say_has_no_gradient(objective) -> None:
    given = groups()
    silent = given._replace(signs=given.signs * torch.tensor([1, 1, 0]))
    losses(objective, silent).sum().backward()
    # The third criterion alone reads the second prompt.
    assert given.logps.grad[:, 1].abs().max() == 0
    assert given.logps.grad[:, 0].abs().max() > 0


def test_only_log_probabilities_carry_a_gradient(objective) -> None:
    outcome = objective(groups(), Draw(0, 0))
    assert outcome.losses.requires_grad
    assert not outcome.weights.requires_grad
    assert outcome.rewards.shape == (B, K, N)


def test_nothing_said_costs_nothing(objective) -> None:
    given = groups()
    silent = given._replace(signs=torch.zeros_like(given.signs))
    made = losses(objective, silent)
    made.sum().backward()
    assert (made == 0).all() and (given.logps.grad == 0).all()


def test_evaluation_draws_nothing(objective) -> None:
    torch.manual_seed(1)
    first = losses(objective, groups())
    torch.manual_seed(2)
    assert torch.equal(losses(objective, groups()), first)


def test_halves_are_summed_in_float32(objective) -> None:
    given = groups()
    half = given._replace(logps=given.logps.to(torch.bfloat16))
    exact = given._replace(logps=half.logps.float())
    assert torch.equal(losses(objective, half), losses(objective, exact))


def test_fields_describe_themselves(objective) -> None:
    for field in dataclasses.fields(objective):
        assert field.metadata["description"], field.name
        assert set(field.metadata["bounds"]) <= {"gt", "ge", "le"}
    assert dataclasses.is_dataclass(objective) and type(objective).__dataclass_params__.frozen


def test_terms_are_added_to_an_examples_loss() -> None:
    given = groups()
    outcome = SimPO()(given, None)
    term = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    added = Outcome(*outcome[:3], terms={"anchor": term})
    difference = example_losses(added, given) - example_losses(outcome, given)
    torch.testing.assert_close(difference, term, **EXACT)


def test_draws_follow_seed_step_and_example_alone() -> None:
    ids, ones = torch.tensor([5, 6]), torch.tensor([1, 1])
    both = Draw(seed=1, step=2).normal(ids, ones, 4, 2)
    assert both.shape == (2, 4, 2)
    assert torch.equal(Draw(1, 2).normal(ids[1:], ones[1:], 4, 2), both[1:])
    for other in (Draw(2, 2), Draw(1, 3)):
        assert not torch.equal(other.normal(ids, ones, 4, 2), both)
    many = Draw(seed=0, step=0).normal(torch.arange(4000), torch.ones(4000, dtype=int), 5)
    # 20,000 normal numbers: five standard errors.
    assert abs(many.mean()) < 5 / 20000**0.5 and abs(many.var() - 1) < 5 * (2 / 20000) ** 0.5


def test_simpo_is_amopo_with_equal_prompts_and_weights() -> None:
    given = groups()
    ours = SimPO(beta=1.5, gamma=0.7)(given, None)
    other = AMoPO(beta=1.5, gamma=0.7, weighting="uniform")(given, None)
    torch.testing.assert_close(example_losses(ours, given), example_losses(other, given), **EXACT)


def test_simpo_is_what_trl_computes(shared) -> None:
    """TRL's CPO trainer with `loss_type: simpo`, its numbers and gradients."""
    golden = json.loads((shared / "golden/methods/dpo_family.json").read_text(encoding="utf-8"))
    for case in golden["cases"]:
        logps = torch.tensor(case["token_logps"], dtype=torch.float64).unsqueeze(1)
        mask = torch.tensor(case["mask"]).bool().unsqueeze(1)  # [B, 1, 2, T]
        given = Responses.of_pairs(logps.requires_grad_(), mask)
        made = SimPO(case["beta"], case["simpo_gamma"])(given, None).losses.squeeze(1)
        made.mean().backward()
        expected = case["expected"]["simpo"]
        wanted = torch.tensor(expected["losses"], dtype=torch.float64)
        torch.testing.assert_close(made, wanted, rtol=1e-9, atol=1e-9)
        # A token's share in the average is one by the length, so a response's tokens sum up to it.
        gradient = torch.tensor(expected["grad_wrt_average_logps"], dtype=torch.float64)
        torch.testing.assert_close(logps.grad[:, 0].sum(-1), gradient, rtol=1e-9, atol=1e-9)
