"""The model card (README.md) beside a trained model: what was trained, on what, with what result.

transformers' trainer writes a card whose tables have a column per metric. Its front matter stays;
the rest is written anew, from the run's own log.
"""

import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from transformers.modelcard import extract_hyperparameters_from_trainer

from axolotl_amopo.config.block import AMoPOConfig
from axolotl_amopo.objectives import Objective
from axolotl_amopo.training.runs import (
    TrainingRun,
    compared_metrics,
    explain_change,
    explain_numbers,
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
    "weights_per_row",
    "winner",
    "prompts",
    "weight_draws",
    "weight_concentration",
    "rating_in_prompt",
    "rating_levels",
    "pairs",
    "group_by_prompt",
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
    contents = card_contents(run, arguments, trainer.amopo, trainer.objective)
    ModelCard.from_template(data, template_path=str(TEMPLATE), **contents).save(folder / FILE)


def card_contents(
    run: TrainingRun, arguments: dict[str, Any], config: AMoPOConfig, objective: Objective
) -> dict[str, Any]:
    """Return the values that fill the card's template; tables are Markdown.

    Args:
        run: as its log tells it.
        arguments: the trainer's, as transformers lists them in its own card.
        config: the `amopo:` block that was trained.
        objective: made of it.
    """
    about, metrics = run.about, compared_metrics([run])
    block, names = about["amopo"], config.dimension_names
    unused = unused_keys(objective)
    own = {key: value for key, value in config.hyperparameters().items() if key not in unused}
    engine = {key: block.get(key) for key in SETTINGS}
    if not config.has_instructions:  # so no prompt asks for a rating
        engine |= dict.fromkeys(("prompts", "rating_in_prompt", "rating_levels"))
    engine = {key: value for key, value in engine.items() if value is not False}
    if config.weights is not None:
        shown = (f"{name} {weight:g}" for name, weight in config.weights.items())
        engine["weights"] = ", ".join(shown)
    reference = {"reference": "initial"} if "reference" in objective.needs else {}
    settings = {"rl_beta": about["rl_beta"]} | own | engine | reference | arguments
    loss = run.change("loss")
    return {
        "mark": MARK,
        "paper": objective.paper,
        "name": run.name,
        "base": about["model"],
        "method": about["adapter"] or "full fine-tuning",
        "preferences": "a human preference"
        if len(names) == 1
        else f"{len(names)} human preferences at once",
        "first": names[0],
        "has_instructions": config.has_instructions,
        "one_prompt": config.prompts == "one",
        "weighted": config.draws_weights,
        "weight": "weight" in metrics,
        "reference": bool(reference),
        "dimensions": markdown_table([dimension_row(one, about) for one in block["dimensions"]]),
        "results": markdown_table([result_row(run, prompt, metrics) for prompt in run.prompts]),
        "loss": None
        if loss.before is None or loss.after is None
        else f"{loss.before:.3f} before and {loss.after:.3f} after",
        "basis": explain_change(run),
        "numbers": explain_numbers(run),
        "held_out": held_out(run),
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


def unused_keys(objective: Objective) -> set[str]:
    """Return the hyperparameters that have no effect beside the others: it refuses to have them
    otherwise."""
    unused = set()
    for field in fields(objective):
        value = getattr(objective, field.name)
        if isinstance(value, str):  # one of a few words, which chooses what others mean
            continue
        try:
            replace(objective, **{field.name: not value if isinstance(value, bool) else value + 1})
        except ValueError:
            unused.add(field.name)
    return unused


def held_out(run: TrainingRun) -> str:
    """Return what the evaluations saw, e.g. `24 held-out pairs`; "" where there were not two."""
    if not run.by_evaluation:
        return ""
    if run.objective["per"] == "response":
        return f"{run.about['eval_examples']} held-out prompts with their responses"
    return f"{run.eval_pairs} held-out pairs"


def result_row(run: TrainingRun, prompt: str, metrics: list[str]) -> dict[str, str]:
    """Return a prompt's row: each compared metric before and after."""
    row = {"prompt": prompt}
    for metric in metrics:
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
