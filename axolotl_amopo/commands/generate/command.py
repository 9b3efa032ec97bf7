"""The click command `axolotl amopo generate`."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from axolotl_amopo.commands.kit.options import (
    ALL_DIMENSIONS,
    BASE_MODEL,
    DIMENSIONS,
    FORCE,
    JSON,
    MODEL,
    QUIET,
    WEIGHTS,
    check_free,
    command,
    library_output,
    quiet_transformers,
    steering_settings,
    write_json,
)

if TYPE_CHECKING:
    from axolotl_amopo.steering.steering import Steering

FORMATS = ("jsonl", "alpaca_eval", "arena_hard", "mt_bench")


@command()
@MODEL
@click.option("--prompt", metavar="TEXT", help="One question.")
@click.option(
    "--input",
    "source",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Questions: .jsonl, .json or .txt.",
)
@DIMENSIONS
@ALL_DIMENSIONS
@WEIGHTS
@click.option("--sweep", metavar="NAME", help="One answer per rating of a dimension.")
@click.option(
    "--sweep-weight", metavar="NAME", help="One answer per weight of a dimension, 0 to 1."
)
@click.option(
    "--output", type=click.Path(path_type=Path), metavar="FILE", help="Write the answers."
)
@click.option("--format", "style", type=click.Choice(FORMATS), default="jsonl", show_default=True)
@click.option("--name", metavar="TEXT", help="The model's name in the output; else its folder's.")
@click.option("--base", is_flag=True, help="Answer with the untuned base, to compare.")
@BASE_MODEL
@click.option("--max-new-tokens", type=click.IntRange(1), default=512, show_default=True)
@click.option(
    "--temperature", type=click.FloatRange(0), default=0.0, help="0, the default: the likeliest."
)
@click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), default=1.0)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--batch-size", type=click.IntRange(1), default=8, show_default=True)
@click.option(
    "--backend",
    type=click.Choice(["auto", "transformers", "vllm"]),
    default="auto",
    help="auto: vLLM on a GPU where it is installed.",
)
@FORCE
@QUIET
@JSON
def generate(
    model: str,
    prompt: str | None,
    source: Path | None,
    dimensions: tuple[str, ...],
    overall: bool,
    weights: str | None,
    sweep: str | None,
    sweep_weight: str | None,
    output: Path | None,
    style: str,
    name: str | None,
    base: bool,
    base_model: str | None,
    backend: str,
    force: bool,
    quiet: bool,
    as_json: bool,
    **sampling: Any,
) -> None:
    """Answer questions with a trained model that is asked for ratings.

    \b
        axolotl amopo generate outputs/adapter --prompt "Is tea healthy?" \\
            --dimension honesty=5
        axolotl amopo generate outputs/adapter --input questions.jsonl \\
            --sweep helpfulness --output answers.jsonl
        axolotl amopo generate outputs/adapter --prompt "Is tea healthy?" \\
            --weights helpfulness=0.7,honesty=0.3

    Without any of these there is no instruction. Weights stand in the prompt as
    they are (cos_dpo), or become ratings of all dimensions to ask for. Rows of
    the input have messages, prompt, instruction or turns (MT-Bench's questions,
    asked one after the other); their other fields come back beside `response`
    and `amopo`. The model is a folder that training wrote, or its YAML.
    """
    if (prompt is None) == (source is None):
        raise click.UsageError("Name either --prompt TEXT or --input FILE.")
    if style != "jsonl" and (sweep or sweep_weight or not output):
        raise click.UsageError(
            f"--format {style} is a file with one answer per question: add --output, and no "
            "--sweep."
        )
    if sweep and (weights or sweep_weight):
        raise click.UsageError("--sweep goes through ratings: for weights, write --sweep-weight.")
    if sweep_weight and (dimensions or overall):
        raise click.UsageError(
            "--sweep-weight goes with --weights, not with --dimension or --overall."
        )
    check_free(output, force)
    with library_output(quiet=False, as_json=as_json):
        from axolotl_amopo.commands.generate.export import check_style, export_answers
        from axolotl_amopo.commands.kit.answers import answer_row, generate_answers
        from axolotl_amopo.commands.kit.generator import Sampling
        from axolotl_amopo.commands.kit.models import find_model
        from axolotl_amopo.commands.kit.questions import read_prompts, text_prompt

        settings = steering_settings(dimensions, overall, weights)
        trained = find_model(model, base_model)
        prompts = read_prompts(source) if source else [text_prompt(prompt)]
        check_style(prompts, style)
        each = [settings]
        if name_swept := sweep or sweep_weight:
            each = _sweep(trained.steering, settings, name_swept, by_weight=not sweep)
        began = time.monotonic()
        if quiet:
            quiet_transformers()
        with _progress(quiet) as progress:
            answers = generate_answers(
                trained,
                prompts,
                each,
                Sampling(**sampling),
                backend=backend,
                base=base,
                progress=progress,
            )
        model_name = name or trained.folder.resolve().name + ("-base" if base else "")
        text = export_answers(answers, style, model_name)
    if output:
        output.write_text(text, encoding="utf-8")
    elif not as_json:
        from axolotl_amopo.commands.generate.text import print_answers

        print_answers(answers, colours=sys.stdout.isatty())
    facts = {
        "output": output and str(output),
        "answers": len(answers),
        "unfinished": sum(not one.finished for one in answers),
        "tokens": sum(one.tokens for one in answers),
        "seconds": round(time.monotonic() - began, 3),
    }
    if as_json:
        rows = {} if output else {"rows": [answer_row(one, model_name) for one in answers]}
        write_json(facts | rows, as_json=True)
    elif output and not quiet:
        cut = f", {facts['unfinished']} cut off" if facts["unfinished"] else ""
        click.echo(f"Written: {output} ({len(answers)} answers{cut})")


def _sweep(
    steering: "Steering", settings: dict[str, float | None], name: str, *, by_weight: bool
) -> list[dict[str, float | None]]:
    """Return the settings of --sweep or --sweep-weight: one per rating or weight of the dimension.

    Raises:
        AMoPOError: for a dimension that can't be swept.
    """
    from axolotl_amopo.errors import AMoPOError
    from axolotl_amopo.steering.steering import WEIGHTS_TO_TRY, Weights

    if name in settings:
        option = "--weights" if by_weight else "--dimension"
        raise AMoPOError(f"--sweep{'-weight' * by_weight} {name}: leave {option} {name} out.")
    dimension = steering.dimension(name)
    if by_weight:
        return [Weights(settings | {name: weight}) for weight in WEIGHTS_TO_TRY]
    if not steering.takes_numbers:
        raise AMoPOError("--sweep: the model was trained without ratings in its prompts.")
    return [settings | {name: rating} for rating in steering.tries(dimension)]


@contextlib.contextmanager
def _progress(quiet: bool) -> Iterator[Callable[[int], Callable[[int], None]]]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    from axolotl_amopo.commands.kit.text import bars_console

    columns = TextColumn("answers"), BarColumn(), MofNCompleteColumn()
    with contextlib.ExitStack() as stack:

        def begin(count: int) -> Callable[[int], None]:
            # The bar opens here, so that an error before the first answer stands alone.
            bars = Progress(*columns, console=bars_console(), disable=quiet)
            stack.enter_context(bars)
            task = bars.add_task("answers", total=count)
            return lambda made: bars.advance(task, made)

        yield begin
