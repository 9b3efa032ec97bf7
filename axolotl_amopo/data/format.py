"""The base of every dataset format: from a loaded dataset to rows that the collator takes.

A format (a file in `formats/`) subclasses `AMoPOStrategy`, says how one row is read,
and gets pairing, prompts, token ids, length handling and the counts from here. What a prepared row
holds stands in `prepare`, whose functions the worker processes run.
"""

import functools
import hashlib
import itertools
import json
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from axolotl.prompt_tokenizers import DatasetWrappingStrategy
from axolotl.utils.chat_templates import get_chat_template_from_config
from axolotl.utils.logging import get_logger
from datasets import Dataset
from datasets.arrow_writer import ArrowWriter
from datasets.fingerprint import generate_random_fingerprint, get_temporary_cache_files_directory

from axolotl_amopo.config import instructions
from axolotl_amopo.config.block import AMoPOConfig, DatasetOptions
from axolotl_amopo.data.examples import FEATURES, PLAIN, SHORTENED, outcomes, prepare_rows, unpack
from axolotl_amopo.data.pairing import Pair, PairRule, Scales
from axolotl_amopo.data.rows import RatedPrompt, Ratings, Row, Source
from axolotl_amopo.data.tokenizer import ChatTokenizer
from axolotl_amopo.errors import AMoPOError, ConfigError, DataError, did_you_mean
from axolotl_amopo.training.run_log import stamp

LOG = get_logger(__name__)

# Below this, starting worker processes costs more than the work.
ROWS_PER_PROCESS = 512
# Rows read at once, and pairs that a process takes, writes and shows as done at once: opening a
# file maps a few pages of every batch written, and a process holds a batch as lists of ids.
READ_BATCH, WRITE_BATCH = 1000, 250

BAD_ROW = "rows that can't be used (bad_rows: drop)"

# What axolotl's own chat formats take for these, without being told.
ROLES = {"human": "user", "gpt": "assistant"}


@dataclass
class Survey:
    """What a first look at all rows of a dataset tells. Rows count from 0 here."""

    prompts: int = 0
    bad: set[int] = field(default_factory=set)
    groups: list[list[int]] | None = None  # the rows of each prompt, where a row is one response
    spans: dict[str, tuple[float, float]] = field(default_factory=dict)  # lowest, highest rating

    def add(self, ratings: Ratings) -> None:
        for name, rating in ratings.items():
            if rating is not None:
                low, high = self.spans.get(name, (rating, rating))
                self.spans[name] = min(low, rating), max(high, rating)


@dataclass(frozen=True)
class Preparation:
    """What came of one `datasets:` entry, for those who want to look at it."""

    strategy: "AMoPOStrategy"
    dataset: Dataset  # as loaded
    survey: Survey
    rule: PairRule
    prepared: Dataset
    kept: list[int]  # of the examples that were made, those that became rows of `prepared`
    dropped: Counter  # how many were left out, by reason

    def prompts(self) -> Iterator[tuple[RatedPrompt, list[list[Pair]]]]:
        """Every prompt, read once more, with the pairs of each example that it gave."""
        for prompt in self.strategy.prompts(self.dataset, self.survey):
            yield prompt, list(self.strategy.examples([prompt], self.rule, Counter()))


class AMoPOStrategy(DatasetWrappingStrategy, ABC):
    """Turns a dataset of rated responses into prepared pairs."""

    #: Told of every dataset that is prepared, see `axolotl_amopo.commands.inspect`.
    observer: ClassVar[Callable[[Preparation], None] | None] = None

    #: Rating scale of the published dataset, where it has one.
    scale: tuple[float, float] | None = None
    #: The same of single dimensions, where they differ.
    scales: ClassVar[Mapping[str, tuple[float, float]]] = {}
    #: Dimensions in which lower ratings are better.
    lower_is_better: ClassVar[Set[str]] = frozenset()
    #: The `datasets:` keys beyond `scale` and `fields` that the format takes.
    takes: ClassVar[Set[str]] = frozenset()
    #: True where a row is one response, and rows with equal prompts belong together.
    one_response_a_row: bool = False

    @abstractmethod
    def read(self, row: Row) -> RatedPrompt:
        """One row as a prompt with rated responses.

        Raises:
            DataError: through the methods of `row`, which name file, row and key.
        """

    def __init__(self, tokenizer: Any, cfg: Any, ds_cfg: Any):
        self.config = AMoPOConfig.model_validate(cfg.amopo.to_dict())
        stored = self.config.datasets.get(ds_cfg.conversation or "", {})
        self.options = DatasetOptions.model_validate(stored.get("options", {}))
        self.eval_split = stored.get("eval_split", False)
        self.tokenizer = tokenizer
        self.cfg = cfg
        self.ds_cfg = ds_cfg
        self.source = Source(
            name=_source_name(ds_cfg),
            dimensions=self.config.dimension_names,
            scales={
                dimension.name: dimension.scale
                or self.options.scale
                or self.scales.get(dimension.name, self.scale)
                for dimension in self.config.dimensions
            },
            ratings_required=self.config.missing_ratings == "error",
            fields=self._fields(),
            roles=ROLES
            | {alias: role for role, aliases in (ds_cfg.roles or {}).items() for alias in aliases},
            **self._of_messages(),
        )
        for key in ("template", "responses"):
            if getattr(self.options, key) is not None and key not in self.takes:
                raise ConfigError(
                    f"{self.source.name}: {key}: is not for this type; write it with type: "
                    "amopo.user_defined, or remove it."
                )
        self.sequence_len = cfg.sequence_len
        if self.eval_split and cfg.eval_sequence_len:
            self.sequence_len = cfg.eval_sequence_len

    def _fields(self) -> dict[str, str]:
        mappings = self.ds_cfg.message_property_mappings or {}
        named = {
            "messages": self.ds_cfg.field_messages,
            "role": mappings.get("role"),
            "content": mappings.get("content"),
        }
        return {name: key for name, key in named.items() if key} | self.options.fields

    def _of_messages(self) -> dict[str, Any]:
        """What axolotl's own keys say of the messages' other fields."""
        thinking = self.ds_cfg.template_thinking_key or Source.thinking
        properties = {thinking: self.ds_cfg.field_thinking or Source.thinking} | dict(
            self.ds_cfg.message_property_mappings or {}
        )
        return {
            "properties": {n: k for n, k in properties.items() if n not in ("role", "content")},
            "thinking": thinking,
            "split_thinking": bool(self.ds_cfg.split_thinking),
        }

    # The stages, in order.

    def wrap_dataset(self, dataset: Dataset, process_count: int | None = None, **_: Any) -> Dataset:
        """Prepared pairs of a whole loaded dataset; what was left out is counted and logged.

        Raises:
            DataError: for a row that can't be used (where the config says so), or if no pair is
                left.
        """
        chat = self.chat_tokenizer()
        if self.excess_length() == "truncate" and not self.tokenizer.is_fast:
            raise AMoPOError(
                "excess_length_strategy: truncate needs a fast tokenizer, to cut the question by "
                "its tokens; write drop, or remove tokenizer_use_fast: false."
            )
        dropped: Counter = Counter()
        survey = self.survey(dataset, dropped)
        rule = PairRule(self.config, self.scales_of(survey), self.lower(), self.cfg.seed or 0)
        plain, made = self._plain_pairs(self.prompts(dataset, survey), rule, dropped)
        prepared, kept, pairs = self._tokenize(plain, chat, process_count, dropped)
        facts = self._facts(len(dataset), survey.prompts, len(prepared), pairs, rule, dropped)
        self._report(made, facts)
        stamp(prepared, facts)
        if observer := AMoPOStrategy.observer:
            observer(Preparation(self, dataset, survey, rule, prepared, kept, dropped))
        return prepared

    def survey(self, dataset: Dataset, dropped: Counter) -> Survey:
        """Read every row once, keeping none: which are bad, which belong together, and what the
        ratings span.

        Raises:
            DataError: for a row that can't be used, or a dimension that no row rates.
        """
        survey = Survey()
        groups: dict[bytes, list[int]] = {}
        for index, values in enumerate(_rows(dataset)):
            try:
                prompt = self.read(Row(values, index + 1, self.source))
            except DataError:
                if self.config.bad_rows == "error":
                    raise
                dropped[BAD_ROW] += 1
                survey.bad.add(index)
                continue
            survey.prompts += 1
            if self.one_response_a_row:
                key = json.dumps(prompt.messages, sort_keys=True).encode()
                groups.setdefault(hashlib.blake2b(key, digest_size=16).digest(), []).append(index)
            for response in prompt.responses:
                survey.add(response.ratings)
        if self.one_response_a_row:
            survey.groups = list(groups.values())
            survey.prompts = len(groups)
        for name in self.config.dimension_names if survey.prompts else ():
            if name not in survey.spans:
                raise DataError(
                    f"{self.source.name}: no row has a rating on the dimension '{name}' of "
                    f"amopo.dimensions.{did_you_mean(name, dataset.column_names)}"
                )
        return survey

    def prompts(self, dataset: Dataset, survey: Survey) -> Iterator[RatedPrompt]:
        """The rows that can be used, read and (where a row is one response) grouped by prompt."""
        if survey.groups is None:
            for index, values in enumerate(_rows(dataset)):
                if index not in survey.bad:
                    yield self.read(Row(values, index + 1, self.source))
            return
        for part in itertools.batched(survey.groups, READ_BATCH):
            indices = [index for group in part for index in group]
            rows = zip(indices, unpack(dataset[indices]), strict=True)
            for group in part:
                read = [
                    self.read(Row(values, index + 1, self.source))
                    for index, values in itertools.islice(rows, len(group))
                ]
                responses = [response for prompt in read for response in prompt.responses]
                yield replace(read[0], responses=responses, rows=[index + 1 for index in group])

    def scales_of(self, survey: Survey) -> Scales:
        """Every dimension's scale: the config's, else the format's, else what the data spans."""
        scales: Scales = {}
        for name, scale in self.source.scales.items():
            if scale is None:
                lowest, highest = survey.spans.get(name, (0, 1))
                low, high = lowest // 1, -(-highest // 1)
                scale = (low, high if high > low else low + 1)
                if name in survey.spans:
                    LOG.warning(
                        "%s: no scale is given for '%s'; taking what the data spans, %g to %g. "
                        "Other data may span less: write {name: %s, scale: [%g, %g]}.",
                        self.source.name, name, *scale, name, *scale,
                    )  # fmt: skip
            scales[name] = scale
        return scales

    def examples(
        self, prompts: Iterable[RatedPrompt], rule: PairRule, dropped: Counter
    ) -> Iterator[list[Pair]]:
        """The pairs of every training example: one, or all of a prompt's."""
        for prompt in prompts:
            pairs = self._pairs(prompt, rule, dropped)
            if not self.config.group_by_prompt:
                yield from ([pair] for pair in pairs)
            elif group := list(pairs):
                yield group

    def _pairs(self, prompt: RatedPrompt, rule: PairRule, dropped: Counter) -> Iterator[Pair]:
        if len(prompt.responses) < 2 and self.config.single_responses == "error":
            raise DataError(
                f"{self.source.name}, row {prompt.rows[0]}: only one response for this prompt, so "
                "there is no pair; add another, or write amopo.single_responses: drop."
            )
        yield from rule.pairs(prompt, dropped)

    def lower(self) -> Set[str]:
        """Dimensions in which lower ratings are better."""
        directions = dict.fromkeys(self.lower_is_better, "lower")
        directions |= {d.name: d.direction for d in self.config.dimensions if d.direction}
        return frozenset(name for name, way in directions.items() if way == "lower")

    def _plain_pairs(
        self, prompts: Iterable[RatedPrompt], rule: PairRule, dropped: Counter
    ) -> tuple[Dataset, int]:
        """The pairs as text, in a file that workers read too (in memory they'd take gigabytes),
        and how many they are.
        """
        examples = self.examples(prompts, rule, dropped)
        path = _temporary_file()
        made = 0
        with ArrowWriter(features=PLAIN, path=path) as writer:
            for part in itertools.batched(examples, READ_BATCH):
                made += sum(map(len, part))
                rows = [self.as_text(pairs, rule.scales) for pairs in part]
                writer.write_batch({name: [row[name] for row in rows] for name in PLAIN})
            count, _ = writer.finalize()
        if not count:
            raise self._nothing_left(dropped)
        return Dataset.from_file(path), made

    def _tokenize(
        self, plain: Dataset, chat: ChatTokenizer, process_count: int | None, dropped: Counter
    ) -> tuple[Dataset, list[int], int]:
        """The prepared rows; which of the examples they are, and how many pairs they have."""
        processes = max(1, min(process_count or 1, len(plain) // ROWS_PER_PROCESS))
        prepared = plain.map(
            functools.partial(
                prepare_rows,
                chat=chat,
                sequence_len=self.sequence_len,
                excess_length=self.excess_length(),
                drop_bad=self.config.bad_rows == "drop",
                place=self.config.instruction_place,
            ),
            batched=True,
            batch_size=WRITE_BATCH,
            remove_columns=plain.column_names,
            features=FEATURES,
            cache_file_name=_temporary_file(),
            num_proc=processes if processes > 1 else None,
            desc=f"Tokenising pairs of {self.source.name}",
        )
        kept, pairs = [], 0
        for i, (outcome, responses) in enumerate(outcomes(prepared)):
            if outcome:
                dropped[outcome] += 1
            if outcome in ("", SHORTENED):
                kept.append(i)
                pairs += responses // 2
        if not kept:
            raise self._nothing_left(dropped)
        return prepared.remove_columns("outcome").select(kept), kept, pairs

    def as_text(self, pairs: list[Pair], scales: Scales) -> dict[str, Any]:
        prompt = pairs[0].prompt
        return {
            "messages": json.dumps(prompt.messages),
            "tools": json.dumps(prompt.tools),
            "responses": [
                json.dumps(prompt.responses[i].turn) for pair in pairs for i in pair.responses
            ],
            "instructions": [text for pair in pairs for text in self.instructions(pair, scales)],
            "winners": [winner for pair in pairs for winner in pair.winners],
            "dimension_mask": [int(keep) for pair in pairs for keep in pair.mask],
            "where": self.where(pairs),
        }

    def where(self, pairs: list[Pair]) -> str:
        """The file and the rows that an example comes from."""
        rows = pairs[0].prompt.rows
        if self.one_response_a_row:
            rows = sorted({rows[i] for pair in pairs for i in pair.responses})
        return f"{self.source.name}, row {' and '.join(map(str, rows))}"

    def instructions(self, pair: Pair, scales: Scales) -> list[str]:
        """A pair's instructions: one a prompt, or two where each response has its own rating."""
        config = self.config
        sides = (0, 1) if config.rating_in_prompt == "own" else (0,)
        asked = [
            tuple(
                (
                    dimension.name,
                    dimension.description,
                    tuple(scales[dimension.name]),
                    None if config.rating_in_prompt == "none" else ratings[dimension.name],
                )
                for dimension in config.dimensions
            )
            for ratings in (pair.prompt.responses[i].ratings for i in pair.responses)
        ]
        texts = []
        for k, winner in enumerate(pair.winners):
            for side in sides:
                known = asked[winner ^ side]
                if config.overall and k == 0:
                    text = instructions.overall_instruction(config.overall_instruction, known)
                else:
                    text = instructions.instruction(config.instruction, known[k - config.overall])
                texts.append(text)
        return texts

    def chat_tokenizer(self) -> ChatTokenizer:
        template = self.tokenizer.chat_template
        if self.ds_cfg.chat_template or self.ds_cfg.chat_template_jinja:
            template = get_chat_template_from_config(
                cfg=self.cfg, ds_cfg=self.ds_cfg, tokenizer=self.tokenizer
            )
        if isinstance(template, dict):
            template = template.get("default")
        if not template:
            raise AMoPOError(
                f"The tokenizer of {self.tokenizer.name_or_path} has no chat template; choose one, "
                "e.g. chat_template: chatml."
            )
        return ChatTokenizer(
            self.tokenizer,
            template,
            dict(self.cfg.chat_template_kwargs or {}),
            tuple(self.cfg.eot_tokens or ()),
        )

    def excess_length(self) -> str:
        return (self.cfg.excess_length_strategy or "drop").lower()

    def _nothing_left(self, dropped: Counter) -> DataError:
        reasons = "; ".join(f"{count} {reason}" for reason, count in dropped.items())
        return DataError(
            f"{self.source.name}: no preference pair is left to train on "
            f"({reasons or 'the dataset has no rows'})."
        )

    def _facts(
        self, rows: int, prompts: int, examples: int, pairs: int, rule: PairRule, dropped: Counter
    ) -> dict[str, Any]:
        return {
            "name": self.source.name,
            "split": "test" if self.eval_split else "train",
            "type": str(self.ds_cfg.type),
            "rows": rows,
            "prompts": prompts,
            "examples": examples,
            "pairs": pairs,
            "dropped": dict(dropped),
            "scales": rule.scales,
            "lower_is_better": sorted(rule.lower),
        }

    def _report(self, made: int, facts: dict[str, Any]) -> None:
        LOG.info(
            "%s: %d rows, %d prompts, %d pairs made, %d kept%s; %s",
            facts["name"],
            facts["rows"],
            facts["prompts"],
            made,
            facts["pairs"],
            f" in {facts['examples']} groups" if self.config.group_by_prompt else "",
            "; ".join(f"{count} {reason}" for reason, count in sorted(facts["dropped"].items()))
            or "nothing left out",
        )


def _temporary_file() -> str:
    """A file that is deleted when this process ends."""
    folder = Path(get_temporary_cache_files_directory())
    return str(folder / f"{generate_random_fingerprint()}.arrow")


def _rows(dataset: Dataset) -> Iterator[dict[str, Any]]:
    """A dataset's rows; many at once, which is much faster than one by one."""
    for batch in dataset.iter(batch_size=READ_BATCH):
        yield from unpack(batch)


def _source_name(ds_cfg: Any) -> str:
    files = ds_cfg.data_files
    name = str(ds_cfg.path)
    if files:
        name = ", ".join([files] if isinstance(files, str) else files)
    # axolotl shuffles for these before a format sees the rows, so their numbers are not the file's.
    shuffled = ds_cfg.shards or (ds_cfg.weight or 1.0) < 1.0
    return f"{name} (as shuffled for `shards` or `weight`)" if shuffled else name
