"""Read the log of a training run: what was trained, and every metric over the steps.

The log is `_amopo_log.jsonl` (see `run_log.py`), or where it is absent the newest
`trainer_state.json`.

    run = read_run(Path("outputs/qwen2.5-7b-amopo"))
    run.change("amopo/helpfulness/margin").difference
"""

import json
import math
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from axolotl_amopo.errors import AMoPOError, DataError

# transformers uploads the output folder without what begins with an underscore (`ignore_patterns`
# in Trainer.push_to_hub).
LOG = "_amopo_log.jsonl"
STATE = "trainer_state.json"
METRIC = re.compile(r"amopo/(.+)/[^/]+")
SAMPLED = re.compile(r"samples/(.+)/tokens")
# The metrics of each prompt that people compare before and after training.
COMPARED_METRICS = ("accuracy", "margin", "weight")
# Those that count how rewards are ordered.
ORDERS = ("/accuracy", "/accuracies", "/longer_wins")

# A run is taken to go on while its last line is younger than this many seconds, or than this many
# times the longest time between two lines (an evaluation can take an hour), whichever is more.
STILL_RUNNING = 600
LINES_LATE = 2

# "Before" and "after" are means over a tenth of the training entries, and over at least this many.
FEWEST_AT_AN_END = 5

Entry = dict[str, float]


@dataclass
class Change:
    """Hold a metric's value at the beginning and at the end of a run; None: not logged."""

    before: float | None
    after: float | None
    # Standard error of the difference. 0 for evaluations, which see the same pairs each time.
    noise: float = 0.0

    @property
    def difference(self) -> float:
        """Return after minus before, NaN where one of the two is not known."""
        if self.before is None or self.after is None:
            return math.nan
        return self.after - self.before

    def rose(self, least: float) -> bool:
        """Return whether it rose by more than `least`, and by more than noise explains."""
        return self.difference > max(least, 3 * self.noise)

    def fell(self, least: float) -> bool:
        """Return whether it fell by more than `least`, and by more than noise explains."""
        return -self.difference > max(least, 3 * self.noise)


@dataclass
class TrainingRun:
    """Hold what one run trained and logged.

    Entries are in the order of their steps. A metric is absent from an entry in which it was not
    logged, and NaN where it was not a finite number.
    """

    folder: Path
    file: Path
    about: dict[str, Any]  # "run" of the log's lines; empty for a trainer_state.json
    prompts: list[str]
    train: list[Entry]
    evals: list[Entry]  # names without "eval_"
    status: Literal["finished", "in progress", "stopped"]
    step: int
    max_steps: int | None
    written: float  # seconds since 1970, of the last line
    seconds: float | None  # of training, without the time between a stop and a resume
    resumed: list[int] = field(default_factory=list)  # steps

    @property
    def name(self) -> str:
        """Return the run's own name, or the name of its folder."""
        return str(self.about.get("name") or self.folder.resolve().name)

    @property
    def objective(self) -> dict[str, Any]:
        """Return what the log says of the objective, see `run_log.describe_run`; {} if nothing."""
        return self.about.get("objective") or {}

    @property
    def block(self) -> dict[str, Any]:
        """Return the `amopo:` block, {} where the log has none."""
        return self.about.get("amopo") or {}

    @property
    def by_evaluation(self) -> bool:
        """Return whether "before" and "after" are the first and the last evaluation."""
        return len(self.evals) > 1

    @property
    def entries_per_end(self) -> int:
        """Return how many training entries make up the beginning, and how many the end."""
        count = len(self.train)
        return max(count // 10, min(FEWEST_AT_AN_END, count // 2), 1)

    @property
    def eval_pairs(self) -> int | None:
        """Return the number of pairs per evaluation, None where the log does not tell it."""
        if pairs := self.about.get("eval_pairs"):
            return int(pairs)
        last = self.evals[-1] if self.evals else {}
        pairs = last.get("runtime", 0) * last.get("samples_per_second", 0)
        return round(pairs) if pairs >= 1 else None

    def change(self, metric: str) -> Change:
        """Return a metric's change from the first to the last evaluation.

        Without two evaluations it is the change from the first to the last tenth of the training
        log.
        """
        if self.by_evaluation:
            return Change(
                *(_number(entry.get(metric)) for entry in (self.evals[0], self.evals[-1]))
            )
        ends = [
            values[np.isfinite(values)]
            for part in (self.train[: self.entries_per_end], self.train[-self.entries_per_end :])
            for values in [series(part, metric)[1]]
        ]
        if len(self.train) < 2 or not all(len(values) for values in ends):
            return Change(None, None)
        noise = math.inf
        if min(map(len, ends)) >= FEWEST_AT_AN_END:
            noise = math.sqrt(sum(values.var(ddof=1) / len(values) for values in ends))
        return Change(*(float(values.mean()) for values in ends), noise)


def series(entries: list[Entry], metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Return a metric's steps [N] and values [N], from the entries that have it."""
    found = [(entry["step"], entry[metric]) for entry in entries if metric in entry]
    steps, values = np.array(found, dtype=float).reshape(-1, 2).T
    return steps, values


def sampled(evals: Iterable[Entry]) -> list[str]:
    """Return the settings under which evaluations took samples of the model's answers."""
    found = (SAMPLED.fullmatch(key) for entry in evals for key in entry)
    return list(dict.fromkeys(match[1] for match in found if match))


def compared_metrics(runs: Sequence[TrainingRun]) -> list[str]:
    """Return those of COMPARED_METRICS that some run has logged: supervised losses have no weight
    per prompt."""
    logged = {key.rpartition("/")[2] for run in runs for e in (*run.train, *run.evals) for key in e}
    return [metric for metric in COMPARED_METRICS if metric in logged]


def reward_name(*, reference: bool, per_token: bool | None) -> str:
    """Return what an objective's reward is, but for the factor rl_beta.

    Args:
        reference, per_token: see `Description`.
    """
    if per_token is None:
        return "score of the method's own"
    name = "log-ratio to the reference" if reference else "log-probability"
    return f"mean {name} per token" if per_token else name


def explain_numbers(run: TrainingRun) -> str:
    """Return sentences that say what rewards, margins and accuracies are; "" if the log doesn't."""
    facts, block = run.objective, run.block
    if not facts:
        return ""
    reference, method = facts["reference"], facts["method"]
    name = reward_name(reference=reference, per_token=facts["per_token"])
    better = "whose better response, by the data's ratings, has the higher reward."
    if block.get("winner") == "nearest":
        better = (
            "in which the response whose ratings are nearer to what the prompt asks for has the "
            "higher reward, which says how often the model follows the request."
        )
    sentences = [
        f"A response's reward is rl_beta times its {name}, a margin the difference of two rewards, "
        f"and accuracy the share of pairs {better}"
    ]
    if reference:
        sentences.append(
            "The reference is the model as training found it, so all rewards begin at 0, where "
            "nothing is ordered and accuracy is not shown."
        )
    if facts["per"] == "response":
        sentences.append(
            f"{method} compares nothing: it trains on the loss, the mean negative log-probability "
            "per token, and margins and accuracies are by-products."
        )
    elif facts["per"] == "example":
        sentences.append(
            "The loss is of all responses of a prompt at once; margins and accuracies are of the "
            "pairs among them."
        )
    elif facts["pushes_down"] < 1:
        sentences.append(
            f"{method} pushes a rejected response down less than the chosen one up where their "
            "ratings are close, so rejected rewards fall less and margins may stay behind, by "
            "design."
        )
    if block.get("weight_draws"):
        sentences.append("A dimension's numbers are means over the prompts with other weights.")
    return " ".join(sentences)


def format_metric(metric: str, value: float | None) -> str:
    """Return a compared metric's value as people read it, "-" for None."""
    if value is None:
        return "-"
    if metric == "margin":
        return format_margin(value)
    return {"accuracy": "{:.1%}"}.get(metric, "{:.3f}").format(value)


def format_margin(value: float) -> str:
    """Return a margin or a reward with its sign and two decimals; a small one, as log-ratios per
    token are, with two digits."""
    return f"{value:+.2g}" if 0 < abs(value) < 0.095 else f"{value:+.2f}"


def explain_change(run: TrainingRun) -> str:
    """Return the sentence that says which entries "before" and "after" are."""
    if run.by_evaluation:
        first, last = (int(run.evals[i]["step"]) for i in (0, -1))
        return f"Before and after: the evaluations at step {first} and step {last}."
    count = "one evaluation" if run.evals else "no evaluation"
    return (
        f"Before and after: means of the first and the last {run.entries_per_end} of "
        f"{len(run.train)} training entries, as there was {count}; noisier, and of pairs that were "
        "trained on."
    )


def read_run(folder: Path, now: float | None = None) -> TrainingRun:
    """Read what a run has logged so far.

    Args:
        now: seconds since 1970, to tell a run in progress from one that was stopped.

    Raises:
        AMoPOError: where there is no log, or it is not that of an AMoPO run.
        DataError: for a line that can't be read.
    """
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "is no folder"
        raise AMoPOError(f"{folder} {what}; name a run's output_dir.")
    now = time.time() if now is None else now
    file = folder / LOG
    run = _from_log(file, now) if file.is_file() else _from_state(folder, now)
    if not (run.train or run.evals):
        raise AMoPOError(
            f"{run.file}: nothing has been logged yet; try again after the first logging_steps."
        )
    for entry in (*run.train, *run.evals):
        _correct(entry, reference=bool(run.objective.get("reference")))
    names = dict.fromkeys(
        match[1]
        for entry in (*run.train, *run.evals)
        for key in entry
        if (match := METRIC.fullmatch(key))
    )
    if not (names or run.prompts):
        raise AMoPOError(
            f"{run.file}: has no amopo/... metrics, so it is not the log of a run with rl: amopo."
        )
    # A trainer_state.json has its keys sorted; elsewhere the prompt of all dimensions comes first.
    run.prompts = run.prompts or sorted(names, key=lambda name: name != "overall")
    return run


def _from_log(file: Path, now: float) -> TrainingRun:
    about: dict[str, Any] = {}
    entries: dict[tuple[str, float], Entry] = {}
    begins: list[int] = []  # steps
    times: list[list[float]] = []  # of each start of training
    for number, line in _lines(file):
        begins_at, step, when = (_number(line.get(key)) for key in ("begin", "step", "time"))
        if begins_at is None and step is None:
            raise DataError(f"{file}, line {number}: has neither a step nor a begin; delete it.")
        if begins_at is not None:
            # From the start again: what an earlier run evaluated before its first step goes too.
            again = begins_at == 0 and times
            entries = {
                (kind, at): entry
                for (kind, at), entry in entries.items()
                if at <= begins_at and kind != "end" and not again
            }
            begins.append(int(begins_at))
            times.append([])
        else:
            entries |= _entry(line)
        about |= line["run"] if isinstance(line.get("run"), dict) else {}
        if times and when is not None:
            times[-1].append(when)
    written = max((when for part in times for when in part), default=file.stat().st_mtime)
    gaps = [float(gap) for part in times for gap in np.diff(part)]
    seconds = sum(gaps) if gaps else None
    run = _run(file, about, entries, written, about.get("max_steps"), seconds)
    run.prompts = [str(name) for name in about.get("prompts") or ()]
    run.resumed = [step for step in begins if step]
    patience = max([STILL_RUNNING, *(LINES_LATE * gap for gap in gaps)])
    if ("end", run.step) in entries:
        run.status = "finished"
    elif now - written < patience:
        run.status = "in progress"
    return run


def _from_state(folder: Path, now: float) -> TrainingRun:
    found = [folder / STATE] if (folder / STATE).is_file() else []
    found += folder.glob(f"checkpoint-*/{STATE}")
    states = [(_state(file), file) for file in found]
    if not states:
        raise AMoPOError(
            f"{folder} has neither {LOG} nor a checkpoint with {STATE}; name a run's output_dir, "
            "once it has logged something."
        )
    state, file = max(states, key=lambda item: item[0].get("global_step") or 0)
    entries: dict[tuple[str, float], Entry] = {}
    for line in state["log_history"]:
        entries |= _entry(line)
    run = _run(file, {}, entries, file.stat().st_mtime, state.get("max_steps"), None)
    run.step = max(run.step, state.get("global_step") or 0)
    if run.max_steps and run.step >= run.max_steps:
        run.status = "finished"
    elif now - run.written < STILL_RUNNING:
        run.status = "in progress"
    run.folder = folder
    return run


def _run(
    file: Path,
    about: dict[str, Any],
    entries: dict[tuple[str, float], Entry],
    written: float,
    max_steps: Any,
    seconds: float | None,
) -> TrainingRun:
    kinds = {
        kind: [entries[key] for key in sorted(entries) if key[0] == kind]
        for kind in ("train", "eval")
    }
    return TrainingRun(
        folder=file.parent,
        file=file,
        about=about,
        prompts=[],
        train=kinds["train"],
        evals=kinds["eval"],
        status="stopped",
        step=int(max((step for _, step in entries), default=0)),
        max_steps=max_steps if isinstance(max_steps, int) and max_steps > 0 else None,
        written=written,
        seconds=seconds,
    )


def _lines(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the objects of a JSON lines file with their line numbers."""
    lines = [
        (number, line)
        for number, line in enumerate(file.read_bytes().split(b"\n"), start=1)
        if line.strip()
    ]
    for index, (number, line) in enumerate(lines):
        try:
            value = json.loads(line)
        except ValueError:
            # A killed process leaves half a line, at the end or before the next start.
            if index + 1 == len(lines) or lines[index + 1][1].startswith(b'{"begin"'):
                continue
            raise DataError(
                f"{file}, line {number}: is not JSON; delete the line to read the others."
            ) from None
        if not isinstance(value, dict):
            raise DataError(f"{file}, line {number}: is no JSON object; delete the line.")
        yield number, value


def _state(file: Path) -> dict[str, Any]:
    try:
        state = json.loads(file.read_bytes())
        if isinstance(state["log_history"], list):
            return state
    except (ValueError, KeyError, TypeError):
        pass
    raise DataError(f"{file}: is not what a trainer writes; delete that checkpoint.")


def _entry(line: dict[str, Any]) -> dict[tuple[str, float], Entry]:
    """Return a line's numbers by its kind and step; empty for a line of another kind."""
    numbers = {
        key: math.nan if (number := _number(value)) is None else number
        for key, value in line.items()
        if value is None or isinstance(value, int | float)
    }
    step = numbers.get("step", 0.0)
    if "train_runtime" in numbers:
        return {("end", step): numbers}
    if any(key.startswith("eval_") for key in numbers):
        return {("eval", step): {key.removeprefix("eval_"): numbers[key] for key in numbers}}
    return {("train", step): numbers} if "loss" in numbers else {}


def logged_numbers(line: dict[str, Any], *, reference: bool) -> tuple[str, Entry]:
    """Return what a line of a trainer's log tells, as `read_run` does for a whole run.

    Args:
        reference: whether the objective compares the model with one.

    Returns:
        Its kind (`train`, `eval`, `end`, or "" for a line of no known kind) and its numbers, those
        of an evaluation without `eval_`.
    """
    for (kind, _), entry in _entry(line).items():
        if kind != "end":
            _correct(entry, reference=reference)
        return kind, entry
    return "", {}


def _correct(entry: Entry, *, reference: bool) -> None:
    _restore_nan(entry)
    _leave_out_equal_rewards(entry, reference=reference)


def _restore_nan(entry: Entry) -> None:
    """Put NaN into an entry whose every pair had a NaN loss.

    The log does not say so: transformers writes a training loss of 0, and our means leave NaN out.
    Single responses are in no pair and have a loss.
    """
    margins = any(key.startswith("amopo/") and key.endswith("/margin") for key in entry)
    loss = entry.get("loss", math.nan)
    if margins or (loss and math.isfinite(loss)):
        return
    ours = [key for key in entry if key.startswith(("amopo/", "rewards/", "logps/"))]
    entry |= dict.fromkeys(["loss", *ours], math.nan)


def _leave_out_equal_rewards(entry: Entry, *, reference: bool) -> None:
    """Take out of an entry what counts orders, where a model is its own reference.

    All its rewards are 0 then, but for rounding, and equal rewards count as wrong. Before the first
    step that is so by definition; while the learning rate warms up from 0, as long as it is.
    """
    start = reference and entry["step"] == 0
    if start or entry.get("rewards/chosen") == entry.get("rewards/rejected") == 0.0:
        for key in [key for key in entry if key.endswith(ORDERS)]:
            del entry[key]


def _number(value: Any) -> float | None:
    """Return a finite number as it is, anything else as None."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
