"""Say in words what a run's log shows: what improved, what got worse, and what looks wrong.

Every check stays silent where the log can't tell: too few entries, noise, masked dimensions. What
is wrong for one objective is right for another, so checks read what the log says of the objective
(`TrainingRun.objective`), and advice names keys that it has.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from itertools import combinations
from typing import Literal

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from axolotl_amopo.training.runs import (
    FEWEST_AT_AN_END,
    Change,
    TrainingRun,
    format_margin,
    sampled,
    series,
)

Severity = Literal["problem", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("problem", "warning", "note")
CHECKED_FOR_NAN = ("loss", "grad_norm", "amopo/", "rewards/", "logps/", "terms/", "gradients/")

# A spike is this many robust standard deviations above the entries before it, and this many times
# their median: losses of small batches have long tails.
SPIKE_DEVIATIONS, SPIKE_RATIO = 10, 2.0
SPIKE_WINDOW = 25
FEWEST_FOR_SPIKES = 20
# Shares of the margin that the loss aims at; where it aims at none, of 1, at which DPO's loss has
# gone from 0.69 to 0.31.
MOVED, CLEAR_MARGIN = 0.01, 0.025
# A log-ratio to the reference, in nats, that rounding does not make: of a response, in 16 bits with
# sums that were taken in other batches, and of its mean per token.
APART, APART_PER_TOKEN = 0.5, 0.02
# Gradients that point apart in this share of the steps, with a mean cosine below this, conflict.
CONFLICTS, CONFLICT_COSINE = 0.5, -0.1
# One criterion makes the step alone from this share of the solved weight on.
ALONE = 0.95
# Weights closer to 1/K than this share of it are uniform.
UNIFORM = 0.05
# A loss that rises by less than this share is noise.
LOSS_RISES = 0.05
SHARE_FALLS = 0.03  # of pairs: an accuracy that falls by less is noise
LENGTH_RISES = 0.05
# Of the model's own answers: a larger share of repeated 4-grams than before by so much, answers of
# less than this share of their length, and so many more that don't end, as a share.
REPEATS, SHRINKS, RUNS_ON = 0.2, 1 / 3, 0.5
SAMPLE_METRICS = ("tokens", "repetition", "unfinished")
# Without the number of pairs: an accuracy this close to a half is chance.
CHANCE = 0.05
# An interval at least this wide to either side says that pairs are too few to tell.
TOO_WIDE = 0.1


@dataclass(frozen=True)
class Finding:
    """Name one thing that looks wrong, with its numbers and what to try."""

    code: str  # stable, for programs
    severity: Severity
    text: str
    advice: str


def findings(run: TrainingRun) -> list[Finding]:
    """Return what every check found, the worst first."""
    found = [finding for check in CHECKS for finding in check(run)]
    return sorted(found, key=lambda finding: SEVERITIES.index(finding.severity))


def outcome(run: TrainingRun) -> list[str]:
    """Return sentences: which prompts improved, which fell, and what the weights did."""
    if _compares(run):
        sentences = _prompts_that_changed(run)
    else:
        loss, where = run.change("loss"), "Evaluation" if run.by_evaluation else "Training"
        known = not math.isnan(loss.difference)
        sentences = [f"{where} loss: {loss.before:.3f} to {loss.after:.3f}."] if known else []
    if not sentences:
        sentences = [
            "Nothing to compare: margins or losses are NaN at an end of the log."
            if any(finding.code == "not-finite" for finding in not_finite(run))
            else "Nothing to compare yet: the log has no beginning and end."
        ]
    metric, what = "amopo/{}/weight", "Weights"
    if _solves(run):
        metric, what = "gradients/{}/share", "Shares of the gradients in the step"
    elif not _weights_adapt(run) and run.block.get("scalarization", "linear") == "linear":
        return sentences
    ends = {name: _end(run, metric.format(name)) for name in run.prompts}
    known = {name: weight for name, weight in ends.items() if weight is not None}
    if len(known) > 1:
        high, low = max(known, key=known.__getitem__), min(known, key=known.__getitem__)
        text = f"{what} at the end: {known[high]:.3f} ({high}) to {known[low]:.3f} ({low})"
        if not _solves(run):
            masked = ", but for masked pairs" if _masked(run) else ""
            text += f"; all the same would be {1 / len(known):.3f}{masked}"
        sentences.append(f"{text}.")
    return sentences


def _prompts_that_changed(run: TrainingRun) -> list[str]:
    """Return the sentences of an objective that compares responses."""
    parts: dict[str, list[str]] = {"Improved": [], "Fell": [], "No clear change": []}
    for name in run.prompts:
        progress, accuracy = _progress(run, name), run.change(f"amopo/{name}/accuracy")
        if math.isnan(progress.difference):
            continue
        least, kind = max(SHARE_FALLS, _share_noise(run)), "No clear change"
        if progress.fell(_clear(run)) or accuracy.fell(least):
            kind = "Fell"
        elif progress.rose(_clear(run)) or accuracy.rose(least):
            kind = "Improved"
        metric = "margin" if _aims_at_margins(run) else "loss"
        difference = run.change(f"amopo/{name}/{metric}").difference
        text = f"{name} ({metric} {format_margin(difference)}"
        if accuracy.after is not None:
            before = "" if accuracy.before is None else f"{accuracy.before:.0%} to "
            text += f", accuracy {before}{accuracy.after:.0%}"
        parts[kind].append(f"{text})")
    return [f"{kind}: {', '.join(texts)}." for kind, texts in parts.items() if texts]


def headline(run: TrainingRun) -> str:
    """Return what was trained, how far and for how long, in a line."""
    about = run.about
    what = str(about.get("model") or "")
    if about.get("adapter"):
        what += f" with {about['adapter']}"
    parts = [text for text in (what, run.objective.get("method")) if text]
    unit, of = ("pairs", "pairs") if _compares(run) else ("prompts", "examples")
    parts += [
        f"{about[key]} {unit} to {purpose}"
        for key, purpose in ((f"train_{of}", "train on"), (f"eval_{of}", "evaluate with"))
        if about.get(key)
    ]
    dimensions = sum(name != "overall" for name in run.prompts)
    parts.append(f"{dimensions} dimension{'' if dimensions == 1 else 's'}")
    parts.append(f"step {run.step}" + (f" of {run.max_steps}" if run.max_steps else ""))
    if run.seconds is not None:
        parts.append(f"in {format_duration(run.seconds)}")
    return ", ".join([*parts, run.status])


def format_duration(seconds: float) -> str:
    """Return a time as 1:02:03, or below a minute as 45 s."""
    return f"{seconds:.0f} s" if seconds < 60 else str(timedelta(seconds=round(seconds)))


def not_finite(run: TrainingRun) -> Iterator[Finding]:
    """Find NaN and infinite losses, norms, margins and rewards."""
    where: dict[str, list[float]] = {}
    for prefix, entries in (("", run.train), ("eval_", run.evals)):
        for entry in entries:
            for name, value in entry.items():
                if math.isnan(value) and name.startswith(CHECKED_FOR_NAN):
                    where.setdefault(prefix + name, []).append(entry["step"])
    if not where:
        return
    norms = where.get("grad_norm", [])
    rare = set(where) == {"grad_norm"} and len(norms) <= 0.05 * len(run.train)
    names = ", ".join(list(where)[:3]) + (f" and {len(where) - 3} more" if len(where) > 3 else "")
    entries = len({step for steps in where.values() for step in steps})
    yield Finding(
        "not-finite",
        "warning" if rare else "problem",
        f"{names}: NaN or infinite in {_count(entries, 'entry', 'entries')}, first at step "
        f"{min(map(min, where.values())):g}.",
        "With fp16 a few such gradient norms are steps that its loss scaling skips; with bf16 they "
        "are not."
        if rare
        else "Lower learning_rate, set max_grad_norm: 1.0, and use bf16 rather than fp16; what the "
        "run saved after that step is of no use.",
    )


def loss_spikes(run: TrainingRun) -> Iterator[Finding]:
    """Find training losses far above those before them."""
    steps, values = _finite(*series(run.train, "loss"))
    if len(values) < FEWEST_FOR_SPIKES:
        return
    # Of the entries before, at least five: a loss that falls fast in the beginning is no spike.
    padded = np.concatenate([np.full(SPIKE_WINDOW - 5, np.nan), values[:-1]])
    before = np.nanmedian(sliding_window_view(padded, SPIKE_WINDOW), axis=-1)
    above = values[5:] - before
    deviation = 1.4826 * np.median(np.abs(above - np.median(above)))
    spikes = (above > SPIKE_DEVIATIONS * deviation) & (values[5:] > SPIKE_RATIO * before)
    if count := int(spikes.sum()):
        worst = int(np.argmax(np.where(spikes, above, -np.inf)))
        yield Finding(
            "loss-spikes",
            "note" if count == 1 else "warning",
            f"The training loss jumps in {count} of {len(values)} entries, the most at step "
            f"{steps[5:][worst]:g}: {values[5:][worst]:.3g} after {before[worst]:.3g}.",
            "Lower learning_rate or max_grad_norm, add warmup_steps, or look at the rows of that "
            "step.",
        )


def loss_rose(run: TrainingRun) -> Iterator[Finding]:
    """Find a loss that is higher at the end than at the beginning."""
    change = run.change("loss")
    if change.before is not None and change.rose(LOSS_RISES * abs(change.before)):
        where = "evaluation" if run.by_evaluation else "training"
        if not run.by_evaluation or not _training_fell(run, 0):
            yield Finding(
                "loss-rose",
                "problem",
                f"The {where} loss rose from {change.before:.3f} to {change.after:.3f}.",
                "The learning_rate is probably too high: try a third of it, with warmup_steps.",
            )


def overfitting(run: TrainingRun) -> Iterator[Finding]:
    """Find an evaluation loss that rises while the training loss falls."""
    steps, values = _finite(*series(run.evals, "loss"))
    if len(values) < 2:
        return
    best = int(np.argmin(values))
    if values[-1] > (1 + LOSS_RISES) * values[best] and _training_fell(run, steps[best]):
        yield Finding(
            "overfitting",
            "warning",
            f"The evaluation loss was best at step {steps[best]:g} ({values[best]:.3f}) and has "
            f"risen to {values[-1]:.3f}, while the training loss went on falling.",
            "Train for fewer epochs, lower learning_rate, keep the best checkpoint "
            "(load_best_model_at_end: true), or add data.",
        )


def chosen_falls(run: TrainingRun) -> Iterator[Finding]:
    """Find chosen rewards that fall while margins rise.

    Where no responses are compared the loss is what says so.
    """
    if not _compares(run):
        return
    margin, chosen = run.change("rewards/margins"), run.change("rewards/chosen")
    if not (margin.rose(_clear(run)) and chosen.fell(_clear(run))):
        return
    fallen = [
        name for name in run.prompts if run.change(f"amopo/{name}/reward_chosen").fell(_clear(run))
    ]
    # That the rejected reward falls further is what the loss asks for; a little is usual.
    much = -chosen.difference > 0.5 * margin.difference
    yield Finding(
        "chosen-falls",
        "warning" if much else "note",
        f"The chosen rewards fell by {-chosen.difference:.2g} ({_ends(chosen)}) while margins rose "
        f"by {margin.difference:.2g}: the model makes both responses less likely"
        + (f" ({_names(fallen, run)})." if fallen else "."),
        f"{_keep_chosen_likely(run)}.",
    )


def _keep_chosen_likely(run: TrainingRun) -> str:
    """Return what to try so that chosen rewards don't fall."""
    advice = "Lower learning_rate"
    if run.objective.get("reference"):
        advice = "Raise rl_beta, which keeps the model nearer to its reference, or lower "
        advice += "learning_rate"
    elif _gamma(run):
        advice = "Lower gamma first, then learning_rate; a smaller rl_beta scales both rewards down"
    if "anchor" in run.objective.get("settings", ()) and not run.block.get("anchor"):
        advice += "; amopo.anchor, e.g. 0.1, adds a term that keeps chosen responses likely"
    return advice


def weights_uniform(run: TrainingRun) -> Iterator[Finding]:
    """Find adaptive weights that stayed the same for all prompts."""
    # Masked dimensions have means over other pairs, which need not be 1/K where all are the same.
    # A scalarization's own weights are alike where the losses are, as they should be.
    scalarized = run.block.get("scalarization", "linear") != "linear"
    if len(run.prompts) < 2 or not _weights_adapt(run) or scalarized or _masked(run):
        return
    share, largest = 1 / len(run.prompts), 0.0
    for name in run.prompts:
        metric = f"amopo/{name}/weight"
        _, values = _finite(*series(run.evals, metric))  # without draws
        if len(values):
            largest = max(largest, float(np.abs(values - share).max()))
            continue
        _, values = _finite(*series(run.train, metric))
        if len(values) < FEWEST_FOR_SPIKES:
            return
        for part in np.array_split(values, 4):
            noise = 2 * part.std(ddof=1) / math.sqrt(len(part))
            largest = max(largest, abs(float(part.mean()) - share) + noise)
    if largest < UNIFORM * share:
        drawn = [series(run.train, f"amopo/{name}/weight_std")[1] for name in run.prompts]
        spread = np.concatenate(drawn)
        spread = spread[np.isfinite(spread)]
        text = (
            f"The weights did nothing on average: every prompt had {share:.3f} throughout, within "
            f"{largest:.3f}."
        )
        if len(spread):
            text += f" A single pair's weights vary by {spread.mean():.3f} (standard deviation)."
        yield Finding(
            "weights-uniform",
            "warning",
            text,
            "The prompts' token probabilities are too alike to tell them apart. weighting: uniform "
            "would do the same with less noise; to favour a dimension use weighting: static.",
        )


def weights_masked(run: TrainingRun) -> Iterator[Finding]:
    """Say that mean weights can't be compared where dimensions are masked."""
    if _masked(run) and _weights_adapt(run):
        yield Finding(
            "weights-masked",
            "note",
            "Some pairs leave dimensions out, so a weight is a mean over the pairs that have it: "
            "they don't add up to 1, and a larger one may only mean fewer dimensions beside it.",
            "Compare a prompt's weight with its own earlier one, not with 1/K.",
        )


def chance(run: TrainingRun) -> Iterator[Finding]:
    """Find accuracies at or below chance at the end, of criteria that are trained."""
    if not _compares(run):
        return
    where, pairs = "evaluation", run.eval_pairs
    if run.evals:
        last = run.evals[-1]
        ends = {name: last.get(f"amopo/{name}/accuracy", math.nan) for name in run.prompts}
    elif run.entries_per_end < FEWEST_AT_AN_END:
        return
    else:
        where, pairs = "training", None
        after = {name: run.change(f"amopo/{name}/accuracy").after for name in run.prompts}
        ends = {name: math.nan if value is None else value for name, value in after.items()}
    unsure: list[str] = []
    below: list[str] = []
    width = 0.0
    for name, accuracy in ends.items():
        if math.isnan(accuracy) or _end(run, f"amopo/{name}/weight") == 0:
            continue
        low, high = interval(accuracy, pairs) if pairs else (accuracy - CHANCE, accuracy + CHANCE)
        text = f"{name} {accuracy:.1%}" + (f" ({low:.0%} to {high:.0%})" if pairs else "")
        width = max(width, (high - low) / 2)
        if high < 0.5:
            below.append(text)
        elif low <= 0.5:
            unsure.append(text)
    how = f"within {CHANCE:.0%} of a half; the number of pairs is unknown"
    if pairs:
        fewer = " or fewer, where dimensions are masked" if _masked(run) else ""
        how = f"95% interval, of {pairs} pairs{fewer}"
    if below:
        yield Finding(
            "below-chance",
            "problem",
            f"The {where} accuracy is below chance at the end: {', '.join(below)}.",
            "Look at the data with `axolotl amopo inspect`: " + _why_below(run),
        )
    if unsure:
        few = pairs is not None and width > TOO_WIDE
        yield Finding(
            "chance",
            "note" if few else "warning",
            f"The {where} accuracy can't be told from chance at the end: {', '.join(unsure)} "
            f"({how}).",
            "Evaluate with more pairs (test_datasets)."
            if few
            else "Train longer or with a higher learning_rate; if that changes nothing, these "
            "dimensions' ratings may be noise.",
        )


def _why_below(run: TrainingRun) -> str:
    """Return what may be behind accuracies below chance, after "Look at the data ...: "."""
    winner = run.block.get("winner")
    if winner == "nearest":
        return "do the prompts show the ratings that they ask for?"
    why = "is a rating's better end the lower one (direction: lower), do dimensions conflict"
    if winner != "per_dimension":
        why += " (winner: per_dimension)"
    if not _aims_at_margins(run):
        scale = ", or a larger gap_scale" if "gap_scale" in run.block else ""
        why += (
            "? Responses that are rated alike are hardly told apart by this loss: pairs: "
            f"best_worst{scale}, pushes rejected ones down harder. Is that what is missing"
        )
    return f"{why}?"


def sacrificed(run: TrainingRun) -> Iterator[Finding]:
    """Find prompts that fell while the others gained."""
    if not _compares(run):
        return
    progress = {name: _progress(run, name) for name in run.prompts}
    accuracies = {name: run.change(f"amopo/{name}/accuracy") for name in run.prompts}
    least, clear = max(SHARE_FALLS, _share_noise(run)), _clear(run)
    gains = [change.difference for change in progress.values() if change.rose(2 * clear)]
    if not gains:
        return
    metric = "margin" if _aims_at_margins(run) else "loss"
    for name in run.prompts:
        accuracy = accuracies[name]
        fell = progress[name].fell(max(clear, 0.1 * float(np.median(gains))))
        if fell or accuracy.fell(least):
            text = f"{metric} {_ends(run.change(f'amopo/{name}/{metric}'))}"
            if accuracy.before is not None and accuracy.after is not None:
                text += f", accuracy {accuracy.before:.1%} to {accuracy.after:.1%}"
            yield Finding(
                "sacrificed",
                "warning",
                f"{name} paid for the others: {text}, while {len(gains)} of {len(run.prompts)} "
                f"prompts gained {np.median(gains):.2g} of {metric} (median).",
                f"{_share_alike(run)}.",
            )


def _share_alike(run: TrainingRun) -> str:
    """Return what to try so that no dimension pays for the others."""
    block, ways = run.block, []
    settings = run.objective.get("settings", ())
    if block.get("winner", "overall") == "overall":
        ways.append("winner: per_dimension, where dimensions conflict")
    if _weights_adapt(run):
        ways.append("more weight for it with weighting: static")
    elif block.get("weights"):
        ways.append("more weight for it in amopo.weights")
    if "scalarization" in settings and "scalarization" not in block:
        ways.append("scalarization: worst")
    if "gradients" in settings and "gradients" not in block:
        ways.append("gradients: cagrad")
    return (
        f"Try {', or '.join(ways)}"
        if ways
        else "See with `axolotl amopo inspect` how often its winners are not those of the others"
    )


def conflict(run: TrainingRun) -> Iterator[Finding]:
    """Find dimensions whose gradients point apart most of the time."""
    found: list[str] = []
    for one, other in combinations(run.prompts, 2):
        _, cosines = _finite(*series(run.train, f"gradients/{one}-{other}/cosine"))
        apart = float((cosines < 0).mean()) if len(cosines) >= FEWEST_AT_AN_END else 0.0
        if apart > CONFLICTS and cosines.mean() < CONFLICT_COSINE:
            found.append(f"{one} and {other} in {apart:.0%} (mean cosine {cosines.mean():.2f})")
    if found:
        weighted = run.block.get("weights")
        yield Finding(
            "gradients-conflict",
            "note",
            f"Gradients conflict in most of the logged steps: {', '.join(found)}.",
            f"What serves one of them costs the other, and gradients: {run.block.get('gradients')} "
            "looks for steps that serve both; "
            + (
                "amopo.weights says which matters more."
                if weighted
                else "where one matters more, objective: raco takes your weights."
            ),
        )


def one_gradient(run: TrainingRun) -> Iterator[Finding]:
    """Find a dimension whose gradient alone makes the steps."""
    columns = [series(run.train, f"gradients/{name}/share")[1] for name in run.prompts]
    count = len(columns[0])
    if len(run.prompts) < 2 or count < FEWEST_AT_AN_END or any(len(c) != count for c in columns):
        return
    if len(set((run.block.get("weights") or {}).values())) > 1:  # the user's choice
        return
    shares = np.stack(columns, axis=-1)  # [steps, prompts]
    shares = np.nanmean(shares / shares.sum(-1, keepdims=True), axis=0)
    name, share = run.prompts[int(shares.argmax())], float(shares.max())
    if share > ALONE:
        yield Finding(
            "one-gradient",
            "warning",
            f"{name} makes the steps nearly alone: it has {share:.1%} of the gradients' solved "
            f"weight, as a mean of {count} logged steps.",
            "A dimension whose gradient is small, because it is learned or its pairs are few, "
            "takes the weight; objective: mgda_decoupled divides gradients by their losses, and "
            "objective: raco keeps your weights.",
        )


def another_start(run: TrainingRun) -> Iterator[Finding]:
    """Find a model that was not its reference when training began: all rewards must be 0 there."""
    named = run.block.get("reference") or "initial"
    first = named if isinstance(named, str) else named[0]  # what rewards are relative to
    if not run.objective.get("reference") or first != "initial":
        return
    # The first step's numbers are those before it.
    starts = [e for e in run.evals if e["step"] == 0] + [e for e in run.train if e["step"] == 1]
    beta = run.about.get("rl_beta")
    if not starts or not beta:
        return
    least = APART_PER_TOKEN if run.objective.get("per_token") else APART
    rewards = {side: starts[0].get(f"rewards/{side}", math.nan) for side in ("chosen", "rejected")}
    if any(abs(reward) / beta > least for reward in rewards.values()):
        yield Finding(
            "another-start",
            "problem",
            f"The reference is not the model that training found: before the first step the "
            f"chosen rewards are {rewards['chosen']:+.3f} and the rejected ones "
            f"{rewards['rejected']:+.3f}, and should be 0.",
            "Is there anything random in the model's forward pass, or did the adapter begin "
            "otherwise than at zero? Numbers that are compared with this reference mean little.",
        )


def length_grows(run: TrainingRun) -> Iterator[Finding]:
    """Find a growing preference for the longer response."""
    change = run.change("rewards/longer_wins")
    least = max(LENGTH_RISES, _share_noise(run))
    if change.rose(least) and change.after > 0.5:
        yield Finding(
            "length-grows",
            "warning",
            f"The longer response has the higher reward in {change.after:.1%} of the pairs, up "
            f"from {change.before:.1%}.",
            "See with `axolotl amopo inspect` how often the longer response wins in the data: "
            + "; ".join(["balance it", *_less_length(run)])
            + ".",
        )


def _less_length(run: TrainingRun) -> Iterator[str]:
    if _gamma(run):
        yield "lower gamma"
    if run.block.get("length_normalised") is False:
        yield "write length_normalised: true (with a larger rl_beta)"


def samples_collapse(run: TrainingRun) -> Iterator[Finding]:
    """Find answers of the model's own that repeat themselves, shrink or no longer end."""
    found: list[str] = []
    repeats, when = False, ""
    for name in sampled(run.evals):
        ends = [e for e in run.evals if f"samples/{name}/tokens" in e]
        was, now = (
            [end.get(f"samples/{name}/{what}", math.nan) for what in SAMPLE_METRICS]
            for end in (ends[0], ends[-1])
        )
        length, again, cut = zip(was, now, strict=True)
        parts = []
        if again[1] - again[0] > REPEATS:
            repeats = True
            parts.append(f"repeat {again[1]:.0%} of their 4-grams ({again[0]:.0%})")
        if length[1] < SHRINKS * length[0]:
            parts.append(f"have {length[1]:.0f} tokens ({length[0]:.0f})")
        if cut[1] - cut[0] >= RUNS_ON:
            parts.append(f"are cut off in {cut[1]:.0%} ({cut[0]:.0%})")
        if parts:
            found.append(f"asked for {name}, they {' and '.join(parts)}")
            when = f"at step {ends[-1]['step']:g} (in brackets at step {ends[0]['step']:g})"
    if found:
        yield Finding(
            "samples-collapse",
            "problem" if repeats else "warning",
            f"The model's answers to held-out prompts changed, {when}: {'; '.join(found)}.",
            "Read them in _amopo_samples.jsonl; where they fell apart, take an earlier checkpoint. "
            f"{_keep_chosen_likely(run)}.",
        )


def nothing_moved(run: TrainingRun) -> Iterator[Finding]:
    """Find a run in which no reward and no margin moved."""
    early = run.status == "in progress" and run.max_steps and run.step < run.max_steps / 4
    if early or run.step == 0:
        return
    changes = [
        run.change(f"amopo/{name}/{metric}")
        for name in run.prompts
        for metric in ("margin", "reward_chosen", "reward_rejected")
    ]
    known = [change for change in changes if not math.isnan(change.difference)]
    least = MOVED * _scale(run)
    if known and all(abs(change.difference) + 2 * change.noise < least for change in known):
        most = max(abs(change.difference) for change in known)
        _, rates = _finite(*series(run.train, "learning_rate"))
        rate = f" learning_rate was at most {rates.max():.2g}." if len(rates) else ""
        target = run.objective.get("target_margin")
        aim = f" (the loss aims at a margin of {target:g})" if target else ""
        yield Finding(
            "nothing-moved",
            "problem",
            f"After {run.step} steps no reward or margin has moved by more than {most:.4f}{aim}."
            f"{rate}",
            "Raise learning_rate tenfold (LoRA wants 3e-6 or more); with full fine-tuning in bf16, "
            "small steps are rounded away.",
        )


def unshared(run: TrainingRun) -> Iterator[Finding]:
    """Say why prompts were not shared, or logits not made in chunks; numbers are the same."""
    sharing = run.about.get("sharing") or {}
    if why := sharing.get("why_unshared"):
        yield Finding(
            "prompts-not-shared",
            "note",
            f"Prompts were not shared, every response ran with a prompt of its own: {why}.",
            "That costs time and memory alone. attn_implementation: sdpa can share them; "
            "amopo.share_prompt: false silences this.",
        )
    if why := sharing.get("why_own_logits"):
        yield Finding(
            "own-logits",
            "note",
            f"The model's own forward made the logits: {why}.",
            "That costs memory alone: lower micro_batch_size where it runs out.",
        )


def ending(run: TrainingRun) -> Iterator[Finding]:
    """Say that a run is still in progress, or ended before its last step."""
    of = f"step {run.step}" + (f" of {run.max_steps}" if run.max_steps else "")
    short = run.max_steps is not None and run.step < run.max_steps
    if run.status == "in progress":
        yield Finding(
            "in-progress",
            "note",
            f"The run is at {of}; what stands here may change.",
            "Call the report again later.",
        )
    elif run.status == "finished" and short:
        yield Finding(
            "stopped-early",
            "warning",
            f"The run ended at {of}.",
            "Early stopping or a time limit does that; otherwise look at its output.",
        )
    elif run.status == "stopped" and (short or not run.max_steps):
        yield Finding(
            "stopped-early",
            "warning",
            f"The run was stopped at {of}.",
            "With auto_resume_from_checkpoints: true the same command goes on from the newest "
            "checkpoint.",
        )


def few_entries(run: TrainingRun) -> Iterator[Finding]:
    """Say that the log is too short to tell a change from noise."""
    if not run.by_evaluation and run.entries_per_end < FEWEST_AT_AN_END:
        yield Finding(
            "few-entries",
            "note",
            f"The log has {_count(len(run.train), 'training entry', 'training entries')} and "
            f"{_count(len(run.evals), 'evaluation', 'evaluations')}: too few to tell a change from "
            "noise.",
            "Lower logging_steps, or name test_datasets and write eval_strategy: epoch, which "
            "evaluates before the first step too.",
        )


CHECKS: tuple[Callable[[TrainingRun], Iterator[Finding]], ...] = (
    not_finite,
    another_start,
    nothing_moved,
    loss_rose,
    loss_spikes,
    overfitting,
    sacrificed,
    conflict,
    one_gradient,
    chosen_falls,
    chance,
    length_grows,
    samples_collapse,
    weights_uniform,
    weights_masked,
    unshared,
    ending,
    few_entries,
)


def interval(share: float, count: int) -> tuple[float, float]:
    """Return Wilson's 95% interval of a share of `count` pairs."""
    z = 1.96
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z * math.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2)
    return middle - half / (1 + z * z / count), middle + half / (1 + z * z / count)


def _share_noise(run: TrainingRun) -> float:
    """Return three standard errors of a share of the evaluation's pairs; 0 where unknown.

    That is two of a difference, if the two evaluations had nothing in common.
    """
    pairs = run.eval_pairs if run.by_evaluation else None
    return 1.5 / math.sqrt(pairs) if pairs else 0.0


def _training_fell(run: TrainingRun, step: float) -> bool:
    """Return whether the training loss is lower at the end than around a step, beyond noise."""
    steps, values = _finite(*series(run.train, "loss"))
    later, earlier = values[steps > step], values[steps <= step]
    half = len(later) // 2
    if half < 2:
        return False
    # Where the best evaluation was the first, compare with the beginning of what came after it.
    start, end = earlier[-half:] if len(earlier) >= half else later[:half], later[-half:]
    noise = math.sqrt(sum(part.var(ddof=1) / len(part) for part in (start, end)))
    return float(start.mean() - end.mean()) > noise


def _finite(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return steps[np.isfinite(values)], values[np.isfinite(values)]


def _masked(run: TrainingRun) -> bool:
    """Return whether dimensions are masked for some pairs: mean weights don't add up to 1."""
    keys = [f"amopo/{name}/weight" for name in run.prompts]
    sums = [
        sum(entry[key] for key in keys if key in entry)
        for entry in (*run.evals, *run.train)
        if any(key in entry for key in keys)
    ]
    return any(abs(total - 1) > 0.01 for total in sums)  # false for NaN


def _weights_adapt(run: TrainingRun) -> bool:
    """Return whether weights depend on the model; true where the log does not tell."""
    return run.objective.get("adaptive", True)


def _compares(run: TrainingRun) -> bool:
    """Return whether the objective compares responses with each other."""
    return run.objective.get("per") != "response"


def _aims_at_margins(run: TrainingRun) -> bool:
    """Return whether a loss that falls and a margin that rises are the same."""
    return run.objective.get("pushes_down", 1.0) >= 1


def _solves(run: TrainingRun) -> bool:
    """Return whether a rule finds how much of each criterion's gradient a step has."""
    return any(f"gradients/{name}/share" in entry for entry in run.train for name in run.prompts)


def _progress(run: TrainingRun, name: str) -> Change:
    """Return the change that is above 0 where a prompt improved: of its margin, or of its loss."""
    if _aims_at_margins(run):
        return run.change(f"amopo/{name}/margin")
    loss = run.change(f"amopo/{name}/loss")
    return Change(loss.after, loss.before, loss.noise)


def _end(run: TrainingRun, metric: str) -> float | None:
    """Return a metric's value at the end; of what training alone logs, the mean of its end."""
    if (after := run.change(metric).after) is not None:
        return after
    _, values = _finite(*series(run.train[-run.entries_per_end :], metric))
    return float(values.mean()) if len(values) else None


def _gamma(run: TrainingRun) -> float | None:
    """Return the block's gamma where that is the margin at which the loss aims."""
    gamma = run.block.get("gamma")
    return gamma if gamma == run.objective.get("target_margin") else None


def _scale(run: TrainingRun) -> float:
    """Return the margin that changes of rewards and margins are measured by."""
    facts, beta = run.objective, run.about.get("rl_beta")
    scale = facts.get("target_margin") or 1.0
    # Log-ratios per token are small: one nat per token is another model.
    return min(scale, beta) if facts.get("reference") and facts.get("per_token") and beta else scale


def _clear(run: TrainingRun) -> float:
    """Return the smallest change of a margin or reward that is worth a word."""
    return CLEAR_MARGIN * _scale(run)


def _ends(change: Change) -> str:
    return f"{format_margin(change.before)} to {format_margin(change.after)}"


def _names(names: list[str], run: TrainingRun) -> str:
    return "under every prompt" if len(names) == len(run.prompts) else ", ".join(names)


def _count(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"
