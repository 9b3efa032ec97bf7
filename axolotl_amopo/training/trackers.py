"""Send trackers the method's settings and tables; transformers' callbacks send the metrics.

transformers' callbacks do not know the `amopo:` block; with it in the tracker, runs can be filtered
and compared by their settings. A tracker that fails is logged and never stops the run.
"""

import html
import importlib
from pathlib import Path
from typing import Any

from axolotl.utils.logging import get_logger
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback
from transformers.utils import flatten_dict

from axolotl_amopo.config.block import INTERNAL
from axolotl_amopo.training.metrics import PER_CRITERION, SPREAD

LOG = get_logger(__name__)

TableRow = dict[str, Any]

# TensorBoard's custom scalars: a chart per metric with all prompts in it, by patterns of tags.
CHARTS = {
    split: {
        metric: ["Multiline", [f"^{split}/amopo/[^/]+/{metric}$"]]
        for metric in (*PER_CRITERION, f"{SPREAD}_std")
    }
    for split in ("eval", "train")
}


class Trackers(TrainerCallback):
    """Reach the trackers that a trainer reports to; used on the main process alone."""

    def __init__(self, trainer: Any):
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            block = self.trainer.amopo.model_dump(mode="json", exclude=INTERNAL, exclude_none=True)
            self._each(_settings, {"rl": "amopo", "rl_beta": self.trainer.beta, "amopo": block})

    def table(self, name: str, rows: list[TableRow], step: int, markdown: str) -> None:
        """Send a table, as it is at `step`; not to a TensorBoard file that the hub would get.

        Args:
            rows: at least one; all with the same columns.
            markdown: the same table for trackers that have text and no tables.
        """
        self._each(self._table, name, rows, step, markdown)

    def _each(self, send: Any, *what: Any) -> None:
        for tracker in self.trainer.args.report_to:
            try:
                send(self._handle(tracker), tracker, *what)
            except Exception as error:
                # Each tracker raises its own kinds of errors (networks, files, limits), and none
                # of them may end a training run; the traceback shows where the fault is ours.
                what_failed = send.__name__.strip("_")
                LOG.warning(
                    "%s did not take %s, and training goes on without: %s",
                    tracker, what_failed, error, exc_info=True,
                )  # fmt: skip

    def _table(self, handle: Any, tracker: str, name: str, *what: Any) -> None:
        if tracker == "tensorboard" and self._is_uploaded(handle.log_dir):
            LOG.warning_once(
                f"TensorBoard does not get the table {name}: with hub_model_id its files are "
                "uploaded. Set TENSORBOARD_LOGGING_DIR to a folder outside output_dir."
            )
        else:
            _table(handle, tracker, name, *what)

    def _is_uploaded(self, folder: str) -> bool:
        args = self.trainer.args
        inside = Path(folder).resolve().is_relative_to(Path(args.output_dir).resolve())
        return args.push_to_hub and inside

    def _handle(self, tracker: str) -> Any:
        """Return the tracker's open run, which transformers' callback has begun."""
        if tracker == "tensorboard":
            callbacks = self.trainer.callback_handler.callbacks
            return next(c.tb_writer for c in callbacks if isinstance(c, TensorBoardCallback))
        module = importlib.import_module(tracker)
        return module.get_running_experiment() if tracker == "comet_ml" else module


def _settings(handle: Any, tracker: str, settings: dict[str, Any]) -> None:
    match tracker:
        case "wandb":
            handle.config.update(settings, allow_val_change=True)
        case "trackio":
            handle.config.update(settings)
        case "mlflow":
            handle.log_params(flatten_dict(settings))
        case "comet_ml":
            handle.log_parameters(flatten_dict(settings))
        case "tensorboard":
            rows = [{"key": key, "value": value} for key, value in flatten_dict(settings).items()]
            handle.add_text("amopo", markdown_table(rows))
            handle.add_custom_scalars(CHARTS)


def _table(
    handle: Any, tracker: str, name: str, rows: list[TableRow], step: int, markdown: str
) -> None:
    columns, values = list(rows[0]), [list(row.values()) for row in rows]
    match tracker:
        case "wandb" | "trackio":
            table = handle.Table(columns=columns, data=values)
            handle.log({f"eval/{name}": table, "train/global_step": step})
        case "mlflow":  # appends to the file
            handle.log_table({key: [row[key] for row in rows] for key in columns}, f"{name}.json")
        case "comet_ml":
            handle.log_table(f"{name}-{step}.csv", tabular_data=values, headers=columns)
        case "tensorboard":
            handle.add_text(f"eval/{name}", markdown, step)


def markdown_table(rows: list[TableRow]) -> str:
    """Return rows with the same keys, at least one, as a Markdown table."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(row.values() for row in rows)]
    return "\n".join("| " + " | ".join(map(in_line, line)) + " |" for line in lines)


def in_line(value: Any) -> str:
    """Return a value as one line of Markdown, with nothing that ends a cell or is HTML."""
    value = f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)
    return " ".join(html.escape(value).replace("|", "&#124;").split())
