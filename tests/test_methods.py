"""Each method against what published functions compute, its special cases, and arithmetic by hand.

Numbers in ../shared/golden were recorded in float64 with 12 digits; its README says how.
"""

import dataclasses
import json
import math
from collections import defaultdict
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from test_data import data_format
from torch import Tensor
from transformers.loss.loss_utils import ForCausalLMLoss
from trl import DPOTrainer
from trl.experimental.cpo import CPOTrainer

from axolotl_amopo.commands.score.data import example_of
from axolotl_amopo.config.instructions import overall_instruction
from axolotl_amopo.data.pairing import Pair, PairRule
from axolotl_amopo.data.rows import RatedPrompt, Response
from axolotl_amopo.loss import amopo_loss
from axolotl_amopo.model.batch import responses
from axolotl_amopo.objectives import OBJECTIVES, Draw, Outcome, Responses, example_losses
from axolotl_amopo.objectives.amopo import AMoPO
from axolotl_amopo.objectives.cos_dpo import COSDPO
from axolotl_amopo.objectives.dpo import DPO
from axolotl_amopo.objectives.gradients import (
    Gradients,
    cagrad,
    cagrad_weights,
    gram,
    mgda,
    mgda_decoupled,
)
from axolotl_amopo.objectives.ipo import IPO
from axolotl_amopo.objectives.lambda_dpo import LambdaDPO
from axolotl_amopo.objectives.mappo import MaPPO
from axolotl_amopo.objectives.modpo import MODPO
from axolotl_amopo.objectives.mrpo import MRPO
from axolotl_amopo.objectives.raco import RACO
from axolotl_amopo.objectives.ric import RiC, targets
from axolotl_amopo.objectives.simpo import SimPO
from axolotl_amopo.objectives.terms import Anchor, Contrast, Offset
from axolotl_amopo.objectives.weights import Scalarization, tchebycheff, worst
from axolotl_amopo.training.collator import AMoPOCollator
from axolotl_amopo.training.metrics import example_metrics

RECORDED = {"rtol": 1e-9, "atol": 1e-9}
EXACT = {"rtol": 1e-12, "atol": 1e-12}


def tensor(values: Any) -> Tensor:
    return torch.as_tensor(values, dtype=torch.float64)


def golden(shared: Any, name: str, **wanted: Any) -> list[dict[str, Any]]:
    text = (shared / "golden" / "methods" / f"{name}.json").read_text(encoding="utf-8")
    cases = json.loads(text)["cases"]
    found = [case for case in cases if wanted.items() <= case.items()]
    assert found
    return found


def of_tokens(case: dict[str, Any], **others: Any) -> Responses:
    """Pairs of a recorded case with token log-probabilities, under one prompt."""
    mask = tensor(case["mask"]).unsqueeze(1)
    logps = tensor(case["token_logps"]).unsqueeze(1).requires_grad_()  # [B, 1, 2, T]
    reference = tensor(case["ref_token_logps"]).sum(-1)[None, :, None]  # [1, B, 1, 2]
    return Responses.of_pairs(logps, mask, **{"reference": reference, **others})


def of_sums(sums: Any, reference: Any = None, **others: Any) -> Responses:
    """Pairs of responses of one token each, sums [B, 2], references [R, B, 2]."""
    logps = tensor(sums)[:, None, :, None].detach().clone().requires_grad_()
    if reference is not None:
        others["reference"] = tensor(reference).unsqueeze(2)
    return Responses.of_pairs(logps, torch.ones_like(logps), **others)


def judged(given: Responses, signs: Any, **others: Any) -> Responses:
    """The same pairs under one prompt, judged by as many criteria as there are signs [B, C]."""
    signs = torch.as_tensor(signs)
    return given._replace(signs=signs, reads=torch.zeros_like(signs).long(), **others)


def made_up(seed: int, pairs: int = 5, tokens: int = 6) -> Responses:
    """Random pairs under one prompt, with references, in float64."""
    random = torch.Generator().manual_seed(seed)
    logps = -4 * torch.rand(pairs, 1, 2, tokens, dtype=torch.float64, generator=random)
    lengths = torch.randint(1, tokens + 1, (pairs, 1, 2, 1), generator=random)
    mask = torch.arange(tokens) < lengths
    reference = (
        logps + 0.5 * torch.randn(logps.shape, dtype=torch.float64, generator=random)
    ) * mask
    return Responses.of_pairs(logps.requires_grad_(), mask, reference=reference.sum(-1)[None])


def losses_of(objective: Any, given: Responses) -> Tensor:
    return example_losses(objective(given, None), given)


def gradient_of_sums(given: Responses, loss: Tensor) -> Tensor:
    """The gradient with respect to the responses' sums, [B, 2]: that of each of their tokens."""
    (found,) = torch.autograd.grad(loss, given.logps, retain_graph=True)
    return found[:, 0, :, 0]


def gradient_of_means(given: Responses, loss: Tensor) -> Tensor:
    """The gradient with respect to averages: a token's share in one is one by the length."""
    (found,) = torch.autograd.grad(loss, given.logps, retain_graph=True)
    return found[:, 0].sum(-1)


def check(given: Responses, objective: Any, expected: dict[str, Any], *settings: Any) -> Outcome:
    """Compare losses, and where recorded the gradient, of pairs with one criterion."""
    outcome = objective(given, None)
    for setting in settings:
        outcome = setting(outcome, given)
    losses = example_losses(outcome, given)
    torch.testing.assert_close(losses, tensor(expected["losses"]), **RECORDED)
    for name, gradient in (
        ("grad_wrt_sequence_logps", gradient_of_sums),
        ("grad_wrt_policy", gradient_of_sums),
        ("grad_wrt_average_logps", gradient_of_means),
    ):
        if name in expected:
            found = gradient(given, losses.mean())
            torch.testing.assert_close(found, tensor(expected[name]), **RECORDED)
    return outcome


# DPO and IPO


def test_dpo_and_ipo_are_what_trl_computes(shared) -> None:
    for case in golden(shared, "dpo_family"):
        given, expected, beta = of_tokens(case), case["expected"], case["beta"]
        check(given, DPO(beta), expected["dpo"])
        check(given, DPO(beta, length_normalised=True), expected["dpo_length_normalised"])
        check(given, IPO(beta), expected["ipo_average"])
        check(given, IPO(beta, length_normalised=False), expected["ipo_sum"])
        without = given._replace(reference=torch.zeros_like(given.reference))
        check(without, DPO(beta), expected["cpo_sigmoid_no_bc"])
        alone = one_dimension(given)
        check(alone, MODPO(beta, pair_loss="hinge"), expected["dpo_hinge"])


def one_dimension(given: Responses) -> Responses:
    pairs = len(given.logps)
    one, rated = tensor(1.0), torch.full((pairs, 2, 1), torch.nan, dtype=torch.float64)
    return given._replace(ratings=rated, points=one.expand(pairs, 1), weights=one.expand(pairs, 1))


def test_dpo_per_dimension(shared) -> None:
    """Each dimension's own winner, and the user's weights, which a tie leaves as they are."""
    for case in golden(shared, "dpo_family"):
        plain, beta = of_tokens(case), case["beta"]
        weights = tensor([0.5, 0.3, 0.2]).expand(len(plain.logps), -1)
        given = judged(plain, [[1, -1, 0]] * len(plain.logps), weights=weights)
        for length_normalised in (False, True):
            objective = DPO(beta, length_normalised)
            won = objective(plain, None).losses
            swapped = plain._replace(signs=-plain.signs)
            lost = objective(swapped, None).losses
            outcome = objective(given, None)
            torch.testing.assert_close(outcome.losses[:, :2], torch.cat([won, lost], 1), **EXACT)
            made = example_losses(outcome, given)
            torch.testing.assert_close(made, (0.5 * won + 0.3 * lost).squeeze(1), **EXACT)


def test_dpo_of_dimensions_that_disagree_is_dpo_with_a_soft_label() -> None:
    given = made_up(0)
    weights = tensor([0.4, 0.3, 0.2, 0.1]).expand(len(given.logps), -1)
    made = losses_of(DPO(0.3), judged(given, [[1, -1, 0, 1]] * len(given.logps), weights=weights))
    margin = DPO(0.3)(given, None).margins.squeeze(1)
    total, first = 0.8, 0.5 / 0.8
    by_hand = -total * (first * F.logsigmoid(margin) + (1 - first) * F.logsigmoid(-margin))
    torch.testing.assert_close(made, by_hand, **EXACT)


def test_ipo_of_dimensions_without_ties_is_one_square_and_a_constant() -> None:
    given, beta = made_up(1), 0.4
    weights = tensor([0.6, 0.3, 0.1]).expand(len(given.logps), -1)
    made = losses_of(IPO(beta), judged(given, [[1, -1, 1]] * len(given.logps), weights=weights))
    margin = DPO(1.0, length_normalised=True)(given, None).margins.squeeze(1)
    mean, goal = 0.6 - 0.3 + 0.1, 1 / (2 * beta)
    by_hand = (margin - mean * goal).square() + (1 - mean**2) * goal**2
    torch.testing.assert_close(made, by_hand, **EXACT)


class _OnCpu:
    device = torch.device("cpu")

    @staticmethod
    def gather(values: Any) -> Any:
        return values

    gather_for_metrics = gather


def trl_dpo(loss_type: str, beta: float, logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """TRL's own loss, computed by its trainer of a model that gives these logits."""
    trainer = DPOTrainer.__new__(DPOTrainer)  # its loss needs nothing else of the trainer
    settings = {
        "accelerator": _OnCpu,
        "use_liger_kernel": False,
        "aux_loss_enabled": False,
        "ld_alpha": None,
        "precompute_ref_logps": True,
        "f_divergence_type": "reverse_kl",
        "use_weighting": False,
        "label_smoothing": 0.0,
        "loss_types": [loss_type],
        "loss_weights": [1.0],
        "beta": beta,
        "_metrics": defaultdict(lambda: defaultdict(list)),
        "_total_train_tokens": 0,
        "_tp_size": 1,
    }
    vars(trainer).update(settings)
    trainer.__dict__["model"] = SimpleNamespace(training=True)

    def model(**_: Any) -> Any:
        return SimpleNamespace(logits=logits)

    return trainer._compute_loss(model, batch, return_outputs=False)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("loss_type", "objective"),
    [
        ("sigmoid", DPO(0.3)),
        ("sigmoid_norm", DPO(0.3, length_normalised=True)),
        ("ipo", IPO(0.3)),
        ("hinge", MODPO(0.3, pair_loss="hinge")),
    ],
)
def test_random_pairs_cost_what_trl_says(loss_type: str, objective: Any, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    pairs, tokens, words = 4, 7, 11
    inputs = [3 * torch.randn(2 * pairs, tokens, words, generator=random).double()]
    inputs.append(inputs[0].clone())
    ids = torch.randint(words, (2 * pairs, tokens), generator=random)
    starts = torch.randint(1, tokens, (2 * pairs, 1), generator=random)
    mask = (torch.arange(tokens) >= starts).long()
    reference = -8 * torch.rand(2, pairs, generator=random).double()
    batch = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "completion_mask": mask,
        "ref_chosen_logps": reference[0],
        "ref_rejected_logps": reference[1],
    }
    theirs = trl_dpo(loss_type, objective.beta, inputs[0].requires_grad_(), batch)
    logps = inputs[1].requires_grad_()[:, :-1].log_softmax(-1)
    logps = logps.gather(-1, ids[:, 1:].unsqueeze(-1)).squeeze(-1)

    def pair_up(values: Tensor) -> Tensor:
        return torch.stack(values.chunk(2), dim=1).unsqueeze(1)  # [B, 1, 2, T]

    given = Responses.of_pairs(
        pair_up(logps), pair_up(mask[:, 1:]), reference=reference.T[None, :, None]
    )
    ours = losses_of(objective, one_dimension(given)).mean()
    torch.testing.assert_close(ours, theirs, **EXACT)
    ours.backward()
    theirs.backward()
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad, **EXACT)


@pytest.mark.parametrize(
    ("objective", "value"),
    [
        (DPO(), math.log(2)),
        (MaPPO(), math.log(2)),
        (RACO(), math.log(2)),
        (COSDPO(), math.log(2)),
        (MRPO(), math.log(2)),
        (IPO(0.2), 1 / (4 * 0.2**2)),
        (IPO(0.2, length_normalised=False), 1 / (4 * 0.2**2)),
        (LambdaDPO(), math.log(2)),
        (MODPO(), -math.log(1 / (1 + math.exp((0.3 * 4 * 0.5 + 0.2 * 4 * -0.25) / 0.5)))),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, float) else "",
)
def test_a_policy_that_is_its_reference(objective: Any, value: float) -> None:
    """The value of the first step, with weights of 0.5, 0.3, 0.2 and scales of four points."""
    given = made_up(2)
    own = (given.logps.detach() * given.mask).sum(-1)
    pairs = len(given.logps)
    given = judged(
        given,
        [[1, -1, 1]] * pairs,
        reference=torch.stack([own, own]),
        weights=tensor([0.5, 0.3, 0.2]).expand(pairs, -1),
        ratings=tensor([[0.75, 1.0, 0.0], [0.25, 0.5, 0.25]]).expand(pairs, -1, -1),
        points=tensor(4.0).expand(pairs, 3),
    )
    outcome = objective(given, None)
    made = example_losses(outcome, given)
    torch.testing.assert_close(made, tensor(value).expand(pairs), **EXACT)
    assert outcome.rewards.abs().max() < 1e-12


# MaPPO


def rated(given: Responses, gaps: Any, scale: float = 1.0) -> Responses:
    """The chosen response rated by `gaps` [B], the rejected one 0."""
    ratings = torch.stack([tensor(gaps), torch.zeros(len(gaps)).double()], dim=1).unsqueeze(-1)
    return given._replace(ratings=ratings * scale)


def test_mappo_is_what_trl_computes_with_scaled_rejected_terms(shared) -> None:
    for case in golden(shared, "mappo"):
        ratings = tensor([case["prior_chosen"], case["prior_rejected"]]).T.unsqueeze(-1)
        given, expected = of_tokens(case, ratings=ratings), case["expected"]
        beta, gamma = case["beta"], case["gamma"]
        check(given, MaPPO(beta), expected["mappo_dpo"])
        means = MaPPO(beta, length_normalised=True)
        check(given, means, expected["mappo_dpo_length_normalised"])
        check(given, MaPPO(beta, "simpo", gamma=gamma), expected["mappo_simpo"])
        check(given, MaPPO(beta, "ipo"), expected["mappo_ipo_sum"])
        # CPO: no reference, and the likelihood of the chosen response, summed over its tokens.
        without = given._replace(reference=torch.zeros_like(given.reference))

        check(without, MaPPO(beta), expected["mappo_cpo_lambda_0.2"], Anchor(0.2, "sum"))


def test_mappo_with_a_gap_of_1_is_the_plain_loss() -> None:
    given = rated(made_up(3), [1.0] * 5)
    for ours, plain in (
        (MaPPO(0.3), DPO(0.3)),
        (MaPPO(0.3, length_normalised=True), DPO(0.3, length_normalised=True)),
        (MaPPO(0.3, "simpo", gamma=0.7), SimPO(0.3, 0.7)),
        (MaPPO(0.3, "ipo"), IPO(0.3, length_normalised=False)),
        (MaPPO(0.3, "ipo", length_normalised=True), IPO(0.3)),
    ):
        torch.testing.assert_close(losses_of(ours, given), losses_of(plain, given), **EXACT)


@pytest.mark.parametrize("form", ["dpo", "simpo", "ipo"])
def test_mappo_with_a_gap_of_0_leaves_the_rejected_response_alone(form: Any) -> None:
    """As it does with a gap below 0, where the winner is not the criterion's own."""
    for gap in (0.0, -0.5):
        given = rated(made_up(4), [gap] * 5)
        losses_of(MaPPO(0.3, form), given).sum().backward()
        assert given.logps.grad[:, :, 1].abs().max() == 0
        assert given.logps.grad[:, :, 0].abs().max() > 0


def test_mappo_takes_the_gap_of_the_winner_that_a_criterion_has() -> None:
    """On 0 to 1, scaled by `gap_scale` and cut at 1; without a rating a criterion is silent."""
    plain = made_up(5)
    pairs = len(plain.logps)
    ratings = tensor([[0.1, 0.9, 0.5, torch.nan], [0.4, 0.3, 0.5, 1.0]]).expand(pairs, -1, -1)
    weights = tensor([0.4, 0.3, 0.2, 0.1]).expand(pairs, -1)
    given = judged(plain, [[-1, 1, 1, 1]] * pairs, ratings=ratings, weights=weights)
    outcome = MaPPO(0.3, gap_scale=2.0)(given, None)
    ratio = (plain.logps * plain.mask).sum(-1)[:, 0] - plain.reference[0, :, 0]
    chosen, rejected = (0.3 * ratio).unbind(-1)
    by_hand = [rejected - 0.6 * chosen, chosen - 1.0 * rejected, chosen - 0.0 * rejected]
    for c, margin in enumerate(by_hand):
        torch.testing.assert_close(outcome.losses[:, c], -F.logsigmoid(margin), **EXACT)
    torch.testing.assert_close(outcome.weights, weights * tensor([1, 1, 1, 0]), **EXACT)
    torch.testing.assert_close(outcome.rewards[:, 0], 0.3 * ratio, **EXACT)  # unscaled
    example_losses(outcome, given).sum().backward()
    assert plain.logps.grad.isfinite().all()


def test_mappo_of_random_pairs_is_trls_simpo_with_a_scaled_rejected_average() -> None:
    given = rated(made_up(6), [0.0, 0.2, 0.5, 0.8, 1.0])
    trainer = CPOTrainer.__new__(CPOTrainer)
    vars(trainer).update(loss_type="simpo", beta=0.7, label_smoothing=0.0, simpo_gamma=0.9)
    vars(trainer).update(alpha=0.0, accelerator=_OnCpu)
    chosen, rejected = ((given.logps * given.mask).sum(-1) / given.mask.sum(-1))[:, 0].unbind(-1)
    theirs, *_ = trainer.cpo_loss(chosen, tensor([0.0, 0.2, 0.5, 0.8, 1.0]) * rejected)
    torch.testing.assert_close(losses_of(MaPPO(0.7, "simpo", gamma=0.9), given), theirs, **EXACT)


# MODPO


def test_modpo_is_what_its_authors_compute(shared) -> None:
    for case in golden(shared, "modpo"):
        pairs, dimensions = len(case["mask"]), len(case["w"])
        margins = tensor(case["margin_rewards"]).reshape(pairs, 2, dimensions - 1)
        own = torch.full((pairs, 2, 1), torch.nan, dtype=torch.float64)  # nobody reads it
        given = judged(
            of_tokens(case),
            [[1, *[-1] * (dimensions - 1)]] * pairs,
            ratings=torch.cat([own, margins / 5], dim=-1),
            points=tensor(5.0).expand(pairs, dimensions),
            weights=tensor(case["w"]).expand(pairs, -1),
        )
        objective = MODPO(case["beta"], pair_loss=case["loss_type"])
        outcome = check(given, objective, case["expected"])
        remainders, _ = objective.remainders(given, outcome.rewards)
        for side, name in enumerate(("rewards_chosen", "rewards_rejected")):
            expected = tensor(case["expected"][name])
            torch.testing.assert_close(remainders[:, 0, side], expected, **RECORDED)
        assert outcome.losses[:, 1:].abs().max() == 0 if dimensions > 1 else True


def test_modpo_with_all_weight_on_one_dimension_is_dpo() -> None:
    plain = made_up(7)
    pairs = len(plain.logps)
    given = judged(
        plain,
        [[1, -1, 1]] * pairs,
        ratings=torch.full((pairs, 2, 3), torch.nan, dtype=torch.float64),
        points=tensor(4.0).expand(pairs, 3),
        weights=tensor([0.0, 1.0, 0.0]).expand(pairs, -1),
    )
    swapped = plain._replace(signs=-plain.signs)
    ours, plain_dpo = losses_of(MODPO(0.3, train_on=1), given), losses_of(DPO(0.3), swapped)
    torch.testing.assert_close(ours, plain_dpo, **EXACT)


def test_modpo_leaves_out_pairs_that_tie_or_lack_a_rating() -> None:
    plain = made_up(8, pairs=3)
    ratings = torch.full((3, 2, 3), 0.5, dtype=torch.float64)
    ratings[1, 1, 1] = torch.nan  # has a weight
    ratings[2, 0, 2] = torch.nan  # has none
    given = judged(
        plain,
        [[0, 1, 1], [1, 1, 1], [1, 1, 1]],
        ratings=ratings,
        points=tensor(4.0).expand(3, 3),
        weights=tensor([0.7, 0.3, 0.0]).expand(3, -1),
    )
    made = losses_of(MODPO(0.3), given)
    made.sum().backward()
    assert (made[:2] == 0).all() and made[2] > 0
    assert (given.logps.grad[:2] == 0).all() and given.logps.grad.isfinite().all()


# lambda-DPO


def of_lists(case: dict[str, Any]) -> Responses:
    """Lists of N responses, in a chain of comparisons that say nothing about the loss."""
    logps = tensor(case["token_logps"]).unsqueeze(1).requires_grad_()
    mask = tensor(case["mask"]).bool().unsqueeze(1)
    reference = tensor(case["ref_token_logps"]).sum(-1)[None, :, None]
    ratings = tensor(case["ratings"]).mT  # [B, N, C]
    examples, count, criteria = ratings.shape
    comparisons = torch.tensor([(b, *p) for b in range(examples) for p in pairwise(range(count))])
    reads = torch.zeros(len(comparisons), criteria, dtype=torch.long)
    points = tensor(4.0).expand(examples, criteria)
    return Responses(
        logps,
        mask,
        comparisons,
        reads,
        signs=torch.zeros_like(reads),
        ratings=(ratings - 1) / 4,
        points=points,
        weights=tensor(case["lambda"]).expand(examples, -1),
        reference=reference if case["reference"] else torch.zeros_like(reference),
    )


def test_lambda_dpo_is_what_its_authors_compute(shared) -> None:
    """Who add 1e-10 to every target."""
    close = {"rtol": 1e-8, "atol": 1e-8}
    for case in golden(shared, "lambda_dpo"):
        given, expected = of_lists(case), case["expected"]
        outcome = LambdaDPO(case["beta"], weighting="static")(given, None)
        by_dimension = tensor(expected["losses_by_dimension"])
        torch.testing.assert_close(outcome.losses.mean(0), by_dimension, **close)
        loss = example_losses(outcome, given).mean()
        torch.testing.assert_close(loss, tensor(expected["loss"]), **close)
        found = gradient_of_sums(given, loss)
        torch.testing.assert_close(found, tensor(expected["grad_wrt_sequence_logps"]), **close)


def lists(seed: int, examples: int = 3, count: int = 4, criteria: int = 2) -> Responses:
    random = torch.Generator().manual_seed(seed)
    case = {
        "token_logps": -3 * torch.rand(examples, count, 5, generator=random),
        "ref_token_logps": -3 * torch.rand(examples, count, 5, generator=random),
        "mask": torch.arange(5) < torch.randint(1, 6, (examples, count, 1), generator=random),
        "ratings": torch.randint(1, 6, (examples, criteria, count), generator=random),
        "lambda": torch.full((criteria,), 1 / criteria),
        "reference": True,
    }
    return of_lists(case)


def test_lambda_dpo_of_two_responses_is_dpo() -> None:
    given = lists(0, count=2, criteria=1)
    given = given._replace(ratings=tensor([[1.0], [0.0]]).expand(3, -1, -1), weights=None)
    certain = LambdaDPO(0.4, temperature=1e-4)  # targets of 1 and 0
    pairs = given._replace(signs=torch.ones_like(given.signs))
    for length_normalised in (True, False):
        ours = losses_of(dataclasses.replace(certain, length_normalised=length_normalised), given)
        theirs = losses_of(DPO(0.4, length_normalised), pairs)
        torch.testing.assert_close(ours, theirs, **EXACT)


def test_lambda_dpo_at_the_reference_costs_log_n() -> None:
    for count in (2, 3, 7):
        given = lists(1, count=count)
        own = (given.logps.detach() * given.mask).sum(-1)[None]
        made = losses_of(LambdaDPO(), given._replace(reference=own))
        torch.testing.assert_close(made, tensor(math.log(count)).expand(3), **EXACT)


def test_lambda_dpo_by_hand() -> None:
    """Ratings in points: 1 and 3 on a scale of four points, not 0.25 and 0.75 of it."""
    given = lists(2, examples=1, count=2, criteria=1)
    given = given._replace(ratings=tensor([[[0.0], [0.5]]]), points=tensor([[4.0]]), weights=None)
    target = 1 / (1 + math.exp(2.0 / 0.8))
    ratio = (given.logps * given.mask).sum(-1)[0, 0] - given.reference[0, 0, 0]
    first, second = (0.3 * ratio / given.mask.sum(-1)[0, 0]).log_softmax(-1)
    by_hand = -target * first - (1 - target) * second
    made = losses_of(LambdaDPO(0.3, temperature=0.8), given).squeeze()
    torch.testing.assert_close(made, by_hand, **EXACT)


def test_lambda_dpo_does_not_see_the_order_of_responses() -> None:
    given, order = lists(3), [2, 0, 3, 1]
    moved = given._replace(
        logps=given.logps[:, :, order],
        mask=given.mask[:, :, order],
        ratings=given.ratings[:, order],
        reference=given.reference[..., order],
    )
    torch.testing.assert_close(
        losses_of(LambdaDPO(), moved), losses_of(LambdaDPO(), given), **EXACT
    )


def test_lambda_dpo_of_equal_ratings_asks_for_equal_rewards() -> None:
    given = lists(4)
    given = given._replace(ratings=torch.full_like(given.ratings, 0.3))
    objective = LambdaDPO(1.0)
    outcome = objective(given, None)
    example_losses(outcome, given).sum().backward()
    # A response whose reward is above the list's is pushed down.
    shares = outcome.rewards[:, 0].softmax(-1).detach()
    signs = given.logps.grad[:, 0, :, 0].sign()
    assert torch.equal(signs, (shares - 1 / 4).sign())


def test_a_response_that_is_not_rated_stays_out_of_its_list() -> None:
    given = lists(5)
    ratings = given.ratings.clone()
    ratings[0, 1, 0] = torch.nan  # one of four: a list of three
    ratings[1, :3, 0] = torch.nan  # three of four: no list
    ratings[2, :, 0] = torch.nan
    given = given._replace(ratings=ratings)
    outcome = LambdaDPO(weighting="static")(given, None)
    example_losses(outcome, given).sum().backward()
    shorter = given._replace(
        **{name: getattr(given, name)[:, :, [0, 2, 3]] for name in ("logps", "mask")},
        ratings=ratings[:, [0, 2, 3]],
        reference=given.reference[..., [0, 2, 3]],
        comparisons=given.comparisons.clamp(max=2),
    )
    expected = LambdaDPO()(shorter, None).losses[0, 0]
    torch.testing.assert_close(outcome.losses[0, 0], expected, **EXACT)
    assert (outcome.weights[1:, 0] == 0).all() and (outcome.weights[:, 1] == 0.5).all()
    assert given.logps.grad.isfinite().all()


def test_lambda_is_drawn_per_step_and_its_mean_in_evaluation() -> None:
    given = lists(6, criteria=3)
    objective = LambdaDPO(concentration=0.5)
    drawn = objective(given, Draw(1, 2)).weights
    assert torch.equal(drawn, Draw(1, 2).dirichlet(0.5, 3).expand(3, -1))
    assert (objective(given, None).weights == 1 / 3).all()


def test_a_list_is_read_under_the_first_of_its_prompts() -> None:
    one, other = lists(9), lists(10)
    both = one._replace(
        logps=torch.cat([one.logps, other.logps], dim=1),
        mask=torch.cat([one.mask, other.mask], dim=1),
        reference=torch.cat([one.reference, other.reference], dim=2),
        reads=torch.tensor([[1], [0], [1]] * 3).expand(-1, 2),  # three comparisons per example
    )
    made, expected = LambdaDPO()(both, None).losses, LambdaDPO()(one, None).losses
    torch.testing.assert_close(made, expected, **EXACT)


def test_a_criterion_reads_a_list_under_its_own_prompt() -> None:
    one, other = lists(7), lists(8)
    both = one._replace(
        logps=torch.cat([one.logps, other.logps], dim=1),
        mask=torch.cat([one.mask, other.mask], dim=1),
        reference=torch.cat([one.reference, other.reference], dim=2),
        reads=torch.tensor([0, 1]).expand(len(one.reads), -1),
    )
    expected = [LambdaDPO()(each._replace(ratings=one.ratings), None) for each in (one, other)]
    made = LambdaDPO()(both, None).losses
    torch.testing.assert_close(made[:, 0], expected[0].losses[:, 0], **EXACT)
    torch.testing.assert_close(made[:, 1], expected[1].losses[:, 1], **EXACT)


# COS-DPO


def test_cos_dpo_mixes_by_the_weights_of_each_prompt() -> None:
    """Two prompts of a pair, two dimensions under each; a corner, and a tie."""
    one, other = made_up(9), made_up(10)
    pairs = len(one.logps)
    both = Responses(
        torch.cat([one.logps, other.logps], dim=1),
        torch.cat([one.mask, other.mask], dim=1),
        one.comparisons,
        torch.tensor([0, 0, 1, 1]).expand(pairs, -1),
        torch.tensor([1, -1, 1, 0]).expand(pairs, -1),
        weights=tensor([1.0, 0.0, 0.3, 0.7]).expand(pairs, -1),
        reference=torch.cat([one.reference, other.reference], dim=2),
    )
    by_hand = (losses_of(DPO(0.2), one) + 0.3 * losses_of(DPO(0.2), other)) / 2
    torch.testing.assert_close(losses_of(COSDPO(0.2), both), by_hand, **EXACT)


def test_cos_dpo_under_one_prompt_is_dpo() -> None:
    given = made_up(11)
    pairs = len(given.logps)
    weights = tensor([0.6, 0.4]).expand(pairs, -1)
    two = judged(given, [[1, -1]] * pairs, weights=weights)
    torch.testing.assert_close(losses_of(COSDPO(0.2), two), losses_of(DPO(0.2), two), **EXACT)
    alone = given._replace(weights=tensor([1.0]).expand(pairs, -1))
    torch.testing.assert_close(losses_of(COSDPO(0.2), alone), losses_of(DPO(0.2), given), **EXACT)


# RiC


def test_ric_is_the_token_mean_of_supervised_fine_tuning() -> None:
    """That of TRL's SFT trainer, which is transformers' loss of causal models."""
    random = torch.Generator().manual_seed(12)
    examples, count, tokens, words = 3, 4, 6, 9
    logits = torch.randn(examples * count, tokens, words, generator=random).double()
    inputs = [logits.clone().requires_grad_() for _ in range(2)]
    labels = torch.randint(words, (examples * count, tokens), generator=random)
    kept = torch.arange(tokens) < torch.randint(2, tokens + 1, (len(labels), 1), generator=random)
    kept[5] = False  # a place that no response takes
    labels = labels.masked_fill(~kept, -100)
    theirs = ForCausalLMLoss(inputs[0].float(), labels, words)

    logps = inputs[1][:, :-1].log_softmax(-1)
    logps = logps.gather(-1, labels[:, 1:, None].clamp(min=0)).squeeze(-1)
    shape = (examples, 1, count, tokens - 1)
    given = of_lists(
        {
            "token_logps": torch.zeros(examples, count, tokens - 1),
            "ref_token_logps": torch.zeros(examples, count, tokens - 1),
            "mask": torch.ones(examples, count, tokens - 1),
            "ratings": torch.ones(examples, 1, count),
            "lambda": [1.0],
            "reference": True,
        }
    )._replace(logps=logps.view(shape), mask=kept[:, 1:].view(shape))
    counts = given.mask.sum((1, 2, 3))  # a mean over tokens, not over examples
    ours = (losses_of(RiC(), given) * counts).sum() / counts.sum()
    torch.testing.assert_close(ours.float(), theirs, rtol=1e-6, atol=1e-6)
    ours.backward()
    theirs.backward()
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad, rtol=1e-6, atol=1e-7)


def test_cos_dpo_on_prepared_rows(tokenizer) -> None:
    """Rows, batch, loss and metrics: each dimension's DPO under each drawn prompt."""
    rated = [{"text": t, "scores": {"a": a, "b": b}} for t, a, b in (("Yes.", 4, 1), ("No.", 2, 3))]
    rows = Dataset.from_list([{"prompt": f"Is it {i}?", "responses": rated} for i in (1, 2)])
    made = data_format(
        "rated", tokenizer, dimensions=["a", "b"], objective="cos_dpo", weight_draws=3,
        options={"scale": (1, 5)},
    )  # fmt: skip
    prepared = list(made.wrap_dataset(rows))
    batch = AMoPOCollator(tokenizer)(prepared)
    random = torch.Generator().manual_seed(0)
    shape = (2, 3, 2)  # examples, prompts, responses
    logps = -torch.rand((*shape, 4), generator=random).double()
    reference = -torch.rand((1, *shape), generator=random).double()
    mask = torch.ones_like(logps, dtype=torch.bool)
    given = responses(batch, logps, mask, reference=reference)
    outcome = COSDPO(beta=0.5)(given, None)
    ratios = 0.5 * (logps.sum(-1) - reference[0])  # [B, K, N]
    margins = ratios[..., 0] - ratios[..., 1]  # the first one wins on a, the second on b
    weights = given.weights.double().view(2, 3, 2)
    assert weights.sum(-1).tolist() == [[pytest.approx(1)] * 3] * 2
    assert len({tuple(one) for one in weights.flatten(0, 1).tolist()}) > 1
    terms = torch.stack([F.softplus(-margins), F.softplus(margins)], dim=-1)  # [B, M, D]
    expected = (weights * terms).sum(-1).mean(-1)
    torch.testing.assert_close(example_losses(outcome, given), expected, rtol=1e-6, atol=1e-7)
    logged = example_metrics(outcome, given, ["a", "b"])
    torch.testing.assert_close(logged["amopo/b/margin"], -margins.mean(-1).float())
    torch.testing.assert_close(logged["amopo/a/weight"], weights[..., 0].mean(-1).float())
    # What a prompt says is what weighs in it.
    for row, vectors in zip(prepared, weights.tolist(), strict=True):
        for ids, (a, b) in zip(row["prompt_ids"], vectors, strict=True):
            assert f"weights: a {a:.1f}, b {b:.1f}." in tokenizer.decode(ids)


def test_score_reads_a_dimension_where_it_has_all_the_weight(tokenizer) -> None:
    options = {"scale": (1, 5)}
    made = data_format(
        "rated", tokenizer, dimensions=["a", "b"], objective="cos_dpo", options=options
    )
    answers = [Response("Yes.", {"a": 4, "b": 1}), Response("No.", {"a": 2, "b": 3})]
    prompt = RatedPrompt([{"role": "user", "content": "Is it?"}], answers, [1])
    rule = PairRule(made.config, dict.fromkeys("ab", (1, 5)))
    example = example_of(
        made, rule, Pair(prompt, (0, 1), [1, -1]), made.chat_tokenizer(), own=True, plain=True
    )
    read = [tokenizer.decode(example.prompts[example.winner_first(0, c)[0][0]]) for c in range(3)]
    assert [text.split("weights: ")[1:] != [] for text in read] == [True, True, False]
    assert "a 1.0, b 0.0." in read[0] and "a 0.0, b 1.0." in read[1]
    assert example.signs == [[1, -1, 1]]


def test_ric_asks_for_the_ratings_that_its_authors_ask_for(shared) -> None:
    for case in golden(shared, "ric", kind="target_from_preference"):
        lowest, highest = ([f(seen) for seen in case["rewards"]] for f in (min, max))
        for norm in ("l2", "linf", "linear"):
            asked = np.round(targets(case["preference"], lowest, highest, norm), 1)
            assert asked.tolist() == case["expected"][norm], (case["seed"], norm)


def test_an_instruction_can_state_ratings_as_ric_does(shared) -> None:
    (case,) = golden(shared, "ric", kind="prompt_text")
    score = "<rm{{ loop.index }}_score> {{ '%.1f' | format(d.rating | float) }} "
    template = "{% for d in dimensions %}" + score + "{% endfor %}"
    asked = tuple((f"rm{i}", None, (-3, 3), score) for i, score in enumerate(case["scores"]))
    assert overall_instruction(template, asked).strip() in case["expected"]


# MRPO


def test_mrpo_is_what_its_authors_compute(shared) -> None:
    for case in golden(shared, "mrpo"):
        references = tensor([case["ref_base"], case["ref_other"]])
        objective = MRPO(case["beta"], case["alpha"], case["eta"])
        check(of_sums(case["policy"], references), objective, case["expected"])
        merged = objective.merge(*references)
        torch.testing.assert_close(merged, tensor(case["expected"]["combined_ref"]), **RECORDED)
        # The second response first, and losing nothing by it.
        swapped = of_sums(tensor(case["policy"]).flip(-1), references.flip(-1))
        swapped = swapped._replace(signs=-swapped.signs)
        made = losses_of(objective, swapped)
        torch.testing.assert_close(made, tensor(case["expected"]["losses"]), **RECORDED)


def test_mrpo_with_equal_references_or_one_is_dpo() -> None:
    given = made_up(13)
    plain = losses_of(DPO(0.3), given)
    for objective in (MRPO(0.3), MRPO(0.3, alpha=0.4), MRPO(0.3, alpha=1.0), MRPO(0.3, eta=-0.2)):
        torch.testing.assert_close(losses_of(objective, given), plain, **EXACT)
        twice = given._replace(reference=given.reference.expand(2, -1, -1, -1))
        torch.testing.assert_close(losses_of(objective, twice), plain, **EXACT)
    thrice = given._replace(reference=given.reference.expand(3, -1, -1, -1))
    with pytest.raises(ValueError, match="two references, got 3"):
        MRPO()(thrice, None)


# Gradients


def test_cagrad_is_what_raco_solves(shared) -> None:
    cases = golden(shared, "raco", kind="solver") + golden(
        shared, "gradient_weights", kind="cagrad"
    )
    for case in cases:
        gradients, weights, c = tensor(case["gradients"]), tensor(case["w"]), case["c"]
        expected, inner = case["expected"], gram(gradients)
        p = cagrad_weights(inner, weights, c=c)
        torch.testing.assert_close(p, tensor(expected["p"]), rtol=1e-8, atol=1e-8)
        for name, clip in (("cagrad", False), ("cagrad_clip", True)):
            made = Gradients("cagrad", c, clip).coefficients(inner, weights, torch.ones(1))
            wanted = tensor(expected[name]["coefficients"])
            torch.testing.assert_close(made, wanted, rtol=1e-8, atol=1e-8)
            direction = tensor(expected[name]["direction"])
            torch.testing.assert_close(made @ gradients, direction, rtol=1e-8, atol=1e-8)


def step_of(case: dict[str, Any], rule: Gradients) -> tuple[Tensor, Tensor, Tensor]:
    """A step of RACO on the recorded linear policy: loss, losses by dimension, gradient."""
    theta = tensor(case["theta"]).requires_grad_()
    sums = tensor(case["ref_logps"]) + tensor(case["features"]) @ theta  # [B, 2]
    signs = torch.tensor(case["signs"]).long()
    plain = of_sums(sums, tensor(case["ref_logps"])[None])
    weights = tensor(case["w"])
    given = judged(plain, signs, weights=weights.expand(len(signs), -1))
    given = given._replace(logps=sums[:, None, :, None])
    outcome = RACO(case["beta"])(given, None)
    by_dimension = (outcome.losses * (signs != 0)).mean(0)
    gradients = torch.stack(
        [torch.autograd.grad(loss, theta, retain_graph=True)[0] for loss in by_dimension]
    )
    made = rule.coefficients(gram(gradients), weights, by_dimension) @ gradients
    return example_losses(outcome, given).mean(), by_dimension, made


def test_raco_steps_as_its_authors_do(shared) -> None:
    for case in golden(shared, "raco", kind="training_step"):
        expected = case["expected"]
        rule = Gradients("cagrad", case["c"], case["clip"])
        loss, by_dimension, gradient = step_of(case, rule)
        torch.testing.assert_close(loss, tensor(expected["weighted_loss"]), **RECORDED)
        recorded = tensor(expected["objective_losses"])  # in float32
        torch.testing.assert_close(by_dimension, recorded, rtol=1e-7, atol=1e-7)
        torch.testing.assert_close(gradient, tensor(expected["gradient"]), rtol=1e-8, atol=1e-8)

        # Without a correction it is DPO with static weights.
        theta = tensor(case["theta"]).requires_grad_()
        sums = tensor(case["ref_logps"]) + tensor(case["features"]) @ theta
        plain = of_sums(sums, tensor(case["ref_logps"])[None])
        weights = tensor(case["w"]).expand(len(sums), -1)
        given = judged(plain, torch.tensor(case["signs"]).long(), weights=weights)
        given = given._replace(logps=sums[:, None, :, None])
        losses_of(DPO(case["beta"]), given).mean().backward()
        for rule in (Gradients("cagrad", c=0.0), Gradients()):
            torch.testing.assert_close(step_of(case, rule)[2], theta.grad, **EXACT)


def test_raco_of_one_opinion_is_a_longer_step() -> None:
    gradients = (
        torch.randn(1, 6, generator=torch.Generator().manual_seed(14)).double().expand(4, -1)
    )
    weights = tensor([0.1, 0.2, 0.3, 0.4])
    for clip in (False, True):
        made = cagrad(gram(gradients), weights, c=0.4, clip=clip)
        torch.testing.assert_close(made, 1.4 * weights, **EXACT)


def test_raco_without_a_direction_takes_the_weighted_step() -> None:
    """Where the mixture is 0: two gradients are opposite, and the third alone makes the sum."""
    gradients = tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]])
    weights = tensor([0.3, 0.3, 0.4])
    p = cagrad_weights(gram(gradients), weights, c=0.4)
    torch.testing.assert_close(p, tensor([0.5, 0.5, 0.0]), **EXACT)
    for clip in (False, True):
        made = cagrad(gram(gradients), weights, c=0.4, clip=clip)
        torch.testing.assert_close(made, weights, **EXACT)
        assert torch.equal(cagrad(torch.zeros(3, 3), weights, c=0.4, clip=clip), weights)
        assert cagrad(gram(gradients * torch.nan), weights, c=0.4, clip=clip).isnan().all()


def random_gradients(seed: int) -> tuple[Tensor, Tensor, float]:
    """Gradients in few and in many dimensions, equal and opposite ones, of very different size."""
    random = torch.Generator().manual_seed(seed)
    count, size = (int(torch.randint(2, high, (), generator=random)) for high in (15, 20))
    gradients = torch.randn(count, size, generator=random).double()
    match seed % 5:
        case 1:
            gradients[-1] = gradients[0]
            gradients[count // 2] = -gradients[0]
        case 2:
            gradients *= 10 ** torch.empty(count, 1).double().uniform_(-4, 1, generator=random)
        case 3:
            gradients *= 1e-9
        case 4:
            gradients = gradients[:, :2] @ torch.randn(2, 50, generator=random).double()
    weights = torch.rand(count, generator=random).double()
    return gradients, weights / weights.sum(), [0.1, 0.4, 0.9, 0.99, 1e-4][seed % 4]


@pytest.mark.parametrize("seed", range(40))
def test_weights_of_gradients_are_at_the_minimum(seed: int) -> None:
    """By the Frank-Wolfe gap, p . slope - min slope, which bounds how far the minimum is."""
    gradients, weights, c = random_gradients(seed)
    inner = gram(gradients)
    scale = inner.diagonal().max()
    p = mgda(inner)
    torch.testing.assert_close(p.sum(), tensor(1.0), **EXACT)
    assert (p >= 0).all() and p @ inner @ p - (inner @ p).min() < 1e-12 * scale

    p = cagrad_weights(inner, weights, c=c)
    torch.testing.assert_close(p.sum(), tensor(1.0), **EXACT)
    assert (p >= 0).all()
    radius = c * (weights @ gradients).norm()
    length = (p @ gradients).norm()
    if length > 1e-6 * scale.sqrt():
        slopes = inner @ weights + radius * (inner @ p) / length
        assert p @ slopes - slopes.min() < 1e-9 * scale
    else:  # no slope at 0; nothing in the hull is lower, whose values are multiples of these
        others = torch.distributions.Dirichlet(torch.ones(len(p)).double()).sample((2000,))
        values = others @ inner @ weights + radius * (others @ gradients).norm(dim=-1)
        assert values.min() > -1e-9 * scale


def test_mgda_is_at_least_as_short_as_what_ctwa_finds(shared) -> None:
    """Whose search stops early with more than two gradients."""
    for case in golden(shared, "gradient_weights", kind="mgda"):
        gradients, expected = tensor(case["gradients"]), case["expected"]
        p = mgda(gram(gradients))
        length = (p @ gradients).norm().item()
        assert expected["norm"] - 1e-3 < length < expected["norm"] + 1e-9
        if len(p) == 2:
            torch.testing.assert_close(p, tensor(expected["weights"]), **RECORDED)


def test_mgda_of_equal_and_of_opposite_gradients() -> None:
    gradient = tensor([[3.0, -1.0, 2.0]])
    for rows in (gradient.expand(3, -1), torch.cat([gradient, -gradient])):
        wanted = gradient[0] if len(rows) == 3 else torch.zeros(3).double()
        torch.testing.assert_close(mgda(gram(rows)) @ rows, wanted, **EXACT)
        made = Gradients("mgda").coefficients(gram(rows), torch.ones(1), torch.ones(1))
        torch.testing.assert_close(made, mgda(gram(rows)), **EXACT)
    assert mgda(gram(torch.zeros(2, 3))).sum() == 1
    assert mgda(gram(tensor([[torch.nan, 1.0], [0.0, 1.0]]))).isnan().all()


def test_mgda_decoupled_divides_by_the_losses() -> None:
    gradients = torch.randn(3, 8, generator=torch.Generator().manual_seed(15)).double()
    losses = tensor([0.7, 0.1, 0.4])
    made = mgda_decoupled(gram(gradients), losses)
    expected = mgda(gram(gradients / losses.unsqueeze(-1)))
    torch.testing.assert_close(made, expected, **EXACT)
    rule = Gradients("mgda_decoupled")
    torch.testing.assert_close(rule.coefficients(gram(gradients), losses, losses), made, **EXACT)
    # Two gradients by hand: the minimum of |p g_1 / L_1 + (1 - p) g_2 / L_2|.
    one, two = (gradients[k] / losses[k] for k in (0, 1))
    share = (two @ (two - one) / (one - two).square().sum()).clamp(0, 1)
    made = mgda_decoupled(gram(gradients[:2]), losses[:2])
    torch.testing.assert_close(made, torch.stack([share, 1 - share]), **EXACT)


# Settings


def test_the_anchor_of_mdpo(shared) -> None:
    """Without the term of the damaged image, which is added by hand."""
    for case in golden(shared, "mdpo"):
        policy = tensor(case["policy"]).requires_grad_()
        reference, beta = tensor(case["reference"]), case["beta"]
        given = of_sums(policy[:, :2], reference[None, :, :2])
        given = given._replace(logps=policy[:, None, :2, None])
        outcome = Anchor(1.0, "reference")(DPO(beta)(given, None), given)
        ratios = policy - reference
        image = -F.logsigmoid(beta * (ratios[:, 0] - ratios[:, 2]))
        made = example_losses(outcome, given) + image
        torch.testing.assert_close(made, tensor(case["expected"]["losses"]), **RECORDED)
        made.mean().backward()
        expected = tensor(case["expected"]["grad_wrt_policy"])
        torch.testing.assert_close(policy.grad, expected, **RECORDED)


def test_an_anchor_pushes_each_token_of_the_winner() -> None:
    given = made_up(16)
    outcome = DPO(0.3)(given, None)
    anchored = Anchor(0.5)(outcome, given)
    difference = example_losses(anchored, given) - example_losses(outcome, given)
    torch.testing.assert_close(difference, anchored.terms["anchor"], **EXACT)
    difference.sum().backward()
    lengths = given.mask.sum(-1, keepdim=True).double()
    expected = (-0.5 / lengths * given.mask) * tensor([1.0, 0.0])[:, None]
    torch.testing.assert_close(given.logps.grad, expected, **EXACT)


def test_an_anchor_weighs_as_its_criterion_does() -> None:
    """Each criterion's own winner; one that says nothing adds nothing."""
    given = made_up(17)
    pairs = len(given.logps)
    weights = tensor([0.5, 0.3, 0.2]).expand(pairs, -1)
    given = judged(given, [[1, -1, 0]] * pairs, weights=weights)
    sums, lengths = (given.logps * given.mask).sum(-1)[:, 0], given.mask.sum(-1)[:, 0]
    for form, nll in (("mean", -sums / lengths), ("sum", -sums)):
        made = Anchor(2.0, form)(DPO(0.3)(given, None), given).terms["anchor"]
        torch.testing.assert_close(made, 2 * (0.5 * nll[:, 0] + 0.3 * nll[:, 1]), **EXACT)
    own = sums.detach()[None, :, None]
    at_start = given._replace(reference=own)
    made = Anchor(1.0, "reference")(DPO(0.3)(at_start, None), at_start).terms["anchor"]
    torch.testing.assert_close(made, tensor(0.8 * math.log(2)).expand(pairs), **EXACT)


@pytest.mark.parametrize(
    "setting", [Offset(), Scalarization(), Anchor(), Contrast(), Gradients()], ids=repr
)
def test_a_setting_that_is_off_changes_nothing(setting: Any) -> None:
    given = made_up(18)
    outcome = AMoPO(weighting="uniform")(given, None)
    assert setting(outcome, given) is outcome
    assert setting.needs == frozenset()


@pytest.mark.parametrize(
    "make",
    [
        lambda: Offset(offset_form="log"),
        lambda: Scalarization(sharpness=2.0),
        lambda: Anchor(anchor_form="sum"),
        lambda: Contrast(contrast_beta=0.1),
        lambda: Gradients(c=0.1),
        lambda: Gradients("mgda", clip=False),
        lambda: MaPPO(gamma=2.0),
        lambda: MaPPO(form="simpo", length_normalised=True),
        lambda: LambdaDPO(weighting="static", concentration=2.0),
    ],
)
def test_a_field_without_effect_is_refused(make: Any) -> None:
    with pytest.raises(ValueError, match="remove it"):
        make()


def under_two_prompts(seed: int) -> Responses:
    """Pairs under two prompts; the first asks for the first response's ratings."""
    one, other = made_up(seed), made_up(seed + 1)
    fit = tensor([[[1.0, 0.2], [0.4, 0.9]]]).expand(len(one.logps), -1, -1)
    logps = torch.cat([one.logps, other.logps], dim=1).detach().requires_grad_()
    return Responses.of_pairs(logps, one.mask.expand_as(logps), fit=fit)


def test_a_contrast_compares_a_response_under_two_prompts() -> None:
    given = under_two_prompts(19)
    outcome = SimPO()(given, None)
    made = Contrast(0.5, 0.1)(outcome, given).terms["contrast"]
    sums = (given.logps * given.mask).sum(-1)  # [B, K, N]
    ahead = torch.stack([sums[:, 0, 0] - sums[:, 1, 0], sums[:, 1, 1] - sums[:, 0, 1]], dim=-1)
    by_hand = 0.5 * -F.logsigmoid(0.1 * ahead).mean(-1)
    torch.testing.assert_close(made, by_hand, **EXACT)
    (found,) = torch.autograd.grad(made.sum(), given.logps)
    assert (found[:, [0, 1], [1, 0]] == 0).all()  # nothing through the prompt that fits less
    assert (found[:, [0, 1], [0, 1], 0] < 0).all()


def test_a_contrast_of_equal_prompts_is_a_push_of_half_its_beta() -> None:
    given = under_two_prompts(21)
    logps = given.logps.detach()[:, :1].expand(-1, 2, -1, -1).clone().requires_grad_()
    given = given._replace(logps=logps)
    made = Contrast(1.0, 0.1)(SimPO()(given, None), given).terms["contrast"]
    torch.testing.assert_close(made, torch.full_like(made, math.log(2)), **EXACT)
    made.sum().backward()
    # The mean over two responses, each under the prompt that fits it.
    expected = torch.zeros_like(logps)
    expected[:, [0, 1], [0, 1]] = -0.1 / 2 / 2
    torch.testing.assert_close(logps.grad, expected * given.mask, **EXACT)


def test_a_contrast_needs_two_prompts_that_fit_differently() -> None:
    given = under_two_prompts(23)
    outcome = SimPO()(given, None)
    fit = given.fit.clone()
    fit[0] = 0.5  # alike
    fit[1, 1] = torch.nan  # one prompt is known alone
    fit[2, :, 1] = torch.nan  # one response
    mask = given.mask.clone()
    mask[3, 1] = False  # does not run under the second prompt
    given = given._replace(fit=fit, mask=mask)
    made = Contrast(1.0, 0.1)(outcome, given).terms["contrast"]
    made.sum().backward()
    assert (made[[0, 1, 3]] == 0).all() and (made[[2, 4]] > 0).all()
    assert given.logps.grad.isfinite().all()


def test_an_offset_asks_for_a_margin_by_the_gap() -> None:
    plain = made_up(25)
    pairs = len(plain.logps)
    # Gaps of the criteria's winners: 0.5, -0.25, 0, 0.05, unknown.
    ratings = tensor([[0.5, 0.5, 0.3, 0.4, torch.nan], [0.0, 0.75, 0.3, 0.45, 0.0]])
    given = judged(
        plain,
        [[1, 1, 1, -1, 1]] * pairs,
        ratings=ratings.expand(pairs, -1, -1),
        points=tensor(4.0).expand(pairs, 5),
    )
    for objective in (DPO(0.3), SimPO(1.5, 0.4), AMoPO(1.5, 0.4, "uniform")):
        outcome = objective(given, None)
        linear = Offset(2.0)(outcome, given)
        for c, gap in enumerate((0.5, -0.25, 0.0, 0.05, 0.0)):
            expected = -F.logsigmoid(outcome.margins[:, c] - 2.0 * gap)
            torch.testing.assert_close(linear.losses[:, c], expected, **EXACT)
        torch.testing.assert_close(linear.losses, -F.logsigmoid(linear.margins), **EXACT)
        odpo = Offset(1.5, "log")(outcome, given)
        for c, points in enumerate((2.0, 0.1, 0.1, 0.2, 1.0)):
            expected = -F.logsigmoid(outcome.margins[:, c] - 1.5 * math.log(points))
            torch.testing.assert_close(odpo.losses[:, c], expected, **EXACT)
        assert example_losses(odpo, given).isfinite().all()
    with pytest.raises(ValueError, match="margin"):
        Offset(1.0)(IPO()(given, None), given)


def random_losses(seed: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Losses and weights [5, 4]: of all criteria, of some, of one, of none."""
    random = torch.Generator().manual_seed(seed)
    losses = 3 * torch.rand(5, 4, dtype=dtype, generator=random)
    shares = torch.rand(5, 4, dtype=dtype, generator=random)
    shares = shares / shares.sum(-1, keepdim=True)
    shares[1, :2] = 0
    shares[2, 1:] = 0
    shares[3] = 0
    return losses.requires_grad_(), shares


def soft_worst(losses: Tensor, shares: Tensor, sharpness: float) -> Tensor:
    total = shares.sum(-1)
    exponents = (shares / total.unsqueeze(-1)).log() + sharpness * losses
    return (total * exponents.logsumexp(-1) / sharpness).nan_to_num()


def smooth_tchebycheff(losses: Tensor, shares: Tensor, sharpness: float) -> Tensor:
    exponents = (sharpness * shares * losses).masked_fill(shares == 0, -math.inf)
    return exponents.logsumexp(-1) / sharpness


@pytest.mark.parametrize("sharpness", [0.01, 1.0, 30.0])
@pytest.mark.parametrize(
    ("scalarize", "direct"), [(worst, soft_worst), (tchebycheff, smooth_tchebycheff)]
)
def test_scalarizations_are_their_formulas(scalarize: Any, direct: Any, sharpness: float) -> None:
    losses, shares = random_losses(0)
    said = shares.sum(-1) > 0
    weights, value = scalarize(losses, shares, sharpness)
    expected = direct(losses[said], shares[said], sharpness)
    torch.testing.assert_close(value[said], expected, rtol=1e-11, atol=1e-11)
    (gradient,) = torch.autograd.grad(expected.sum(), losses)
    torch.testing.assert_close(weights[said], gradient[said], rtol=1e-11, atol=1e-11)
    assert (value[~said] == 0).all() and (weights[~said] == 0).all()
    assert not weights.requires_grad and not value.requires_grad


def test_a_soft_maximum_goes_from_the_mean_to_the_largest_loss() -> None:
    losses, shares = random_losses(1)
    total, mean = shares.sum(-1), (shares * losses).sum(-1)
    for dtype, close in ((torch.float64, 1e-5), (torch.float32, 1e-5)):
        weights, value = worst(losses.to(dtype), shares.to(dtype), 1e-6)
        torch.testing.assert_close(weights.double(), shares, rtol=close, atol=close)
        torch.testing.assert_close(value.double(), mean, rtol=close, atol=close)
    largest = losses.masked_fill(shares == 0, 0).amax(-1) * total
    for sharpness in (1e4, math.inf):
        weights, value = worst(losses, shares, sharpness)
        torch.testing.assert_close(value, largest, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(weights.amax(-1), total, **EXACT)
    values = torch.stack([worst(losses, shares, 10.0**n)[1] for n in range(-6, 7)])
    assert (values.diff(dim=0) >= -1e-12).all()
    order = [2, 0, 3, 1]
    moved = worst(losses[:, order], shares[:, order], 2.0)
    for made, expected in zip(moved, worst(losses, shares, 2.0), strict=True):
        torch.testing.assert_close(
            made, expected[:, order] if made.ndim == 2 else expected, **EXACT
        )
    alike = torch.full_like(losses, 0.7)
    weights, value = worst(alike, shares, 5.0)
    torch.testing.assert_close(weights, shares, **EXACT)
    torch.testing.assert_close(value, 0.7 * total, **EXACT)


def test_a_hard_tchebycheff_is_the_largest_weighted_loss() -> None:
    losses, shares = random_losses(2)
    weights, value = tchebycheff(losses, shares, math.inf)
    torch.testing.assert_close(value, (shares * losses).amax(-1), **EXACT)
    torch.testing.assert_close((weights * losses).sum(-1), value, **EXACT)


@pytest.mark.parametrize("name", ["worst", "tchebycheff"])
def test_a_scalarization_is_the_loss_of_an_outcome(name: Any) -> None:
    """Of groups too, whose loss is the mean over their comparisons."""
    given = made_up(26)
    pairs = len(given.logps)
    given = judged(given, [[1, -1, 1]] * pairs, weights=tensor([0.5, 0.3, 0.2]).expand(pairs, -1))
    given = given._replace(
        comparisons=torch.cat([given.comparisons, given.comparisons[:1]]),
        signs=torch.cat([given.signs, -given.signs[:1]]),
        reads=torch.cat([given.reads, given.reads[:1]]),
    )
    outcome = DPO(0.3)(given, None)
    direct = {"worst": soft_worst, "tchebycheff": smooth_tchebycheff}[name]
    values = direct(outcome.losses, outcome.weights, 2.0)
    expected = torch.cat([(values[:1] + values[-1:]) / 2, values[1:-1]])
    made = example_losses(Scalarization(name, 2.0)(outcome, given), given)
    torch.testing.assert_close(made, expected, **EXACT)
    wanted = torch.autograd.grad(expected.sum(), given.logps, retain_graph=True)
    found = torch.autograd.grad(made.sum(), given.logps)
    torch.testing.assert_close(found, wanted, **EXACT)


# AMoPO with static weights, as RACO's authors run it


def test_amopo_with_static_weights_is_raco_s_baseline(shared) -> None:
    """No instruction, no margin, and each dimension's own winner."""
    for case in golden(shared, "amopo_static_by_raco"):
        logps = tensor(case["token_logps"]).requires_grad_()
        signs = tensor(case["signs"])
        mask = tensor(case["mask"])
        both = [
            torch.stack(
                [torch.where(sign[:, None, None] > 0, values, values.flip(1)) for sign in signs.T],
                dim=1,
            )
            for values in (logps, mask)
        ]
        result = amopo_loss(
            *both,
            beta=case["beta"],
            gamma=case["gamma"],
            weighting="static",
            static_weights=tensor(case["weights"]),
        )
        expected = case["expected"]
        torch.testing.assert_close(result.loss, tensor(expected["loss"]), **RECORDED)
        by_objective = tensor(expected["loss_by_objective"])
        torch.testing.assert_close(result.pair_losses.mean(0), by_objective, rtol=1e-7, atol=1e-7)
        result.loss.backward()
        gradient = tensor(expected["grad_wrt_sequence_logps"])
        torch.testing.assert_close(logps.grad[:, :, 0], gradient, **RECORDED)


# What is logged


def test_metrics_of_lists_and_of_single_responses() -> None:
    given = lists(27)
    given = given._replace(counts=torch.tensor([1.0, 1.0, 0.0]), signs=given.signs + 1)
    ratings = given.ratings.clone()
    ratings[1, :, 0] = torch.nan
    given = given._replace(ratings=ratings)
    outcome = LambdaDPO()(given, None)
    metrics = example_metrics(outcome, given, ["a", "b"])
    assert all(values.shape == (3,) for values in metrics.values())
    torch.testing.assert_close(metrics["amopo/a/loss"][0], outcome.losses[0, 0].float())
    assert metrics["amopo/a/loss"][1:].isnan().all()  # no list; and an example that only pads
    assert metrics["amopo/b/weight"][:2].tolist() == [0.5, 0.5]
    margins = outcome.rewards[:, 0].diff(dim=-1).neg().mean(-1)
    torch.testing.assert_close(metrics["amopo/b/margin"][0], margins[0].float())

    single = example_metrics(RiC()(given, None), given, ["a", "b"])
    assert set(metrics) - set(single) == {
        f"amopo/{name}/{metric}" for name in "ab" for metric in ("loss", "weight")
    }
    torch.testing.assert_close(single["loss"], losses_of(RiC(), given).float())


def test_every_paper_is_cited() -> None:
    for name, kind in OBJECTIVES.items():
        paper = kind.paper
        assert paper.url.startswith("https://arxiv.org/abs/") and paper.url in paper.citation, name
        assert paper.citation.count("{") == paper.citation.count("}"), name
        assert OBJECTIVES[name].paper is not DPO.paper or name == "dpo"
