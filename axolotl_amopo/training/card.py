"""The model card (README.md) beside a trained model: what was trained, on what, with what result.

transformers' trainer writes a card whose tables have a column per metric. Its front matter stays;
the rest is written anew, from the run's own log.
"""

import re
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from transformers.modelcard import extract_hyperparameters_from_trainer

from axolotl_amopo.config.block import AMoPOConfig
from axolotl_amopo.objectives import Paper
from axolotl_amopo.training.runs import (
    COMPARED_METRICS,
    TrainingRun,
    explain_change,
    format_metric,
    read_run,
)
from axolotl_amopo.training.trackers import markdown_table

FILE = "README.md"
TEMPLATE = Path(__file__).with_suffix(".md.jinja")
MARK = "Written by axolotl-amopo."
# Text in cards that nobody wrote by hand: ours, transformers', and PEFT's unfilled form.
MARKS = (MARK, "generated automatically according to the information the Trainer", "for Model ID")
# Keys of the `amopo:` block in the table of settings; the other tables have the rest.
SETTINGS = (
    "objective",
    "weights",
    "winner",
    "rating_in_prompt",
    "rating_levels",
    "pairs",
    "order_by",
)
OURS = re.compile(r"^axolotl_amopo\.formats\.(.+?)_?$")


def is_somebodys(folder: Path) -> bool:
    """Return whether a folder has a card that a person wrote or edited."""
    path = folder / FILE
    return path.is_file() and not any(mark in path.read_text(encoding="utf-8") for mark in MARKS)


def write_card(trainer: Any) -> None:
    """Write a run's card over the one that transformers has written.

    Raises:
        AMoPOError: where the folder has no log of the run.
    """
    folder = Path(trainer.args.output_dir)
    run = read_run(folder)
    data = ModelCard.load(folder / FILE).data
    data.tags = list(dict.fromkeys([*(data.tags or ()), *trainer.tag_names]))
    arguments = extract_hyperparameters_from_trainer(trainer)
    contents = card_contents(run, arguments, trainer.objective.paper)
    ModelCard.from_template(data, template_path=str(TEMPLATE), **contents).save(folder / FILE)


def card_contents(run: TrainingRun, arguments: dict[str, Any], paper: Paper) -> dict[str, Any]:
    """Return the values that fill the card's template; tables are Markdown.

    Args:
        arguments: the trainer's, as transformers lists them in its own card.
    """
    about = run.about
    block, names = about["amopo"], [one["name"] for one in about["amopo"]["dimensions"]]
    # An objective's own keys are those that the block has beside its fields.
    own = {key: value for key, value in block.items() if key not in AMoPOConfig.model_fields}
    engine = {key: block.get(key) for key in SETTINGS}
    settings = {"rl_beta": about["rl_beta"]} | own | engine | arguments
    return {
        "mark": MARK,
        "paper": paper,
        "name": run.name,
        "base": about["model"],
        "method": about["adapter"] or "full fine-tuning",
        "preferences": "a human preference"
        if len(names) == 1
        else f"{len(names)} human preferences at once",
        "first": names[0],
        "dimensions": markdown_table([dimension_row(one, about) for one in block["dimensions"]]),
        "results": markdown_table([result_row(run, prompt) for prompt in run.prompts]),
        "basis": explain_change(run),
        "pairs": run.eval_pairs if run.by_evaluation else None,
        "data": markdown_table([data_row(fact) for fact in about["data"]]),
        "settings": markdown_table(
            [{"key": key, "value": value} for key, value in settings.items() if value is not None]
        ),
        "config": (about.get("config") or "").strip(),
        "versions": ", ".join(f"{name} {number}" for name, number in about["versions"].items()),
    }


def dimension_row(dimension: dict[str, Any], about: dict[str, Any]) -> dict[str, Any]:
    """Return a dimension's row: its meaning, its scales in the data, which end is better."""
    name, facts = dimension["name"], about["data"]
    scales = {tuple(fact["scales"][name]) for fact in facts}
    lower = any(name in fact["lower_is_better"] for fact in facts)
    return {
        "dimension": name,
        "meaning": dimension["description"],
        "rated": ", ".join(f"{low:g} to {high:g}" for low, high in sorted(scales)),
        "better": "lower" if lower else "higher",
    }


def result_row(run: TrainingRun, prompt: str) -> dict[str, str]:
    """Return a prompt's row: each compared metric before and after."""
    row = {"prompt": prompt}
    for metric in COMPARED_METRICS:
        change = run.change(f"amopo/{prompt}/{metric}")
        row[f"{metric}, before"] = format_metric(metric, change.before)
        # Columns are keys: spaces, which Markdown drops, keep columns of one name apart.
        row["after" + " " * len(row)] = format_metric(metric, change.after)
    return row


def data_row(fact: dict[str, Any]) -> dict[str, Any]:
    """Return a dataset's row: where it came from, its sizes, what was left out and why."""
    return {
        "path": fact["name"],
        "split": fact["split"],
        "type": OURS.sub(r"amopo.\1", fact["type"]),
        "rows": fact["rows"],
        "prompts": fact["prompts"],
        "pairs": fact["pairs"],
        "left out": "; ".join(f"{count} {why}" for why, count in fact["dropped"].items()),
    }
