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
from axolotl_amopo.commands.score.data import RatedPairs, Split, rated_pairs
from axolotl_amopo.commands.score.logps import ModelPath, default_models, model_logps
from axolotl_amopo.commands.score.measure import (
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
from axolotl_amopo.errors import ConfigError

Reward = Literal["average", "sum", "reference"]
REWARDS: tuple[str, ...] = get_args(Reward)
Prompting = Literal["own", "plain"]
SIGNIFICANT = 0.05

TITLES: dict[Prompting, str] = {
    "own": "Under each prompt's own instruction, as trained",
    "plain": "Without any instruction",
}
FORMULAS: dict[Reward, str] = {
    "average": "rl_beta x mean log-probability of the response's tokens",
    "sum": "rl_beta x log-probability of the response",
    "reference": "rl_beta x log of the response's probability over that of the base model",
}


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
    reward: Reward
    beta: float
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
    reward: Reward = "average",
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
        reward: how log-probabilities become rewards, see `FORMULAS`.
        prompts: `own` with the instructions of training, `plain` without any, or `both`.
        batch_pairs: pairs per forward pass.
        progress: called with a model's name and the number of pairs; what it returns is called
            with the number of pairs that were just scored.

    Raises:
        AMoPOError: for a config, data or model that can't be used.
    """
    cfg = load_cfg(path, is_preprocess=True)
    if not (cfg.amopo and cfg.amopo.enabled):
        raise ConfigError(f"{path}: has no `rl: amopo`; it names no rated data to score with.")
    notes = []
    if models is None:
        models = default_models(cfg)
        if not models:
            notes.append(
                f"There is no model in output_dir, {cfg.output_dir}; name one with --model."
            )
    against = ModelPath("base", base or cfg.base_model) if with_base else None
    if not models and against is None:
        raise ConfigError(
            f"There is no model to score: {cfg.output_dir} has none; name one with --model."
        )
    if reward == "reference" and (against is None or not models):
        raise ConfigError("--reward reference needs a base model and another to hold against it.")

    tokenizer = load_tokenizer(cfg)
    overall_winner = cfg.amopo.winner == "overall"
    # Groups hold all pairs of a prompt, so that a split of groups parts prompts too.
    pairs_split = (
        bool(cfg.val_set_size)
        and split == "test"
        and not cfg.test_datasets
        and not cfg.amopo.group_by_prompt
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
    logps = {
        model.name: (model.path, values)
        for model, values in model_logps(
            cfg,
            tokenizer,
            pairs,
            against,
            models,
            batch_pairs=batch_pairs,
            progress=lambda name: progress(name, count),
        )
    }
    order = ([against] if against else []) + models
    margins = margins_of({m.name: logps[m.name][1] for m in order}, pairs, reward, cfg.rl_beta)
    scored = ScoredPairs(pairs, margins)
    kinds: list[Prompting] = ["own", "plain"] if prompts == "both" else [prompts]
    base_name = against.name if against and against.name in margins else None
    report = ScoreReport(
        config=path,
        source=pairs.source,
        pairs=count,
        prompts=len(np.unique(pairs.prompts)),
        total_pairs=pairs.total,
        reward=reward,
        beta=cfg.rl_beta,
        base=base_name,
        paths={name: logps[name][0] for name in margins},
        rows=rows_of(scored, kinds, base_name, seed),
        agreement=agreements(scored) if "own" in kinds and len(pairs.names) > 1 else None,
        notes=notes,
    )
    report.summary = list(summary(report))
    report.notes += observations(report, overall_winner, pairs_split)
    return report, scored


def margins_of(
    logps: dict[str, np.ndarray], pairs: RatedPairs, reward: Reward, beta: float
) -> dict[str, np.ndarray]:
    """Return margins [N, P] by model: the reward of the first response less the other's.

    Args:
        logps: [N, P, 2] means over tokens; with `reference`, the first is the reference's, which
            gets no margins: against itself every reward is 0.
    """
    if reward == "average":
        rewards = {name: beta * values for name, values in logps.items()}
    else:
        rewards = {
            name: beta * values * pairs.lengths[:, None, :] for name, values in logps.items()
        }
    if reward == "reference":
        reference = rewards.pop(next(iter(rewards)))
        rewards = {name: values - reference for name, values in rewards.items()}
    return {name: values[..., 0] - values[..., 1] for name, values in rewards.items()}


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


def agreements(scored: ScoredPairs) -> Agreement:
    """Return how often two ratings, and two prompts with instructions, order a pair alike."""
    labels = scored.pairs.labels
    return Agreement(
        ratings=[none_for_nan(row) for row in agreement(labels)],
        models={
            model: [
                none_for_nan(row) for row in agreement(np.where(labels != 0, margins[:, :-1], 0))
            ]
            for model, margins in scored.margins.items()
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


def observations(report: ScoreReport, overall_winner: bool, pairs_split: bool) -> Iterator[str]:
    """Yield what people should know before they quote a number."""
    if report.pairs < report.total_pairs:
        yield f"{report.pairs} of {report.total_pairs} pairs were drawn (--limit)."
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
    if overall_winner and len(report.rows) > 1:
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
    if report.reward == "reference":
        yield "Against itself the base has no reward: one half is what knowing nothing gives."
