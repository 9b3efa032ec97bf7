"""A loaded dataset -> prepared rows: survey, pairs, text, tokens; what is left out is counted."""

import functools
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from axolotl.utils.logging import get_logger
from datasets import Dataset
from datasets.arrow_writer import ArrowWriter
from datasets.fingerprint import generate_random_fingerprint, get_temporary_cache_files_directory

from axolotl_amopo.config.through_axolotl import stamp
from axolotl_amopo.data.examples import (
    FEATURES,
    LEFT_OUT,
    PLAIN,
    SHORTENED,
    as_text,
    outcomes,
    prepare_rows,
    unpack,
)
from axolotl_amopo.data.pairing import Pair, PairRule, Scales
from axolotl_amopo.data.rows import RatedPrompt, Ratings, Row
from axolotl_amopo.data.tokenizer import ChatTokenizer
from axolotl_amopo.errors import AMoPOError, DataError, did_you_mean, visible

if TYPE_CHECKING:
    from axolotl_amopo.data.format import DatasetFormat

LOG = get_logger(__name__)

# Below this, starting worker processes costs more than the work.
ROWS_PER_PROCESS = 512
# Rows read at once, and examples that a process takes, writes and shows as done at once: opening a
# file maps a few pages of every batch written, and a process holds a batch as lists of ids.
READ_BATCH, WRITE_BATCH = 1000, 250

BAD_ROW = "rows that can't be used (bad_rows: drop)"


@dataclass
class Survey:
    """What a first look at all rows of a dataset tells. Rows count from 0 here."""

    prompts: int = 0
    bad: set[int] = field(default_factory=set)
    groups: list[list[int]] | None = None  # the rows of each prompt, where a row is one response
    spans: dict[str, tuple[float, float]] = field(default_factory=dict)  # lowest, highest rating

    def add(self, ratings: Ratings) -> None:
        """Widen the spans by a response's ratings."""
        for name, rating in ratings.items():
            if rating is not None:
                low, high = self.spans.get(name, (rating, rating))
                self.spans[name] = min(low, rating), max(high, rating)


@dataclass(frozen=True)
class Preparation:
    """What came of one `datasets:` entry, for those who want to look at it."""

    format: "DatasetFormat"
    dataset: Dataset  # as loaded
    survey: Survey
    rule: PairRule
    prepared: Dataset
    kept: list[int]  # of the examples that were made, those that became rows of `prepared`
    dropped: Counter  # how many were left out, by reason

    def prompts(self) -> Iterator[tuple[RatedPrompt, list[list[Pair]]]]:
        """Yield every prompt, read once more, with the pairs of each example that it gave."""
        for prompt in read_prompts(self.format, self.dataset, self.survey):
            yield prompt, list(make_examples(self.format, [prompt], self.rule, Counter()))

    def examples(self) -> Iterator[tuple[int, list[Pair]]]:
        """Yield every row of `prepared`, in order, and the pairs that it was made of."""
        groups = (group for _, groups in self.prompts() for group in groups)
        row = 0
        for number, group in enumerate(groups):
            if row < len(self.kept) and number == self.kept[row]:
                yield row, group
                row += 1


_watched: ContextVar[list[Preparation] | None] = ContextVar("watched", default=None)


@contextmanager
def watch_preparations() -> Iterator[list[Preparation]]:
    """Collect the preparations that happen inside, in order.

    axolotl calls a format, keeps the dataset that comes back and drops everything else; what is
    known of its making reaches the caller of axolotl's function only past it.
    """
    seen: list[Preparation] = []
    token = _watched.set(seen)
    try:
        yield seen
    finally:
        _watched.reset(token)


def prepare(format: "DatasetFormat", dataset: Dataset, process_count: int | None) -> Dataset:
    """Return the prepared rows of a whole loaded dataset; count and log what was left out.

    Raises:
        DataError: for a row that can't be used (where the config says so), or if no pair is left.
    """
    chat = format.chat_tokenizer()
    if format.excess_length() == "truncate" and not format.tokenizer.is_fast:
        raise AMoPOError(
            "excess_length_strategy: truncate needs a fast tokenizer, to cut the question by "
            "its tokens; write drop, or remove tokenizer_use_fast: false."
        )
    if missed := chat.missed_end():
        LOG.warning(
            "%s: responses end with %s, as the chat template ends a turn, but the model's "
            "generation config does not stop there; write special_tokens: {eos_token: %s}, and "
            "the trained model's will.",
            format.source.name, visible(missed), visible(missed),
        )  # fmt: skip
    dropped: Counter = Counter()
    survey = survey_rows(format, dataset, dropped)
    rule = PairRule(
        format.config,
        scales_of(format, survey),
        format.lower(),
        seed=format.cfg.seed or 0,
        grid=format.eval_split,
    )
    prompts = read_prompts(format, dataset, survey)
    plain, made = write_text(format, prompts, rule, dropped)
    prepared, kept, pairs = tokenize(format, plain, chat, process_count, dropped)
    facts = {
        "name": format.source.name,
        "split": "test" if format.eval_split else "train",
        "type": str(format.ds_cfg.type),
        "rows": len(dataset),
        "prompts": survey.prompts,
        "examples": len(prepared),
        "pairs": pairs,
        "dropped": dict(dropped),
        "scales": rule.scales,
        "lower_is_better": sorted(rule.lower),
    }
    _report(format, made, facts)
    stamp(prepared, facts)
    if (watched := _watched.get()) is not None:
        watched.append(Preparation(format, dataset, survey, rule, prepared, kept, dropped))
    return prepared


def survey_rows(format: "DatasetFormat", dataset: Dataset, dropped: Counter) -> Survey:
    """Read every row once, keeping none: which are bad, which belong together, and what the
    ratings span.

    Raises:
        DataError: for a row that can't be used, or a dimension that no row rates.
    """
    survey = Survey()
    groups: dict[bytes, list[int]] = {}
    for index, values in enumerate(_rows(dataset)):
        try:
            prompt = format.prompt_of(Row(values, index + 1, format.source))
        except DataError:
            if format.config.bad_rows == "error":
                raise
            dropped[BAD_ROW] += 1
            survey.bad.add(index)
            continue
        survey.prompts += 1
        if format.one_response_per_row:
            groups.setdefault(prompt.key(), []).append(index)
        for response in prompt.responses:
            survey.add(response.ratings)
    if format.one_response_per_row:
        survey.groups = list(groups.values())
        survey.prompts = len(groups)
    for name in format.config.dimension_names if survey.prompts else ():
        if name not in survey.spans:
            check_rated_elsewhere(format, name, dataset.column_names)
    return survey


def check_rated_elsewhere(format: "DatasetFormat", name: str, columns: list[str]) -> None:
    """Let a dimension that no row rates be one of another dataset, with a warning.

    Its scale must be known: the one that a saved model is asked on is the first dataset's.

    Raises:
        DataError: where nothing says that it is.
    """
    problem = f"{format.source.name}: no row has a rating on the dimension '{name}'"
    several = len(format.cfg.datasets or []) > 1
    masked = format.config.missing_ratings == "mask"
    if several and masked and format.source.scales[name]:
        LOG.warning("%s; it says nothing there (amopo.missing_ratings: mask).", problem)
        return
    hint = (
        f" If another dataset has it, write {{name: {name}, scale: [LOWEST, HIGHEST]}} there and "
        "amopo.missing_ratings: mask."
    )
    raise DataError(
        f"{problem} of amopo.dimensions.{did_you_mean(name, columns)}{hint if several else ''}"
    )


def read_prompts(
    format: "DatasetFormat", dataset: Dataset, survey: Survey
) -> Iterator[RatedPrompt]:
    """Yield the rows that can be used, read and (where a row is one response) grouped by prompt."""
    if survey.groups is None:
        for index, values in enumerate(_rows(dataset)):
            if index not in survey.bad:
                yield format.prompt_of(Row(values, index + 1, format.source))
        return
    for part in itertools.batched(survey.groups, READ_BATCH):
        indices = [index for group in part for index in group]
        rows = zip(indices, unpack(dataset[indices]), strict=True)
        for group in part:
            read = [
                format.prompt_of(Row(values, index + 1, format.source))
                for index, values in itertools.islice(rows, len(group))
            ]
            for other in read[1:]:
                if other.weights != read[0].weights:
                    raise DataError(
                        f"{format.source.name}, row {other.rows[0]}: its weights are not those of "
                        f"row {read[0].rows[0]}, which has the same prompt; write the same."
                    )
            responses = [response for prompt in read for response in prompt.responses]
            yield replace(read[0], responses=responses, rows=[index + 1 for index in group])


def scales_of(format: "DatasetFormat", survey: Survey) -> Scales:
    """Return every dimension's scale: the config's, else the format's, else what the data spans."""
    scales: Scales = {}
    for name, scale in format.source.scales.items():
        if scale is None:
            lowest, highest = survey.spans.get(name, (0, 1))
            low, high = lowest // 1, -(-highest // 1)
            scale = (low, high if high > low else low + 1)
            if name in survey.spans:
                LOG.warning(
                    "%s: no scale is given for '%s'; taking what the data spans, %g to %g. "
                    "Other data may span less: write {name: %s, scale: [%g, %g]}.",
                    format.source.name, name, *scale, name, *scale,
                )  # fmt: skip
        scales[name] = scale
    return scales


def make_examples(
    format: "DatasetFormat", prompts: Iterable[RatedPrompt], rule: PairRule, dropped: Counter
) -> Iterator[list[Pair]]:
    """Yield the pairs of every training example: one, or all of a prompt's.

    Raises:
        DataError: for a prompt with one response, where `single_responses` says so.
    """
    for prompt in prompts:
        if len(prompt.responses) < 2 and format.config.single_responses == "error":
            raise DataError(
                f"{format.source.name}, row {prompt.rows[0]}: only one response for this prompt, "
                "so there is no pair; add another, or write amopo.single_responses: drop."
            )
        pairs = rule.pairs(prompt, dropped)
        if not format.config.group_by_prompt:
            yield from ([pair] for pair in pairs)
        elif group := list(pairs):
            yield group


def write_text(
    format: "DatasetFormat", prompts: Iterable[RatedPrompt], rule: PairRule, dropped: Counter
) -> tuple[Dataset, int]:
    """Return the examples as text, and how many pairs they have.

    They stand in a file that worker processes read too; in memory they'd take gigabytes.
    """
    examples = make_examples(format, prompts, rule, dropped)
    path, made = temporary_file(), 0
    with ArrowWriter(features=PLAIN, path=path) as writer:
        for part in itertools.batched(examples, READ_BATCH):
            made += sum(not pair.alone for pairs in part for pair in pairs)
            rows = [as_text(pairs, rule, format.where(pairs)) for pairs in part]
            writer.write_batch({name: [row[name] for row in rows] for name in PLAIN})
        count, _ = writer.finalize()
    if not count:
        raise _nothing_left(format, dropped)
    return Dataset.from_file(path), made


def tokenize(
    format: "DatasetFormat",
    plain: Dataset,
    chat: ChatTokenizer,
    process_count: int | None,
    dropped: Counter,
) -> tuple[Dataset, list[int], int]:
    """Return the prepared rows, which of the examples they are, and how many pairs they have."""
    prepared = plain.map(
        functools.partial(prepare_rows, chat=chat, **format.tokenizing()),
        batched=True,
        batch_size=WRITE_BATCH,
        remove_columns=plain.column_names,
        features=FEATURES,
        cache_file_name=temporary_file(),
        num_proc=processes(process_count, len(plain)),
        desc=f"Tokenising pairs of {format.source.name}",
    )
    kept, pairs, whole = [], 0, format.config.all_responses
    for i, (outcome, count) in enumerate(outcomes(prepared)):
        if outcome and whole:
            dropped[outcome.replace("pairs", "prompts")] += 1
        elif outcome:
            dropped[outcome] += count
        if outcome in ("", SHORTENED, LEFT_OUT):
            kept.append(i)
            pairs += count
    if not kept:
        raise _nothing_left(format, dropped)
    return prepared.remove_columns("outcome").select(kept), kept, pairs


def _nothing_left(format: "DatasetFormat", dropped: Counter) -> DataError:
    reasons = "; ".join(f"{count} {reason}" for reason, count in dropped.items())
    what = "response" if format.config.all_responses else "preference pair"
    return DataError(
        f"{format.source.name}: no {what} is left to train on "
        f"({reasons or 'the dataset has no rows'})."
    )


def _report(format: "DatasetFormat", made: int, facts: dict[str, Any]) -> None:
    LOG.info(
        "%s: %d rows, %d prompts, %d pairs made, %d kept%s; %s",
        facts["name"],
        facts["rows"],
        facts["prompts"],
        made,
        facts["pairs"],
        f" in {facts['examples']} groups" if format.config.group_by_prompt else "",
        "; ".join(f"{count} {reason}" for reason, count in sorted(facts["dropped"].items()))
        or "nothing left out",
    )


def processes(wanted: int | None, rows: int) -> int | None:
    """Return how many processes are worth starting for so many rows; None for this one alone."""
    count = min(wanted or 1, rows // ROWS_PER_PROCESS)
    return count if count > 1 else None


def temporary_file() -> str:
    """Return the path of a file that is deleted when this process ends."""
    folder = Path(get_temporary_cache_files_directory())
    return str(folder / f"{generate_random_fingerprint()}.arrow")


def _rows(dataset: Dataset) -> Iterator[dict[str, Any]]:
    """Yield a dataset's rows; many are read at once, which is much faster than one by one."""
    for batch in dataset.iter(batch_size=READ_BATCH):
        yield from unpack(batch)
