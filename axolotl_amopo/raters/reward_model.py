"""Reward models: sequence classification in transformers, a rating per head.

    {reward_model: NAME_OR_FOLDER, scale: [-10, 10]}
    {reward_model: NAME_OR_FOLDER, head: helpfulness, scale: [0, 4]}     of several heads

The conversation and the response are put through the model's own chat template; the rating is the
head's output as it is.
"""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from axolotl_amopo.config.files import digest
from axolotl_amopo.errors import AMoPOError
from axolotl_amopo.raters.base import Estimate, Item, RatedDimension, Rating, Task, short_hash


class RewardModelRater:
    """Rate by one model's heads, a dimension per head; a response goes through the model once.

    Args:
        heads: of each dimension, the number or the name of its head; None where there is but one.
    """

    draws = 1
    reads_row = False
    clips = True

    def __init__(
        self,
        name: str,
        dimensions: list[RatedDimension],
        heads: dict[str, int | str | None],
        batch_size: int = 8,
    ):
        self.name = name
        self.dimensions = dimensions
        self.heads = heads
        self.batch_size = batch_size
        self.model: Any = None
        self.version = _version(name)

    def identity(self, dimension: str) -> dict[str, Any]:
        """Return the model, its version, and the head."""
        facts = {"rater": "reward_model", "model": self.name, "version": self.version}
        return facts | {"head": self.heads[dimension]}

    provenance = identity

    def estimate(self, task: Task) -> Estimate:
        """Return nothing: no server is asked."""
        return Estimate()

    def prepare(self) -> None:
        """Load the model, and find the heads.

        Raises:
            AMoPOError: where it can't be loaded, is no reward model, has no chat template, or lacks
                a head.
        """
        import torch
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        if self.model is not None:
            return
        on_gpu = torch.accelerator.is_available()
        try:
            # Without a word on it, transformers would ask at the terminal.
            self.tokenizer = AutoTokenizer.from_pretrained(self.name, trust_remote_code=False)
            self.model, about = AutoModelForSequenceClassification.from_pretrained(
                self.name,
                dtype="auto" if on_gpu else torch.float32,
                output_loading_info=True,
                trust_remote_code=False,
            )
        except (OSError, ValueError, RuntimeError, ImportError, UnpicklingError) as error:
            reason = str(error).strip().splitlines()[0]
            if isinstance(error, UnpicklingError):  # torch says how to load it nevertheless
                reason = "its weights are no weights"
            raise AMoPOError(
                f"{self.name}: can't be loaded as a reward model ({reason}); name a folder or a "
                "hub's name of a sequence classification model."
            ) from None
        if missing := about["missing_keys"]:
            raise AMoPOError(
                f"{self.name}: is no reward model: it has no weights for "
                f"{', '.join(sorted(missing)[:3])}."
            )
        if not self.tokenizer.chat_template:
            raise AMoPOError(
                f"{self.name}: its tokenizer has no chat template, so how it reads a conversation "
                "is unknown; add its chat_template.jinja to the folder."
            )
        self.model.eval()
        if on_gpu:
            self.model.to(torch.accelerator.current_accelerator())
        config = self.model.config.get_text_config()
        # A pad token that also ends texts would hide the end, where the rating is read.
        own = self.tokenizer.pad_token_id
        if config.pad_token_id is None and own != self.tokenizer.eos_token_id:
            config.pad_token_id = own
        self.pad = config.pad_token_id
        self.longest = getattr(config, "max_position_embeddings", None)
        self.columns = {name: self._column(head) for name, head in self.heads.items()}

    def rate(self, tasks: Sequence[Task]) -> Iterator[tuple[int, Rating]]:
        """Yield the heads' outputs, the longest responses first: what is too much fails at once.

        Raises:
            AMoPOError: where a batch does not fit into memory.
        """
        import torch

        places: dict[int, list[int]] = {}  # a response has a task per dimension
        for place, task in enumerate(tasks):
            places.setdefault(id(task.item), []).append(place)
        ids: list[tuple[list[int], list[int]]] = []  # of a response, and the places of its tasks
        for mine in places.values():
            found, problem = self._ids(tasks[mine[0]].item)
            if problem:
                yield from ((place, Rating(None, problem)) for place in mine)
            else:
                ids.append((found, mine))
        ids.sort(key=lambda one: len(one[0]), reverse=True)
        size = self.batch_size if self.pad is not None else 1
        for start in range(0, len(ids), size):
            batch = ids[start : start + size]
            width = len(batch[0][0])
            filler = self.pad if self.pad is not None else 0
            rows = [one + [filler] * (width - len(one)) for one, _ in batch]
            mask = [[1] * len(one) + [0] * (width - len(one)) for one, _ in batch]
            device = self.model.device
            try:
                with torch.inference_mode():
                    logits = self.model(
                        input_ids=torch.tensor(rows, device=device),  # [B, T]
                        attention_mask=torch.tensor(mask, device=device),
                    ).logits.float()  # [B, heads]
            except torch.OutOfMemoryError:
                raise AMoPOError(
                    f"{self.name}: a batch of {len(batch)} responses does not fit into memory; "
                    "write a smaller batch_size."
                ) from None
            for outputs, (_, mine) in zip(logits.tolist(), batch, strict=True):
                for place in mine:
                    yield place, Rating(outputs[self.columns[tasks[place].dimension]])

    def _ids(self, item: Item) -> tuple[list[int], str]:
        """Return a conversation's tokens, or none and why."""
        from jinja2 import TemplateError

        answer = {"role": "assistant", "content": item.response}
        try:
            ids = self.tokenizer.apply_chat_template(
                [*item.messages, answer], tokenize=True, return_dict=True
            )["input_ids"]
        except TemplateError as error:
            return [], f"{self.name}'s chat template refuses the conversation ({error})"
        if self.longest and len(ids) > self.longest:
            return [], f"it has {len(ids)} tokens, and {self.name} takes {self.longest}"
        return ids, ""

    def _column(self, head: int | str | None) -> int:
        labels = self.model.config.id2label
        count = self.model.config.num_labels
        names = [str(labels.get(i, i)) for i in range(count)]
        if head is None and count == 1:
            return 0
        if isinstance(head, str) and head in names:
            return names.index(head)
        if isinstance(head, int) and 0 <= head < count:
            return head
        wrong = "has several heads" if head is None else f"has no head {head!r}"
        raise AMoPOError(
            f"{self.name}: {wrong}; write head: with a number from 0 to {count - 1}, or one of "
            f"{', '.join(names)}."
        )


def _version(name: str) -> str:
    """Return the hub's commit of a model, or a hash of a folder's files; nothing where it is new.

    All of the weights: a checkpoint may differ from another in few of them.
    """
    folder = Path(name)
    if folder.is_dir():
        files = sorted([*folder.glob("*.json"), *folder.glob("*.safetensors")])
        return short_hash([(path.name, digest(path)) for path in files])
    with contextlib.suppress(OSError, ValueError):
        from transformers import AutoConfig

        return str(AutoConfig.from_pretrained(name, trust_remote_code=False)._commit_hash)
    return ""
