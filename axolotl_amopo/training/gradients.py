"""One step from the gradients of several criteria: `amopo.gradients`, `amopo.gradient_cosines`.

The gradient of each criterion's loss is summed over the micro batches and processes of an optimizer
step; their inner products say how much of each the step has (`objectives/gradients.py`), and
whether the criteria pull in one direction.

The gradients with respect to the log-probabilities come first, and cost next to nothing. Where an
example has one prompt, those of its criteria are multiples of one another: a pair's criteria differ
in sign and size alone. So one backward pass per example serves all criteria, and never more than
one per criterion are needed.
"""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from axolotl_amopo.model.forward import TokenLogps
from axolotl_amopo.objectives import Outcome, Responses
from axolotl_amopo.objectives.base import example_means
from axolotl_amopo.objectives.gradients import Gradients

if TYPE_CHECKING:
    from axolotl_amopo.training.trainer import AMoPOTrainer

# What is left of a vector when its multiple is taken off, as a share of its length.
COLLINEAR = 1e-5


class Judged(NamedTuple):
    """A micro batch, and what the objective makes of it."""

    given: Responses
    outcome: Outcome
    factor: float | Tensor  # of its losses in those of the optimizer step
    loss: Tensor


class CombinedGradients:
    """The gradients of an optimizer step, by criterion.

    Args:
        trainer: whose model is trained.
        rule: how they become one; None adds them up as the loss does, for their cosines alone.
        weights: [C] the user's, which sum to 1; None without a rule.
    """

    def __init__(
        self, trainer: "AMoPOTrainer", rule: Gradients | None = None, weights: Tensor | None = None
    ):
        self.trainer, self.rule, self.weights = trainer, rule, weights
        self.metrics: dict[str, float] = {}
        self._start()

    def _start(self) -> None:
        self.gradients: dict[str, list[Tensor]] = {}  # [C] by parameter
        self.losses: Tensor | None = None  # [C]
        self.last: Tensor | None = None  # [C] how much of the pass to come each criterion has

    def loss(
        self,
        forward: Callable[[], TokenLogps],
        judge: Callable[[TokenLogps], Judged],
        backward: Callable[..., None],
        *,
        again: bool,
    ) -> Tensor:
        """Return a micro batch's loss, whose backward pass is the last that its gradients need.

        The others have run when it is returned. `collect` must follow its backward pass.

        Args:
            forward: returns log-probabilities.
            judge: returns what the objective makes of them.
            backward: runs a backward pass without synchronising, see `replayed_loss`; passes
                `retain_graph` on.
            again: whether each backward pass wants a forward pass of its own, as FSDP2's do.
        """
        found = forward()
        logps = found.logps.detach().requires_grad_()
        given, outcome, factor, loss = judge(found._replace(logps=logps))
        of_criteria = criterion_losses if self.rule else shares_of_loss
        losses = of_criteria(outcome, given) * factor  # [C]
        wanted = torch.stack(
            [torch.autograd.grad(one, logps, retain_graph=True)[0] for one in losses]
        )  # [C, B, K, N, T]
        self.losses = losses.detach() + (0.0 if self.losses is None else self.losses)

        def product(found: TokenLogps, direction: Tensor) -> Tensor:
            return (found.logps * direction).sum()

        *others, (last, shares) = directions(wanted)
        for direction, of_criteria in others:
            self.last = of_criteria
            backward(partial(product, found, direction), retain_graph=not again)
            self.collect()
            found = forward() if again else found
        self.last = shares
        mine = product(found, last)
        return loss.detach() + (mine - mine.detach())

    def collect(self) -> None:
        """Take the gradients of a backward pass off the parameters."""
        shares = self.last
        assert shares is not None
        for name, parameter in self._trained():
            if (grad := parameter.grad) is None:
                continue
            parameter.grad = None
            kept = self.gradients.setdefault(name, [torch.zeros_like(grad) for _ in shares])
            for total, share in zip(kept, shares.tolist(), strict=True):
                total.add_(grad, alpha=share)

    def finish(self) -> None:
        """Give the parameters the gradient of the step."""
        accelerator, sharded = self.trainer.accelerator, self.trainer.is_fsdp_enabled
        assert self.losses is not None
        count = len(self.losses)
        products = torch.zeros(count, count, dtype=torch.float64)
        for kept in self.gradients.values():
            if dist.is_initialized() and not sharded:
                for i, total in enumerate(kept):
                    kept[i] = accelerator.reduce(total, reduction="mean")
            local = [t.to_local() if isinstance(t, DTensor) else t for t in kept]
            flat = torch.stack([t.flatten() for t in local]).double()
            products += (flat @ flat.T).cpu()
        losses = accelerator.reduce(self.losses, reduction="mean")
        if sharded:
            products = accelerator.reduce(products.to(losses.device), reduction="sum").cpu()
        a = [1.0] * count
        if self.rule and self.weights is not None:
            a = self.rule.coefficients(products, self.weights, losses).tolist()  # [C]
        for name, parameter in self._trained():
            if kept := self.gradients.get(name):
                parameter.grad = sum(
                    (total * share for total, share in zip(kept[1:], a[1:], strict=True)),
                    kept[0] * a[0],
                )
        self._measure(products, a)
        self._start()

    def _measure(self, products: Tensor, a: list[float]) -> None:
        names = self.trainer.amopo.criteria
        lengths = products.diagonal().sqrt()
        cosines = products / (lengths[:, None] * lengths).clamp(min=1e-30)
        self.metrics = {}
        if self.rule:
            self.metrics = {
                f"gradients/{name}/share": share for name, share in zip(names, a, strict=True)
            }
        for i, one in enumerate(names):
            for j, other in enumerate(names[:i]):
                self.metrics[f"gradients/{other}-{one}/cosine"] = cosines[i, j].item()

    def _trained(self) -> list[tuple[str, nn.Parameter]]:
        named = self.trainer.model.named_parameters()
        return [(name, parameter) for name, parameter in named if parameter.requires_grad]


def criterion_losses(outcome: Outcome, given: Responses) -> Tensor:
    """Return [C], each criterion's mean loss over examples, unweighted; a tie adds nothing."""
    said = outcome.losses * (given.signs != 0)  # [P, C]
    means = torch.stack([example_means(losses, given) for losses in said.unbind(-1)])  # [C, B]
    counts: Any = given.counts
    return (means if counts is None else means * counts).mean(-1)


def shares_of_loss(outcome: Outcome, given: Responses) -> Tensor:
    """Return [C], what each criterion adds to the mean loss, and the terms, if any, as one more."""
    weighted = outcome.weights * outcome.losses  # [P, C] or [B, C]
    shares = [example_means(losses, given) for losses in weighted.unbind(-1)]
    if outcome.terms:
        shares.append(sum(outcome.terms.values(), torch.zeros_like(shares[0])))
    means, counts = torch.stack(shares), given.counts  # [C, B] or [C + 1, B]
    return (means if counts is None else means * counts).mean(-1)


def directions(wanted: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return vectors of which all rows are sums, and how much each row has of each.

    Args:
        wanted: [C, B, ...].

    Returns:
        Pairs of a vector [B, ...] and its shares [C]: one per example, if there are fewer of them
        than of rows and the rows of each example are multiples of one vector; else the rows.
    """
    rows, examples = wanted.shape[:2]
    if examples < rows:
        found = []
        for b in range(examples):
            of_example = wanted[:, b].flatten(1)  # [C, M]
            longest = of_example[int(of_example.norm(dim=-1).argmax())]
            length = longest.square().sum()
            shares = of_example @ longest / length.clamp(min=torch.finfo(length.dtype).tiny)
            left = of_example - shares.unsqueeze(-1) * longest
            if left.norm() > COLLINEAR * of_example.norm():
                break
            direction = torch.zeros_like(wanted[0])
            direction[b] = longest.view_as(direction[b])
            found.append((direction, shares))
        else:
            return found
    return list(zip(wanted, torch.eye(rows, device=wanted.device), strict=True))
