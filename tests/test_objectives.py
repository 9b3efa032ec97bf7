"""What must hold for every objective, whatever it computes; and SimPO's published numbers.

`objective` is any of them, `paired` one whose losses are those of comparisons.
"""

import dataclasses
import json
from typing import Any

import pytest
import torch
from torch import Tensor

from axolotl_amopo.objectives import OBJECTIVES, Draw, Outcome, Responses, example_losses
from axolotl_amopo.objectives.amopo import AMoPO
from axolotl_amopo.objectives.describe import describe
from axolotl_amopo.objectives.modpo import MODPO
from axolotl_amopo.objectives.settings import ADMITTED
from axolotl_amopo.objectives.simpo import SimPO

B, K, N, T, C = 3, 2, 4, 6, 3
# Rounding of float64 on numbers of about 1.
EXACT = {"rtol": 1e-12, "atol": 1e-12}
UNPAIRED = {"lambda_dpo", "ric"}
OF_EXAMPLES = ("ratings", "points", "weights", "counts", "ids")


@pytest.fixture(params=OBJECTIVES)
def objective(request: pytest.FixtureRequest) -> Any:
    return OBJECTIVES[request.param]()


@pytest.fixture(params=[name for name in OBJECTIVES if name not in UNPAIRED])
def paired(request: pytest.FixtureRequest) -> Any:
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
        reference=-9 * torch.rand(2, B, K, N, dtype=torch.float64, generator=random),
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
    if isinstance(objective, MODPO):  # whose field is the number of a criterion
        ours, objective = objective, MODPO(train_on=order.index(objective.train_on))
    else:
        ours = objective
    moved = given._replace(
        reads=given.reads[:, order],
        signs=given.signs[:, order],
        ratings=given.ratings[..., order],
        weights=given.weights[:, order],
    )
    torch.testing.assert_close(losses(objective, moved), losses(ours, given), **EXACT)


def test_padding_does_not_matter(objective) -> None:
    given = groups()
    tokens = torch.cat([given.logps, torch.full_like(given.logps[..., :2], torch.nan)], dim=-1)
    mask = torch.cat([given.mask, torch.zeros_like(given.mask[..., :2])], dim=-1)
    padded = given._replace(logps=tokens, mask=mask)
    torch.testing.assert_close(losses(objective, padded), losses(objective, given), **EXACT)


def test_prompts_and_responses_that_other_examples_have_do_not_matter(objective) -> None:
    """Where examples differ in K or N, the rest is padding, whatever it holds."""
    given, wide = groups(), {}
    for name, axes in (
        ("logps", (1, 2)),
        ("mask", (1, 2)),
        ("reference", (2, 3)),
        ("ratings", (1,)),
    ):
        value = getattr(given, name)
        for axis in axes:
            more = value.select(axis, 0).unsqueeze(axis)
            blank = torch.zeros_like(more) if name == "mask" else torch.full_like(more, torch.nan)
            value = torch.cat([value, blank], dim=axis)
        wide[name] = value
    made = losses(objective, given._replace(**wide))
    torch.testing.assert_close(made, losses(objective, given), **EXACT)
    made.sum().backward()
    found = given.logps.grad.clone()
    given.logps.grad = None
    losses(objective, given).sum().backward()
    torch.testing.assert_close(found, given.logps.grad, **EXACT)


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
            reference=given.reference[:, b : b + 1],
            **{name: getattr(given, name)[b : b + 1] for name in OF_EXAMPLES},
        )
        torch.testing.assert_close(losses(objective, alone, draw), together[b : b + 1], **EXACT)


def test_a_group_costs_the_mean_of_its_pairs(paired) -> None:
    given = groups()
    pairs = given._replace(
        logps=given.logps[given.comparisons[:, 0]],
        mask=given.mask[given.comparisons[:, 0]],
        comparisons=torch.cat(
            [torch.arange(len(given.comparisons))[:, None], given.comparisons[:, 1:]], dim=1
        ),
        reference=given.reference[:, given.comparisons[:, 0]],
        ids=torch.arange(len(given.comparisons)),
        **{name: given.per_comparison(getattr(given, name)) for name in OF_EXAMPLES[:3]},
    )
    apart, together = losses(paired, pairs), losses(paired, given)
    for b in range(B):
        torch.testing.assert_close(together[b], apart[given.comparisons[:, 0] == b].mean(), **EXACT)


def test_a_criterion_without_a_say_has_no_gradient(paired) -> None:
    given = groups()
    silent = given._replace(signs=given.signs * torch.tensor([1, 1, 0]))
    losses(paired, silent).sum().backward()
    # The third criterion alone reads the second prompt.
    assert given.logps.grad[:, 1].abs().max() == 0
    assert given.logps.grad[:, 0].abs().max() > 0


def test_what_only_silent_criteria_read_need_not_run(paired) -> None:
    given = groups()
    silent = given._replace(signs=given.signs * torch.tensor([1, 1, 0]))
    away = torch.tensor([False, True])  # the third criterion alone reads the second prompt
    absent = silent._replace(
        logps=given.logps.masked_fill(away[:, None, None], torch.nan),
        mask=given.mask & ~away[:, None, None],
        reference=given.reference.masked_fill(away[:, None], torch.nan),
    )
    made = losses(paired, absent)
    torch.testing.assert_close(made, losses(paired, silent), **EXACT)
    made.sum().backward()
    assert given.logps.grad.isfinite().all()


def test_only_log_probabilities_carry_a_gradient(objective) -> None:
    given = groups()
    data = [value.clone().requires_grad_() for value in (*given[5:8], given.reference)]
    given = given._replace(**dict(zip(("ratings", "points", "weights"), data, strict=False)))
    given = given._replace(reference=data[-1])
    outcome = objective(given, Draw(0, 0))
    assert outcome.losses.requires_grad
    assert not outcome.weights.requires_grad
    made = example_losses(outcome, given).sum()
    assert torch.autograd.grad(made, data, allow_unused=True) == (None, None, None, None)
    assert outcome.rewards.shape == (B, K, N)
    per = {"comparison": (6, C), "example": (B, C), "response": (B, N)}
    assert outcome.losses.shape == outcome.weights.shape == per[outcome.per]


def test_losses_that_are_of_margins_say_so(objective) -> None:
    outcome = objective(groups(), None)
    if outcome.margins is not None:
        expected = -torch.nn.functional.logsigmoid(outcome.margins)
        torch.testing.assert_close(outcome.losses, expected, **EXACT)


def test_overflown_log_probabilities_cost_a_finite_loss(objective) -> None:
    given = groups()
    first = torch.zeros(N, 1, dtype=torch.bool).index_fill(0, torch.tensor([0]), True)
    lowest = torch.full_like(given.logps, -torch.inf)
    for some in (first, torch.ones_like(first)):
        logps = torch.where(some, lowest, given.logps).detach().requires_grad_()
        for reference in (given.reference, torch.full_like(given.reference, -torch.inf)):
            made = losses(objective, given._replace(logps=logps, reference=reference))
            made.sum().backward()
            assert made.isfinite().all() and logps.grad.isfinite().all()


def test_the_type_is_that_of_the_log_probabilities(objective) -> None:
    given = groups()
    single = given._replace(logps=given.logps.float())  # the rest is wider
    outcome = objective(single, Draw(0, 0))
    made = [outcome.losses, outcome.weights, outcome.rewards, example_losses(outcome, single)]
    assert {value.dtype for value in made} == {torch.float32}


def test_nothing_said_costs_nothing(paired) -> None:
    given = groups()
    silent = given._replace(signs=torch.zeros_like(given.signs))
    made = losses(paired, silent)
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
        assert set(field.metadata["bounds"]) <= {"gt", "ge", "le", "lt"}
    assert dataclasses.is_dataclass(objective) and type(objective).__dataclass_params__.frozen


def test_the_table_of_settings_names_every_objective() -> None:
    assert set(ADMITTED) == set(OBJECTIVES)
    assert {name for name, settings in ADMITTED.items() if not settings} == UNPAIRED


def test_one_draw_of_weights_per_step() -> None:
    assert torch.equal(Draw(1, 2).dirichlet(0.7, 4), Draw(1, 2).dirichlet(0.7, 4))
    for other in (Draw(2, 2), Draw(1, 3)):
        assert not torch.equal(other.dirichlet(0.7, 4), Draw(1, 2).dirichlet(0.7, 4))
    for concentration in (0.05, 0.5, 1.0, 8.0):
        drawn = torch.stack([Draw(0, step).dirichlet(concentration, 3) for step in range(4000)])
        torch.testing.assert_close(drawn.sum(-1), torch.ones(4000).double(), **EXACT)
        assert (drawn >= 0).all()
        # Mean 1/3, variance (2/9) / (3 concentration + 1); five standard errors, the latter's bound
        # by that of a variable between 0 and 1.
        variance = 2 / 9 / (3 * concentration + 1)
        assert (drawn.mean(0) - 1 / 3).abs().max() < 5 * (variance / 4000) ** 0.5
        assert (drawn.var(0) - variance).abs().max() < 5 * (variance / 4000) ** 0.5


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


# --- what their numbers mean, as papers have it

SUMS, MEANS = (True, False), (True, True)  # of log-ratios to a reference
DESCRIBED = {
    "amopo": (False, True, "comparison", 2.0, 1.0, True),
    "simpo": (False, True, "comparison", 0.5, 1.0, False),
    "dpo": (*SUMS, "comparison", None, 1.0, False),
    "ipo": (*MEANS, "comparison", 0.5, 1.0, False),  # beta times 1 / (2 beta)
    "mappo": (*SUMS, "comparison", None, 0.05, False),  # by the gap between the ratings
    "modpo": (*SUMS, "comparison", None, 1.0, False),
    "lambda_dpo": (*MEANS, "example", None, 1.0, False),
    "raco": (*SUMS, "comparison", None, 1.0, False),
    "mgda": (*SUMS, "comparison", None, 1.0, False),
    "mgda_decoupled": (*SUMS, "comparison", None, 1.0, False),
    "cos_dpo": (*SUMS, "comparison", None, 1.0, False),
    "ric": (False, True, "response", None, -1.0, False),  # every response is pushed up
    "mrpo": (*SUMS, "comparison", None, 1.0, False),
}
VARIANTS = [
    ("amopo", {"weighting": "uniform"}, {"adaptive": False}),
    ("amopo", {"weighting": "static"}, {"adaptive": False}),
    ("simpo", {"gamma": 0.0}, {"target_margin": None}),
    ("dpo", {"length_normalised": True}, {"per_token": True}),
    ("ipo", {"length_normalised": False, "beta": 0.3}, {"per_token": False}),
    ("mappo", {"form": "simpo", "gamma": 0.7}, {"reference": False, "per_token": True}
     | {"target_margin": 0.7}),
    ("mappo", {"form": "ipo", "gap_scale": 30.0}, {"target_margin": 0.5, "pushes_down": 1.0}),
    ("modpo", {"pair_loss": "hinge", "train_on": 1}, {}),
    ("lambda_dpo", {"weighting": "static"}, {}),
]  # fmt: skip


@pytest.mark.parametrize("name", OBJECTIVES)
def test_its_numbers_are_described(name: str) -> None:
    assert tuple(describe(OBJECTIVES[name]())) == DESCRIBED[name]


@pytest.mark.parametrize(("name", "fields", "otherwise"), VARIANTS)
def test_a_variants_numbers_are_described(name: str, fields: Any, otherwise: Any) -> None:
    usual, varied = describe(OBJECTIVES[name]()), describe(OBJECTIVES[name](**fields))
    assert varied == usual._replace(**otherwise)
