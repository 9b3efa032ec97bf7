"""Write what rounds did for people at a terminal."""

from typing import Any

from axolotl_amopo.commands.kit.text import TextTable, print_tables, terminal
from axolotl_amopo.commands.online.plan import Online
from axolotl_amopo.commands.online.stages import PAGE

BASE = "base"


def print_rounds(plan: Online, told: list[dict[str, Any]]) -> None:
    """Print a table of the rounds, and where the rest is."""
    console = terminal()
    print_tables(console, [made(told)])
    last = plan.file.rounds
    if "steer" in told[-1]:
        print_tables(console, [measured(told[-1]["steer"])])
        console.print(f"\nAll rounds in one picture: {plan.folder(last) / PAGE}")
    console.print(f"The last model: {plan.model(last)}")


def made(told: list[dict[str, Any]]) -> TextTable:
    """Return what each round drew and how long its stages took."""
    names = list(dict.fromkeys(name for one in told for name in one if name != "round"))
    rows = [
        [
            str(one["round"]),
            f"{one['generate']['responses']}",
            *(f"{one[name]['seconds']:.0f}" if name in one else "" for name in names),
        ]
        for one in told
    ]
    return TextTable("Rounds", ["round", "responses", *(f"{name}, s" for name in names)], rows)


def measured(steer: dict[str, Any]) -> TextTable:
    """Return what the base and every round's model write without an instruction, and the fronts."""
    fronts = any(model["front"] for model in steer["models"])
    rows = []
    for model in sorted(steer["models"], key=lambda one: one["name"] != BASE):
        means = [one["change"] for one in model["plain"].values()]
        cells = ["" if mean is None else f"{mean:.2f}" for mean in means]
        if fronts:
            volume = model["front"] and model["front"]["volume"]
            cells.append("" if volume is None else f"{volume:.3f}")
        rows.append([model["name"], *cells])
    headings = ["model", *steer["models"][0]["plain"], *(["volume of the front"] * fronts)]
    return TextTable("On held-out prompts, without any instruction", headings, rows)
