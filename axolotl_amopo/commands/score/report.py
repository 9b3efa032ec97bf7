"""Score models on rated pairs: how often each orders them as the ratings do.

Example:

    report, scored = score("config.yml")
    report.summary
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

import numpy as np
from axolotl.cli.config import load_cfg
from axolotl.loaders import load_tokenizer

from axolotl_amopo.commands.kit import text
from axolotl_amopo.commands.kit.margins import (
    FEW_PROMPTS,
    AccuracyChange,
    Measures,
    agreement,
    change,
    correct,
    holm,
    intervals,
    measure,
)
from axolotl_amopo.commands.score.data import RatedPairs, Split, rated_pairs
from axolotl_amopo.commands.score.rewards import ModelPath, Reward, default_models, model_rewards
from axolotl_amopo.config.block import AMoPOConfig, read_block
from axolotl_amopo.config.references import INITIAL
from axolotl_amopo.errors import ConfigError
from axolotl_amopo.objectives import Objective
from axolotl_amopo.objectives.base import log_ratios, response_stats, response_sums
from axolotl_amopo.objectives.describe import describe
from axolotl_amopo.training.runs import reward_name

RewardName = Literal["objective", "average", "sum", "reference"]
REWARDS: tuple[str, ...] = get_args(RewardName)
Prompting = Literal["own", "plain"]
SIGNIFICANT = 0.05

# Of rewards that are not the objective's own: whether they take a reference, and means over tokens.
KINDS = {"average": (False, True), "sum": (False, False), "reference": (True, False)}


@dataclass
class ScoreRow:
    """Hold the measures of the pairs that one rating orders, under one kind of prompt."""

    prompting: Prompting
    name: str  # overall, or a dimension
    models: dict[str, Measures]
    changes: dict[str, AccuracyChange] = field(
        default_factory=dict
    )  # of the other models against the base


@dataclass
class Agreement:
    """Hold the shares [K, K] of pairs that two ratings, or two prompts, order alike.

    None where no pair has both.
    """

    ratings: list[list[float | None]]
    models: dict[str, list[list[float | None]]]


@dataclass
class ScoreReport:
    """Hold what `axolotl amopo score` says of a config's models."""

    config: str
    source: str
    pairs: int
    prompts: int
    total_pairs: int
    reward: RewardName
    reward_name: str  # what it is, but for the factor rl_beta
    beta: float
    reference: str | None  # path of the model that the reward is relative to
    titles: dict[Prompting, str]  # under what the models read the pairs
    base: str | None  # the name of the model that the others are compared with
    paths: dict[str, str]  # of the models that were scored, by name
    rows: list[ScoreRow]
    agreement: Agreement | None  # with more than one prompt that has an instruction of its own
    summary: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Return what programs read."""
        return asdict(self)

    def block(self, prompting: Prompting) -> list[ScoreRow]:
        """Return the rows of one kind of prompt."""
        return [row for row in self.rows if row.prompting == prompting]


@dataclass
class ScoredPairs:
    """Hold the pairs of a report, and every model's margins on them."""

    pairs: RatedPairs
    margins: dict[str, np.ndarray]  # by model: [N, P] reward of the first response less the other's

    def oriented(self, model: str, prompting: Prompting, k: int) -> np.ndarray:
        """Return margins [n] of the pairs that rating k orders, above 0 where the model agrees."""
        label = self.pairs.labels[:, k]
        column = k if prompting == "own" else -1
        return (label * self.margins[model][:, column])[label != 0]

    def lines(self) -> Iterator[dict[str, Any]]:
        """Yield one object per pair, for programs."""
        pairs = self.pairs
        prompts = [*pairs.names, "plain"]
        for n, where in enumerate(pairs.where):
            yield {
                "where": where,
                "prompt": int(pairs.prompts[n]),
                "tokens": pairs.lengths[n].tolist(),
                "labels": dict(zip(pairs.names, pairs.labels[n].tolist(), strict=True)),
                "gaps": dict(zip(pairs.names, none_for_nan(pairs.gaps[n]), strict=True)),
                "margins": {
                    name: dict(zip(prompts, none_for_nan(margins[n]), strict=True))
                    for name, margins in self.margins.items()
                },
            }


def score(
    path: str,
    *,
    models: list[ModelPath] | None = None,
    base: str | None = None,
    with_base: bool = True,
    split: Split = "test",
    limit: int | None = None,
    seed: int = 0,
    reward: RewardName | None = None,
    prompts: Literal["both", "own", "plain"] = "both",
    batch_pairs: int = 2,
    progress: Callable[[str, int], Callable[[int], None]] = lambda name, total: lambda done: None,
) -> tuple[ScoreReport, ScoredPairs]:
    """Score a config's models on its rated pairs.

    Args:
        models: compared with the base; by default the model in the config's `output_dir`.
        base: any model; by default the config's `base_model`.
        with_base: false scores the models alone.
        split, limit, seed: see `rated_pairs`; the seed is the bootstrap's too.
        reward: how log-probabilities become rewards. `objective`: as the config's objective has it,
            against the model as training found it where that has a reference; `average`: the mean
            log-probability per token; `sum`: its sum; `reference`: the sum less the base's. By
            default `objective`, but `average` for several models, which every model has.
        prompts: `own` with the instructions of training, `plain` without any, or `both`, which is
            `own` where training had no instructions.
        batch_pairs: pairs per forward pass.
        progress: called with a model's name and the number of pairs; what it returns is called
            with the number of pairs that were just scored.

    Raises:
        AMoPOError: for a config, data or model that can't be used.
    """
    cfg = load_cfg(path, is_preprocess=True)
    if not (cfg.amopo and cfg.amopo.enabled):
        raise ConfigError(f"{path}: has no `rl: amopo`; it names no rated data to score with.")
    config = read_block(cfg)
    objective = config.make_objective(cfg.rl_beta)
    notes = []
    if models is None:
        models = default_models(cfg)
        if not models:
            notes.append(
                f"There is no model in output_dir, {cfg.output_dir}; name one with --model."
            )
    against = ModelPath("base", base or cfg.base_model) if with_base else None
    if reward is None:
        reward = "objective" if len(models) < 2 else "average"
        if len(models) > 1:
            notes.append(
                "Several models are compared by one reward that all of them have, the mean "
                "log-probability per token: it needs no model's own reference, and length earns "
                f"nothing. --reward objective takes the one of {config.objective}, for all."
            )
    reference = None
    if reward == "reference":
        reference = against
        if against is None or not models:
            raise ConfigError(
                "--reward reference needs a base model and another to hold against it."
            )
    elif reward == "objective" and describe(objective).reference:
        # As training found it, an adapter that it goes on from belongs to it.
        first = config.references[0]
        start = cfg.lora_model_dir or cfg.base_model
        reference = ModelPath("reference", start if first == INITIAL else first)
    if against is not None and reference is not None and against.path == reference.path:
        against = None  # its rewards against itself are 0
    order = ([against] if against else []) + models
    if not order:
        if reference:
            raise ConfigError(
                f"There is no model to score: {cfg.output_dir} has none, and {reference.path}, "
                "which the reward is relative to, has none against itself; name one with --model, "
                "or write --reward average."
            )
        raise ConfigError(
            f"There is no model to score: {cfg.output_dir} has none; name one with --model."
        )
    if config.winner == "nearest":
        if prompts == "plain":
            raise ConfigError(
                "--prompts plain does not go with winner: nearest, whose ratings say which "
                "response is nearer to what an instruction asks for; write --prompts own, or score "
                "with a config that has winner: per_dimension."
            )
        prompts = "own"
    elif prompts == "both" and not config.has_instructions:
        prompts = "own"  # the same twice would count as twice as many comparisons
        notes.append("Training's prompts have no instruction, so there is one kind of prompt.")

    tokenizer = load_tokenizer(cfg)
    # Groups hold all pairs of a prompt, so that a split of groups parts prompts too.
    pairs_split = (
        bool(cfg.val_set_size)
        and split == "test"
        and not cfg.test_datasets
        and not config.group_by_prompt
    )
    pairs = rated_pairs(
        cfg,
        tokenizer,
        split=split,
        limit=limit,
        seed=seed,
        own=prompts != "plain",
        plain=prompts != "own",
    )
    count = len(pairs.examples)
    rewards = {
        model.name: values
        for model, values in model_rewards(
            cfg,
            tokenizer,
            pairs,
            order,
            reward_of(reward, objective),
            reference,
            batch_pairs=batch_pairs,
            progress=lambda name: progress(name, count),
        )
    }
    margins = {m.name: rewards[m.name][..., 0] - rewards[m.name][..., 1] for m in order}
    scored = ScoredPairs(pairs, margins)
    kinds: list[Prompting] = ["own", "plain"] if prompts == "both" else [prompts]
    base_name = against.name if against else None
    report = ScoreReport(
        config=path,
        source=pairs.source,
        pairs=count,
        prompts=len(np.unique(pairs.prompts)),
        total_pairs=pairs.total,
        reward=reward,
        reward_name=name_reward(reward, objective),
        beta=cfg.rl_beta,
        reference=reference.path if reference else None,
        titles={kind: title(kind, config) for kind in kinds},
        base=base_name,
        paths={model.name: model.path for model in order},
        rows=rows_of(scored, kinds, base_name, seed),
        agreement=agreements(scored, config) if "own" in kinds and len(pairs.names) > 1 else None,
        notes=notes,
    )
    report.summary = list(summary(report))
    report.notes += observations(report, config, pairs, pairs_split)
    return report, scored


def reward_of(reward: RewardName, objective: Objective) -> Reward:
    """Return the function that makes rewards of log-probabilities.

    Args:
        reward: which.
        objective: whose `beta` scales all of them, and whose own reward `objective` is.
    """
    match reward:
        case "objective":
            return lambda given: objective(given, None).rewards
        case "average":
            return lambda given: objective.beta * response_stats(given.logps, given.mask).avg_logp
        case "sum":
            return lambda given: objective.beta * response_sums(given.logps, given.mask)
        case "reference":
            return lambda given: objective.beta * log_ratios(given, per_token=False)


def name_reward(reward: RewardName, objective: Objective) -> str:
    """Return what a reward is, but for the factor rl_beta."""
    if reward == "objective":
        about = describe(objective)
        return reward_name(reference=about.reference, per_token=about.per_token)
    reference, per_token = KINDS[reward]
    return reward_name(reference=reference, per_token=per_token)


def title(prompting: Prompting, config: AMoPOConfig) -> str:
    """Return under what a kind of prompt has the models read the pairs."""
    if prompting == "plain":
        return "Without any instruction"
    if not config.has_instructions:
        return "As trained, which is without any instruction"
    if config.draws_weights:
        return "As trained, each dimension where the prompt gives it all the weight"
    if config.prompts == "one":
        return "Under the instruction that names all dimensions, as trained"
    return "Under each prompt's own instruction, as trained"


def rows_of(
    scored: ScoredPairs, kinds: list[Prompting], base: str | None, seed: int
) -> list[ScoreRow]:
    """Return a row per rating and kind of prompt, those without any pair included."""
    pairs, rows = scored.pairs, []
    for prompting in kinds:
        for k, name in enumerate(pairs.names):
            label = pairs.labels[:, k]
            ordered = label != 0
            lengths = np.where(label[:, None] < 0, pairs.lengths[:, ::-1], pairs.lengths)[ordered]
            gaps, prompts = (label * pairs.gaps[:, k])[ordered], pairs.prompts[ordered]
            margins = {model: scored.oriented(model, prompting, k) for model in scored.margins}
            right = {model: correct(values) for model, values in margins.items()}
            row = ScoreRow(prompting, name, {})
            ranges = (
                intervals(np.column_stack([*right.values()]), prompts, seed)
                if ordered.any()
                else [None] * len(margins)
            )
            for (model, values), interval in zip(margins.items(), ranges, strict=True):
                row.models[model] = measure(values, gaps, lengths, prompts, interval)
                if base is not None and model != base and ordered.any():
                    row.changes[model] = change(right[base], right[model], prompts, seed)
            rows.append(row)
    for model in scored.margins:
        changes = [row.changes[model] for row in rows if model in row.changes]
        for one, p in zip(changes, holm([one.p for one in changes]), strict=True):
            one.p_holm = p
    return rows


def agreements(scored: ScoredPairs, config: AMoPOConfig) -> Agreement:
    """Return how often two ratings, and two prompts with instructions, order a pair alike."""
    labels = scored.pairs.labels
    several = config.draws_weights or config.prompt_count > 1
    return Agreement(
        ratings=[none_for_nan(row) for row in agreement(labels)],
        models={
            model: [
                none_for_nan(row) for row in agreement(np.where(labels != 0, margins[:, :-1], 0))
            ]
            for model, margins in scored.margins.items()
            if several
        },
    )


def none_for_nan(values: np.ndarray) -> list[float | None]:
    """Return values [N] as a list, None for NaN, which JSON does not have."""
    return [None if math.isnan(value) else float(value) for value in values]


def percent(share: float | None) -> str:
    """Return a share of 0 to 1 in percent, without the sign."""
    return text.percent(share, decimals=1, sign="")


def signed(share: float) -> str:
    """Return a difference of shares in percent, with plus or minus."""
    return f"{100 * share + 0.0:+.1f}"


def p_value(p: float) -> str:
    """Return a p-value as tables have it."""
    return "<.001" if p < 0.001 else f"{p:.3f}"


def summary(report: ScoreReport) -> Iterator[str]:
    """Yield a sentence per rating and model."""
    blocks = {row.prompting: report.block(row.prompting) for row in report.rows}
    for model in report.paths:
        if model == report.base and len(report.paths) > 1:
            continue
        for prompting, rows in blocks.items():
            # One sentence is enough for the plain prompt: its overall rating.
            short = prompting == "plain" and "own" in blocks
            for row in rows[:1] if short else rows:
                if row.models[model].n:
                    yield sentence(report, row, model, short)


def sentence(report: ScoreReport, row: ScoreRow, model: str, name_prompt: bool) -> str:
    """Return what a rating's numbers say of a model, against the base or against chance."""
    after = row.models[model]
    several = len(report.paths) - (report.base is not None) > 1
    subject = f"{model}, {row.name}" if several else row.name
    if name_prompt:
        subject += " without any instruction"
    of = f"{after.n} pairs" + (f" of {after.prompts} prompts" if after.prompts < after.n else "")
    made = row.changes.get(model)
    if made is None:
        low, high = after.interval
        verdict = (
            "no better than chance, as far as this can tell"
            if low <= 0.5 <= high
            else "better than chance"
            if low > 0.5
            else "worse than chance"
        )
        return (
            f"{subject}: {percent(after.accuracy)} % ({of}, 95 % CI {percent(low)} to "
            f"{percent(high)}): {verdict}."
        )
    before = row.models[report.base]
    low, high = made.interval
    went = "rose" if made.difference > 0 else "fell" if made.difference < 0 else "stayed"
    if made.gained == made.lost == 0:
        verdict = "no pair is ordered otherwise"
    elif made.p_holm < SIGNIFICANT:
        verdict = "more than chance explains"
    else:
        verdict = "not distinguishable from chance at this size"
    path = f"from {percent(before.accuracy)} % to" if made.difference else "at"
    return (
        f"{subject} {went} {path} {percent(after.accuracy)} % ({of}, difference "
        f"{signed(made.difference)}, 95 % CI {signed(low)} to {signed(high)}, p {p_value(made.p)}, "
        f"corrected {p_value(made.p_holm)}): {verdict}."
    )


def observations(
    report: ScoreReport, config: AMoPOConfig, pairs: RatedPairs, pairs_split: bool
) -> Iterator[str]:
    """Yield what people should know before they quote a number."""
    if (drawn := report.pairs + pairs.unusable) < report.total_pairs:
        yield f"{drawn} of {report.total_pairs} pairs were drawn (--limit)."
    if pairs.unusable:
        yield (
            f"{pairs.unusable} pairs are left out: they are longer than sequence_len, or the chat "
            "template writes their responses alike."
        )
    if "training set" in report.source:
        yield "These pairs are trained on: the numbers say what was learnt, not what generalises."
    if pairs_split:
        yield (
            "val_set_size splits pairs, not prompts: what is held out may share prompts with the "
            "training set. Use test_datasets, or amopo.group_by_prompt: true."
        )
    few = [
        row.name for row in report.rows if any(m.prompts < FEW_PROMPTS for m in row.models.values())
    ]
    if few:
        names = ", ".join(dict.fromkeys(few))
        yield (
            f"Fewer than {FEW_PROMPTS} prompts ({names}): intervals are rough, and only large "
            "changes can show."
        )
    if config.winner == "overall" and len(report.rows) > 1:
        yield (
            "Each dimension's own ratings are the measure here; training's metrics, with winner: "
            "overall, count the overall winner under every prompt."
        )
    count = sum(bool(row.changes) for row in report.rows)
    if count > 1:
        yield (
            f"{count} comparisons a model: a p below {SIGNIFICANT} among so many is no surprise; "
            "the corrected one (Holm) takes that into account. Both count prompts, not pairs."
        )
    if report.reference is not None:
        yield (
            f"Against itself the reference, {report.reference}, has no reward: one half is what "
            "knowing nothing gives. --reward average compares other models with it."
        )
    if config.winner == "nearest":
        yield (
            "The better response is the one whose ratings are nearer to what the prompt asks for, "
            "so accuracy says how often a model follows the request. Without an instruction "
            "nothing is asked for, and nothing is scored."
        )
    if config.rating_in_prompt == "own" and config.has_instructions and "own" in report.titles:
        yield (
            "As trained, each response stands under a prompt that states its own ratings, so the "
            "rewards of a pair are of two prompts."
        )
