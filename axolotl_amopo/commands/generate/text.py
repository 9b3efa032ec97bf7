"""Print answers at a terminal."""

from rich.text import Text

from axolotl_amopo.commands.kit.answers import Answer
from axolotl_amopo.commands.kit.text import terminal
from axolotl_amopo.steering.steering import written


def print_answers(answers: list[Answer], *, colours: bool) -> None:
    """Print every answer under its settings and its instruction."""
    console = terminal(colours=colours)
    for answer in answers:
        console.rule(Text(written(answer.settings)), align="left", style="dim")
        if answer.instruction:
            console.print(Text(answer.instruction, style="cyan"))
            console.print()
        for question, text in zip(
            [answer.prompt.messages[-1]["content"], *answer.prompt.later], answer.turns, strict=True
        ):
            if answer.prompt.where != "--prompt":
                console.print(Text(question, style="dim"))
            console.print(Text(text))
        if not answer.finished:
            console.print("[dim](cut off at --max-new-tokens)[/]")
        console.print()
