"""Two ways of ours through axolotl's data loader, which has none for a plugin.

From the config to a format, per entry of `datasets:`. axolotl drops keys that its schema does not
know, and its hash of a prepared dataset knows nothing of the `amopo:` block. So a fingerprint
stands in the entry's `conversation`: a field of that schema and of that hash, which only axolotl's
removed ShareGPT formats read. It makes the hash change when the rows would, and finds the entry's
own options in the block again. The day axolotl's hash covers keys of plugins, and its schema keeps
them, `mark` and `mark_of` go.

From a format to the trainer, per prepared dataset. axolotl merges, splits, shuffles, saves and
loads what a format returns, and hands on the rows alone. `datasets` keeps a dataset's description
through all of that, so facts about how the rows were made (scales, what was dropped) stand there
as JSON. The day axolotl hands a format's own facts to the trainer, `stamp` and `stamped` go.
"""

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset


def mark(entry: dict[str, Any], fingerprint: str) -> None:
    """Let an entry of `datasets:` carry a fingerprint of all that shapes its rows."""
    entry["conversation"] = fingerprint


def mark_of(ds_cfg: Any) -> str:
    """Return the fingerprint that an entry carries; empty where it carries none."""
    return ds_cfg.get("conversation") or ""


def stamp(dataset: "Dataset", facts: dict[str, Any]) -> "Dataset":
    """Let a prepared dataset carry facts about its making, as plain values."""
    dataset.info.description = json.dumps(facts)
    return dataset


def stamped(dataset: "Dataset") -> list[dict[str, Any]]:
    """Return the facts of every dataset that this one was merged from."""
    # `datasets` joins the descriptions of what it merges so; JSON has no empty line of its own.
    texts = (dataset.info.description or "").split("\n\n")
    return [json.loads(text) for text in texts if text.startswith("{")]
