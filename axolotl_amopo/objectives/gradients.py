"""K gradients -> one step: how the gradients of the criteria's losses are combined.

Every rule takes the Gram matrix of the gradients, H_ij = g_i . g_j, and returns [K] coefficients a;
the step is sum_k a_k g_k. So the gradients may stay where they are, sharded or not: K * K numbers
are all that is needed of them. Solved in float64 on the CPU.

    cagrad          g_0 + c |g_0| G_p / |G_p|,  p = argmin of g_0 . G_p + c |g_0| |G_p|
                    (Liu et al., 2021, https://arxiv.org/abs/2110.14048; clipped: RACO)
    mgda            G_p,  p = argmin of |G_p|  (Desideri, 2012; Sener and Koltun, 2018)
    mgda_decoupled  G_p,  p = argmin of |sum_k p_k g_k / L_k|

with G_p = sum_k p_k g_k, p on the simplex, and g_0 = sum_k w_k g_k. All are statements about plain
gradient descent; Adam rescales the step afterwards.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from axolotl_amopo.objectives.base import Outcome, Responses, hyperparameter

# What float64 makes of equal numbers of about 1: of a square, and of its root.
EPSILON = 1e-14
ROOT = 1e-7


def gram(gradients: Tensor) -> Tensor:
    """Return [K, K] float64, the inner products of gradients [K, D]."""
    wide = gradients.detach().double()
    return wide @ wide.T


def cagrad(gram: Tensor, weights: Tensor, *, c: float, clip: bool = False) -> Tensor:
    """Return the coefficients [K] of the conflict-averse step.

    Args:
        gram: [K, K].
        weights: [K] the user's, which should sum to 1.
        c: how far the step may be from g_0, as a share of |g_0|; from 0 to below 1.
        clip: take min(p, w) for p, not scaled up again (RACO).
    """
    gram, weights = _on_cpu(gram), _on_cpu(weights)
    if not gram.isfinite().all():
        return torch.full_like(weights, torch.nan)
    step = _norm(gram, weights)
    if c * step == 0:
        return weights
    p = cagrad_weights(gram, weights, c=c)
    if clip:
        p = torch.minimum(p, weights)
    length = _norm(gram, p)
    # Where the mixture is 0 but for rounding, so is its direction.
    if length <= ROOT * gram.diagonal().max().sqrt():
        return weights
    return weights + c * step / length * p


def cagrad_weights(gram: Tensor, weights: Tensor, *, c: float) -> Tensor:
    """Return p [K] on the simplex, the minimiser of g_0 . G_p + c |g_0| |G_p|.

    For any t, p(t) = argmin of |G_p|^2 / 2 + t / (c |g_0|) * g_0 . G_p is found exactly, and t is
    the only number with |G_p(t)| = t, because c |g_0| |G_p| is the least c |g_0| / 2 *
    (|G_p|^2 / t + t) over t. Equal gradients share what falls to them by their weights, which the
    minimum leaves open.

    Args:
        gram, weights, c: as for `cagrad`.
    """
    gram, weights = _on_cpu(gram), _on_cpu(weights)
    towards = gram @ weights / (c * _norm(gram, weights))
    low, high = 0.0, gram.diagonal().max().sqrt().item()
    p = _minimise(gram, high * towards)
    for _ in range(100):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        p = _minimise(gram, middle * towards)
        if _norm(gram, p) > middle:
            low = middle
        else:
            high = middle
    norms = gram.diagonal()
    apart = norms.unsqueeze(0) + norms.unsqueeze(1) - 2 * gram  # [K, K] |g_i - g_j|^2
    same = (apart <= 100 * EPSILON * norms.max()).double()
    shares = weights / (same @ weights)
    return torch.where(shares.isfinite(), shares, 1 / same.sum(-1)) * (same @ p)


def mgda(gram: Tensor) -> Tensor:
    """Return the coefficients [K] of the shortest vector between the gradients.

    Args:
        gram: [K, K].
    """
    gram = _on_cpu(gram)
    if not gram.isfinite().all():
        return torch.full_like(gram[0], torch.nan)
    return _minimise(gram, torch.zeros_like(gram[0]))


def mgda_decoupled(gram: Tensor, losses: Tensor) -> Tensor:
    """Return the coefficients [K] of `mgda` on gradients that are divided by their losses.

    Args:
        gram: [K, K].
        losses: [K] above 0.
    """
    inverse = 1 / _on_cpu(losses).clamp(min=torch.finfo(torch.float32).tiny)
    return mgda(_on_cpu(gram) * inverse * inverse.unsqueeze(-1))


@dataclass(frozen=True)
class Gradients:
    """Combine the gradients of the criteria's losses into one step.

    The criteria's losses must weigh the same in every example, so it goes with no other setting
    that changes weights or adds a term.
    """

    gradients: Literal["sum", "cagrad", "mgda", "mgda_decoupled"] = hyperparameter(
        "sum", "How the criteria's gradients become one: sum, cagrad, mgda, mgda_decoupled"
    )
    c: float = hyperparameter(
        0.4, "Of cagrad: how far from the sum, as a share of its length", at_least=0, below=1
    )
    clip: bool = hyperparameter(
        True, "Of cagrad: no criterion's correction exceeds its weight (RACO)"
    )

    def __post_init__(self) -> None:
        given = [name for name in ("c", "clip") if getattr(self, name) != getattr(Gradients, name)]
        if given and self.gradients != "cagrad":
            raise ValueError(
                f"{given[0]}: has no effect with gradients: {self.gradients}; remove it"
            )

    @property
    def needs(self) -> frozenset[str]:
        """Return the criteria's gradients, but for their sum."""
        return frozenset() if self.gradients == "sum" else frozenset({"gradients"})

    def __call__(self, outcome: Outcome, responses: Responses) -> Outcome:
        """Return the outcome as it is: the rule acts on gradients, see `coefficients`."""
        return outcome

    @property
    def finds_weights(self) -> bool:
        """Return whether the user's weights have no part in the step."""
        return self.gradients in ("mgda", "mgda_decoupled")

    def coefficients(self, gram: Tensor, weights: Tensor, losses: Tensor) -> Tensor:
        """Return [K] float64, how much of each gradient the step has.

        Args:
            gram: [K, K] of the gradients of the criteria's unweighted losses.
            weights: [K] the user's.
            losses: [K] the criteria's mean losses.
        """
        match self.gradients:
            case "cagrad":
                return cagrad(gram, weights, c=self.c, clip=self.clip)
            case "mgda":
                return mgda(gram)
            case "mgda_decoupled":
                return mgda_decoupled(gram, losses)
            case "sum":
                return _on_cpu(weights)


def _minimise(gram: Tensor, linear: Tensor) -> Tensor:
    """Return p [K] on the simplex that minimises p . gram p / 2 + linear . p.

    Wolfe's active-set method (Finding the nearest point in a polytope, 1976), exact after finitely
    many steps: the minimum over the plane through the active corners is a linear system. The active
    corner whose share falls below 0 on the way there leaves; the corner towards which the function
    falls most comes in; there is none at the minimum.

    Args:
        gram: [K, K] positive semidefinite.
        linear: [K] a combination of the rows of `gram`, or 0.
    """
    scale = max(gram.diagonal().max().item(), linear.abs().max().item()) or 1.0
    gram, linear = gram / scale, linear / scale
    start = int((gram.diagonal() / 2 + linear).argmin())
    p = torch.zeros_like(linear)
    p[start] = 1.0
    active = [start]
    for _ in range(100 * len(p)):  # far more than it takes; rounding might let it go in circles
        slopes = gram @ p + linear
        best = int(slopes.argmin())
        if best in active or slopes[best] >= p @ slopes - EPSILON:
            break
        active.append(best)
        while True:
            wanted = torch.zeros_like(p)
            wanted[active] = _on_plane(gram[active][:, active], linear[active])
            if (wanted[active] > EPSILON).all():
                p = wanted
                break
            falling = [k for k in active if wanted[k] <= EPSILON]
            ways = p[falling] / (p[falling] - wanted[falling]).clamp(min=EPSILON)
            p = p + ways.min().clamp(max=1.0) * (wanted - p)
            leaving = falling[int(ways.argmin())]
            p[leaving] = 0.0
            active.remove(leaving)
    return p.clamp(min=0.0) / p.clamp(min=0.0).sum()


def _on_plane(gram: Tensor, linear: Tensor) -> Tensor:
    """Return the minimiser of p . gram p / 2 + linear . p among all p that sum to 1."""
    count = len(linear)
    system = torch.ones(count + 1, count + 1, dtype=gram.dtype)
    system[:count, :count] = gram
    system[count, count] = 0.0
    right = torch.cat([-linear, torch.ones(1, dtype=gram.dtype)])
    return torch.linalg.lstsq(system, right.unsqueeze(-1), driver="gelsd").solution[:count, 0]


def _on_cpu(values: Tensor) -> Tensor:
    return values.detach().to("cpu", torch.float64)


def _norm(gram: Tensor, p: Tensor) -> float:
    """Return |sum_k p_k g_k|."""
    return (p @ gram @ p).clamp(min=0.0).sqrt().item()
