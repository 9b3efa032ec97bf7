"""The base of every dataset format: how one row is read, and what the config says of it.

A format is a file in `formats/`, or a module of anybody's, with a `DatasetFormat` named `load`:

    class Quality(DatasetFormat):
        scale = (1, 5)

        def read(self, row: Row) -> RatedPrompt:
            responses = [
                Response(row.text(name), row.ratings(row.get(f"{name}_ratings")))
                for name in ("answer_a", "answer_b")
            ]
            return RatedPrompt(row.conversation("question"), responses, [row.number])

    load = Quality  # axolotl calls it with tokenizer, config and entry

Pairing, prompts, token ids, length handling and the counts come from `pipeline`.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Set
from typing import Any, ClassVar

from axolotl.prompt_tokenizers import DatasetWrappingStrategy
from axolotl.utils.chat_templates import get_chat_template_from_config
from datasets import Dataset

from axolotl_amopo.config.block import read_block
from axolotl_amopo.config.datasets import DatasetOptions
from axolotl_amopo.config.redact import redact_urls
from axolotl_amopo.config.through_axolotl import mark_of
from axolotl_amopo.data.cache import mark_as_ours
from axolotl_amopo.data.pairing import Pair
from axolotl_amopo.data.pipeline import prepare
from axolotl_amopo.data.rows import RatedPrompt, Response, Row, Source
from axolotl_amopo.data.tokenizer import ChatTokenizer, generation_stops
from axolotl_amopo.errors import AMoPOError, ConfigError

__all__ = ["DatasetFormat", "RatedPrompt", "Response", "Row"]

# What axolotl's own chat formats take for these, without being told.
ROLES = {"human": "user", "gpt": "assistant"}


class DatasetFormat(DatasetWrappingStrategy, ABC):
    """Turns a dataset of rated responses into prepared rows."""

    #: Rating scale of the published dataset, where it has one.
    scale: tuple[float, float] | None = None
    #: The same of single dimensions, where they differ.
    scales: ClassVar[Mapping[str, tuple[float, float]]] = {}
    #: Dimensions in which lower ratings are better.
    lower_is_better: ClassVar[Set[str]] = frozenset()
    #: Dimensions that no field of a row is named after, for `axolotl amopo init` to find.
    makes: ClassVar[Collection[str]] = ()
    #: The `datasets:` keys beyond `scale` and `fields` that the format takes.
    takes: ClassVar[Set[str]] = frozenset()
    #: True where a row is one response, and rows with equal prompts belong together.
    one_response_per_row: bool = False

    @abstractmethod
    def read(self, row: Row) -> RatedPrompt:
        """Return one row as a prompt with rated responses.

        Raises:
            DataError: through the methods of `row`, which name file, row and key.
        """

    def prompt_of(self, row: Row) -> RatedPrompt:
        """Return one row as `read` does, with what every format has beside it."""
        prompt = self.read(row)
        if self.config.weights_per_row:
            prompt.weights = row.weights(self.config.criteria)
        return prompt

    def __init__(self, tokenizer: Any, cfg: Any, ds_cfg: Any):
        self.config = read_block(cfg)
        stored = self.config.datasets.get(mark_of(ds_cfg) or "", {})
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
            "tools": self.ds_cfg.field_tools,
            "role": mappings.get("role"),
            "content": mappings.get("content"),
        }
        return {name: key for name, key in named.items() if key} | self.options.fields

    def _of_messages(self) -> dict[str, Any]:
        """Return what axolotl's own keys say of the messages' other fields."""
        thinking = self.ds_cfg.template_thinking_key or Source.thinking
        properties = {thinking: self.ds_cfg.field_thinking or Source.thinking} | dict(
            self.ds_cfg.message_property_mappings or {}
        )
        return {
            "properties": {n: k for n, k in properties.items() if n not in ("role", "content")},
            "thinking": thinking,
            "split_thinking": bool(self.ds_cfg.split_thinking),
            "drop_system": bool(self.ds_cfg.drop_system_message),
        }

    def wrap_dataset(
        self,
        dataset: Dataset,
        process_count: int | None = None,
        keep_in_memory: bool | None = False,
        **_: Any,
    ) -> Dataset:
        """Return the prepared rows of a whole loaded dataset: what axolotl calls, see `prepare`."""
        if saved := self.cfg.test_datasets if self.eval_split else self.cfg.datasets:
            mark_as_ours(self.cfg, saved, self.tokenizer)  # axolotl saves them next
        return prepare(self, dataset, process_count)

    def tokenizing(self) -> dict[str, Any]:
        """Return what `prepare_row` takes of the config."""
        return {
            "sequence_len": self.sequence_len,
            "excess_length": self.excess_length(),
            "drop_bad": self.config.bad_rows == "drop",
            "place": self.config.instruction_place,
            "own": self.config.rating_in_prompt == "own",
            "least": 1 if self.config.single_responses == "keep" else 2,
        }

    def lower(self) -> Set[str]:
        """Return the dimensions in which lower ratings are better."""
        directions = dict.fromkeys(self.lower_is_better, "lower")
        directions |= {d.name: d.direction for d in self.config.dimensions if d.direction}
        return frozenset(name for name, way in directions.items() if way == "lower")

    def where(self, pairs: list[Pair]) -> str:
        """Return the file and the rows that an example comes from."""
        rows = pairs[0].prompt.rows
        if self.one_response_per_row:
            rows = sorted({rows[i] for pair in pairs for i in pair.responses})
        return f"{self.source.name}, row {' and '.join(map(str, rows))}"

    def chat_tokenizer(self) -> ChatTokenizer:
        """Return what renders and tokenises with the entry's, the config's or the model's template.

        Raises:
            AMoPOError: where there is none.
        """
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
            generation_stops(self.cfg.base_model, self.cfg.revision_of_model),
        )

    def excess_length(self) -> str:
        """Return `drop`, `truncate` or `raise`."""
        return (self.cfg.excess_length_strategy or "drop").lower()


def _source_name(ds_cfg: Any) -> str:
    files = ds_cfg.data_files
    name = str(ds_cfg.path)
    if files:
        name = ", ".join([files] if isinstance(files, str) else files)
    # axolotl shuffles for these before a format sees the rows, so their numbers are not the file's.
    name = redact_urls(name)  # it stands in logs, cards and prepared rows
    shuffled = ds_cfg.shards or (ds_cfg.weight or 1.0) < 1.0
    return f"{name} (as shuffled for `shards` or `weight`)" if shuffled else name
