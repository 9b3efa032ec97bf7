"""The model card (README.md) beside a trained model: what was trained, on what, what came of it.

transformers' trainer writes one whose tables have a column a metric. Its front matter stays; the
rest is told anew, from the run's own log.
"""

import re
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from transformers.modelcard import extract_hyperparameters_from_trainer

from axolotl_amopo.commands.report.show import COMPARED, basis, number
from axolotl_amopo.training.runs import Run, read_run
from axolotl_amopo.training.trackers import markdown_table

FILE = "README.md"
TEMPLATE = Path(__file__).with_suffix(".md.jinja")
MARK = "Written by axolotl-amopo."
# Of cards that nobody wrote by hand: ours, transformers', and PEFT's form with nothing filled in.
MARKS = (MARK, "generated automatically according to the information the Trainer", "for Model ID")
# Of the `amopo:` block, beside what the tables of dimensions and data tell.
SETTINGS = ("gamma", "weighting", "weights", "winner", "rating_in_prompt", "pairs", "order_by")
OURS = re.compile(r"^axolotl_amopo\.formats\.(.+?)_?$")


def is_somebodys(folder: Path) -> bool:
    """Whether a folder has a card that a person wrote or edited."""
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
    contents = describe(run, extract_hyperparameters_from_trainer(trainer))
    ModelCard.from_template(data, template_path=str(TEMPLATE), **contents).save(folder / FILE)


def describe(run: Run, arguments: dict[str, Any]) -> dict[str, Any]:
    """What the template is filled with; tables are Markdown.

    Args:
        arguments: the trainer's, as transformers lists them in its own card.
    """
    about = run.about
    block, names = about["amopo"], [one["name"] for one in about["amopo"]["dimensions"]]
    settings = {"rl_beta": about["rl_beta"]} | {name: block[name] for name in SETTINGS} | arguments
    return {
        "mark": MARK,
        "name": run.name,
        "base": about["model"],
        "method": about["adapter"] or "full fine-tuning",
        "preferences": "a human preference"
        if len(names) == 1
        else f"{len(names)} human preferences at once",
        "first": names[0],
        "dimensions": markdown_table([of_dimension(one, about) for one in block["dimensions"]]),
        "results": markdown_table([of_prompt(run, prompt) for prompt in run.prompts]),
        "basis": basis(run),
        "pairs": run.eval_pairs if run.by_evaluation else None,
        "data": markdown_table([of_data(fact) for fact in about["data"]]),
        "settings": markdown_table(
            [{"key": key, "value": value} for key, value in settings.items() if value is not None]
        ),
        "config": (about.get("config") or "").strip(),
        "versions": ", ".join(f"{name} {number}" for name, number in about["versions"].items()),
    }


def of_dimension(dimension: dict[str, Any], about: dict[str, Any]) -> dict[str, Any]:
    name, facts = dimension["name"], about["data"]
    scales = {tuple(fact["scales"][name]) for fact in facts}
    lower = any(name in fact["lower_is_better"] for fact in facts)
    return {
        "dimension": name,
        "meaning": dimension["description"],
        "rated": ", ".join(f"{low:g} to {high:g}" for low, high in sorted(scales)),
        "better": "lower" if lower else "higher",
    }


def of_prompt(run: Run, prompt: str) -> dict[str, str]:
    row = {"prompt": prompt}
    for metric in COMPARED:
        change = run.change(f"amopo/{prompt}/{metric}")
        row[f"{metric}, before"] = number(metric, change.before)
        # Columns are keys: spaces, which Markdown drops, keep those of one name apart.
        row["after" + " " * len(row)] = number(metric, change.after)
    return row


def of_data(fact: dict[str, Any]) -> dict[str, Any]:
    return {
        "path": fact["name"],
        "split": fact["split"],
        "type": OURS.sub(r"amopo.\1", fact["type"]),
        "rows": fact["rows"],
        "prompts": fact["prompts"],
        "pairs": fact["pairs"],
        "left out": "; ".join(f"{count} {why}" for why, count in fact["dropped"].items()),
    }
