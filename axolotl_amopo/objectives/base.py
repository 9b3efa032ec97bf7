"""The contract of an objective: what it is given, what it returns, and what several compute.

An example has K prompts, N responses, and comparisons of two of the responses. A comparison is
judged by C criteria: a preference dimension, or the overall rating. A criterion reads a comparison
under one of the prompts, and says by a sign which of the two responses is the better one.

Axes: B examples, K prompts, N responses of an example, T tokens of a response, P comparisons of
the batch, C criteria, R references. Where examples differ in K or N, the rest is padding.
"""

import hashlib
import random
from collections.abc import Mapping
from dataclasses import field
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, Self

import torch
from torch import Tensor

# A log-probability this low is the result of an overflow upstream. Held here, it costs a large
# but finite loss; as -inf it would turn the margin of two such responses into NaN.
MIN_LOGP = -1e6


class Responses(NamedTuple):
    """The responses of a batch, as the policy sees them and as people rated them.

    >>> responses = Responses.of_pairs(token_logps, mask)  # both [B, K, 2, T], chosen first
    >>> SimPO(beta=2.0, gamma=0.5)(responses, None).losses  # [B, K]
    """

    logps: Tensor  # [B, K, N, T] log pi(y_t | x_k, y_<t) in nats; carries the gradient
    mask: Tensor  # [B, K, N, T] bool, true at response tokens
    comparisons: Tensor  # [P, 3] example, and the places of its two responses
    reads: Tensor  # [P, C] the prompt under which a criterion reads a comparison
    signs: Tensor  # [P, C] +1 the first response wins, -1 the second, 0 the criterion says nothing
    ratings: Tensor | None = None  # [B, N, C] on 0 to 1, 1 the better end; NaN where missing
    points: Tensor | None = None  # [B, C] width of a criterion's scale, in rating points
    weights: Tensor | None = None  # [B, C] of the criteria: the user's, or those that were drawn
    fit: Tensor | None = None  # [B, K, N] how near a response's rating is to what prompt k asks
    reference: Tensor | None = None  # [R, B, K, N] log pi_ref(y | x_k), summed over tokens, nats
    counts: Tensor | None = None  # [B] 1, or an example's tokens; 0 where it only pads a pass
    ids: Tensor | None = None  # [B] what seeds an example's draws

    @classmethod
    def of_pairs(
        cls, token_logps: Tensor, mask: Tensor, signs: Tensor | None = None, **others: Any
    ) -> Self:
        """Return responses where every example is one pair, and every prompt its own criterion.

        Args:
            token_logps: [B, K, 2, T].
            mask: [B, K, 2, T].
            signs: [B, K]; by default the first response wins everywhere.
            others: further fields.
        """
        (examples, prompts), device = token_logps.shape[:2], token_logps.device
        first = torch.zeros(examples, dtype=torch.long, device=device)
        if signs is None:
            signs = torch.ones(examples, prompts, dtype=torch.long, device=device)
        numbers = torch.arange(examples, device=device)
        reads = torch.arange(prompts, device=device).expand(examples, -1)
        comparisons = torch.stack([numbers, first, first + 1], dim=-1)
        return cls(token_logps, mask.bool(), comparisons, reads, signs, **others)

    def required(self, name: str) -> Tensor:
        """Return an optional field that the objective needs.

        Raises:
            ValueError: where it is not there.
        """
        value = getattr(self, name)
        if value is None:
            raise ValueError(f"this objective needs `{name}` of the responses")
        return value

    def winner_first(self, values: Tensor) -> Tensor:
        """Return each comparison's values by criterion, the winner's first.

        Args:
            values: [B, K, N, ...] one entry per response under each prompt.

        Returns:
            [P, C, 2, ...]; where a criterion says nothing, the comparison's first response first.
        """
        examples, places = self.comparisons[:, :1], self.comparisons[:, 1:]
        second_wins = (self.signs < 0).long()  # [P, C]
        sides = torch.stack([second_wins, 1 - second_wins], dim=-1)  # [P, C, 2]
        rows = torch.arange(len(places), device=places.device)[:, None, None]
        return values[examples.unsqueeze(-1), self.reads.unsqueeze(-1), places[rows, sides]]

    def rating_gaps(self) -> Tensor:
        """Return by how much a criterion rates its winner above its loser.

        Returns:
            [P, C] on 0 to 1. Negative where the winner is not the criterion's own, 0 where the
            criterion says nothing, NaN where a rating is missing. No gradient.
        """
        examples, places = self.comparisons[:, :1], self.comparisons[:, 1:]
        first, second = self.required("ratings").detach()[examples, places].unbind(1)  # [P, C]
        return self.signs * (first - second)

    def per_comparison(self, values: Tensor) -> Tensor:
        """Return the values of each comparison's example: [B, ...] -> [P, ...]."""
        return values[self.comparisons[:, 0]]

    def comparisons_per_example(self) -> Tensor:
        """Return [B], how many comparisons each example has."""
        examples = self.comparisons[:, 0]
        # Not bincount, for which a GPU has to be waited for.
        return examples.new_zeros(len(self.logps)).index_add(0, examples, torch.ones_like(examples))


class Outcome(NamedTuple):
    """Hold what an objective returns: losses, their weights, and rewards.

    What a row and a column of the losses stand for is said by `per`:

        "comparison"  [P, C] of the criteria in each comparison
        "example"     [B, C] of the criteria in each example: listwise
        "response"    [B, N] of the responses of each example: supervised
    """

    losses: Tensor  # [P, C], [B, C] or [B, N]
    weights: Tensor  # the same shape, how much each loss counts; no gradient
    rewards: Tensor  # [B, K, N] implicit reward of each response; metrics read it without gradient
    terms: dict[str, Tensor]  # [B] each: what is added to an example's loss, and logged by its name
    margins: Tensor | None = None  # [P, C] where the losses are -log sigmoid(margins), else None
    per: Literal["comparison", "example", "response"] = "comparison"


class Paper(NamedTuple):
    """Where an objective comes from, for the card of a model that was trained with it."""

    name: str  # the method's, as its authors write it
    url: str
    citation: str  # BibTeX


class Objective(Protocol):
    """A frozen dataclass whose fields are keys of the `amopo:` block.

    `beta` is axolotl's `rl_beta`. Every other field is a key of its own name, made with
    `hyperparameter`. Where the loss aims at a margin between rewards, a property `target_margin`
    returns it; for reports.
    """

    paper: ClassVar[Paper]
    #: Keys of the `amopo:` block that this objective wants otherwise than AMoPO has them.
    defaults: ClassVar[Mapping[str, Any]]

    @property
    def beta(self) -> float:
        """Return the scale of the rewards."""
        ...

    @property
    def needs(self) -> frozenset[str]:
        """Return what must be supplied beside log-probabilities.

        Optional fields of `Responses` by their names, and of what kind they are:

            references     `reference` has two models' log-probabilities
            drawn_weights  `weights` were drawn for the example, and stand in its prompts
            all_responses  an example has every response of its prompt, also those in no comparison
            token_counts   `counts` are numbers of response tokens: the mean is one over tokens
            gradients      the gradient of each criterion's loss, to be combined
        """
        ...

    def __call__(self, responses: Responses, draw: "Draw | None") -> Outcome:
        """Return the losses; `draw` is None at evaluation, which must be deterministic."""
        ...


class Setting(Protocol):
    """A frozen dataclass that changes an objective's outcome; its fields are keys of the block.

    With the default of its first field it changes nothing.
    """

    @property
    def needs(self) -> frozenset[str]:
        """Return what must be supplied, as in `Objective`."""
        ...

    def __call__(self, outcome: Outcome, responses: Responses) -> Outcome:
        """Return the changed outcome."""
        ...


def hyperparameter(
    default: Any,
    description: str,
    *,
    above: float | None = None,
    at_least: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    least_weight: float | None = None,
) -> Any:
    """Return the dataclass field of a hyperparameter, with what the YAML's check needs to know.

    Args:
        default: its value where nothing is given.
        description: for people.
        above, at_least, at_most, below: bounds.
        least_weight: of a field that is the number of a criterion; its key in the YAML is the name
            of a dimension, by default the first one, whose share of the weights must be this high.
    """
    bounds = {"gt": above, "ge": at_least, "le": at_most, "lt": below}
    given = {name: bound for name, bound in bounds.items() if bound is not None}
    about = {"description": description, "bounds": given, "least_weight": least_weight}
    return field(default=default, metadata=about)


def example_losses(outcome: Outcome, responses: Responses) -> Tensor:
    """Return [B], the loss of each example; a batch's loss is their mean, weighted by `counts`.

    The weighted sum of an example's losses, for pairs the mean of it over the comparisons, plus the
    terms.
    """
    losses = example_means((outcome.weights * outcome.losses).sum(-1), responses)
    for term in outcome.terms.values():
        losses = losses + term
    return losses


def example_means(values: Tensor, responses: Responses) -> Tensor:
    """Return [B], the mean over an example's comparisons of values [P]; values [B] as they are."""
    if len(values) == len(responses.logps):  # an example has at least one comparison
        return values
    sums = values.new_zeros(len(responses.logps))
    sums = sums.index_add(0, responses.comparisons[:, 0], values)
    return sums / responses.comparisons_per_example()


class ResponseStats(NamedTuple):
    """What one response looks like to the policy, each [..., ] without the token axis."""

    avg_logp: Tensor  # mean log-probability per token, in nats; carries the gradient
    prob_mean: Tensor  # mean of the tokens' probabilities, 0 to 1; no gradient
    prob_std: Tensor  # their standard deviation (n - 1), 0 below two tokens; no gradient
    tokens: Tensor  # how many there are


def response_stats(token_logps: Tensor, mask: Tensor) -> ResponseStats:
    """Return the average log-probability, and the Gaussian fitted to the token probabilities.

    Args:
        token_logps: [..., T] log pi(y_t | x, y_<t) in nats. Entries outside `mask` are ignored,
            whatever they hold.
        mask: [..., T] true (or non-zero) where a response token stands.
    """
    mask = mask.bool()
    logps = _held(token_logps, mask)
    count = mask.sum(-1)
    avg_logp = logps.sum(-1) / count.clamp(min=1)

    with torch.no_grad():
        probs = logps.exp().masked_fill(~mask, 0.0)
        prob_mean = probs.sum(-1) / count.clamp(min=1)
        deviation = (probs - prob_mean.unsqueeze(-1)).masked_fill(~mask, 0.0)
        # One token has no spread; torch.std would give NaN, which the published code raises on.
        prob_std = (deviation.square().sum(-1) / (count - 1).clamp(min=1)).sqrt()
    return ResponseStats(avg_logp, prob_mean, prob_std, count)


def response_sums(token_logps: Tensor, mask: Tensor) -> Tensor:
    """Return [...], log pi(y | x) of each response: the sum over its tokens, in nats.

    Args:
        token_logps, mask: [..., T] as for `response_stats`.
    """
    return _held(token_logps, mask.bool()).sum(-1)


def reference_sums(responses: Responses, like: Tensor, number: int = 0) -> Tensor:
    """Return [B, K, N], log pi_ref(y | x) of each response, in nats; 0 where there is none.

    Args:
        responses: with `reference`.
        like: a tensor of the wanted type and device.
        number: which of the R references.

    Returns:
        A tensor without gradient.
    """
    sums = responses.required("reference")[number].detach().to(like).clamp(min=MIN_LOGP)
    return sums.masked_fill(~responses.mask.any(-1), 0.0)


def log_ratios(responses: Responses, *, per_token: bool) -> Tensor:
    """Return [B, K, N], log pi(y | x) - log pi_ref(y | x) of each response, in nats.

    Args:
        responses: with `reference`, of which the first one is taken.
        per_token: divide by the response's tokens.
    """
    sums = response_sums(responses.logps, responses.mask)
    ratios = sums - reference_sums(responses, sums)
    return ratios / responses.mask.sum(-1).clamp(min=1) if per_token else ratios


def _held(token_logps: Tensor, mask: Tensor) -> Tensor:
    """Return log-probabilities of at least 32 bits, 0 outside the mask, none below MIN_LOGP."""
    if token_logps.dtype in (torch.float16, torch.bfloat16):
        token_logps = token_logps.float()
    return token_logps.masked_fill(~mask, 0.0).clamp(min=MIN_LOGP)


class Draw:
    """Random numbers of one optimizer step.

    They depend on the run's seed, the step and the example alone. So a resumed run goes on with the
    same draws, and neither the micro batch size nor the number of processes changes them.
    """

    def __init__(self, seed: int, step: int):
        self.seed = seed
        self.step = step

    def normal(self, ids: Tensor, counts: Tensor, *shape: int) -> Tensor:
        """Return standard normal numbers, `counts[b]` times `shape` of them for each example.

        Args:
            ids: [B].
            counts: [B], e.g. how many comparisons each example has.

        Returns:
            [sum of counts, *shape] float32 on the device of `ids`.
        """
        draws = [
            torch.randn(count, *shape, generator=self._generator(example))
            for example, count in zip(ids.tolist(), counts.tolist(), strict=True)
        ]
        return torch.cat(draws).to(ids.device)

    def dirichlet(self, concentration: float, size: int) -> Tensor:
        """Return [size] float64 weights from a symmetric Dirichlet distribution, one per step.

        Args:
            concentration: 1 draws all weights alike, less prefers corners, more the centre.
            size: how many weights, which sum to 1.
        """
        numbers = random.Random(f"{self.seed} {self.step}")
        drawn = [numbers.gammavariate(concentration, 1.0) for _ in range(size)]
        return torch.tensor(drawn, dtype=torch.float64) / sum(drawn)

    def _generator(self, example: int) -> torch.Generator:
        key = f"{self.seed} {self.step} {example}".encode()
        digest = hashlib.blake2b(key, digest_size=8).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
