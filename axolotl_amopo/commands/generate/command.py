"""`axolotl amopo generate`, `template` and `chat`: a trained model, steered."""

import json
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from axolotl_amopo.commands.kit.options import EXITS, JSON, QUIET, check_free, libraries, told

if TYPE_CHECKING:
    from axolotl_amopo.commands.kit.answers import Answer

MODEL = click.argument("model", metavar="MODEL_OR_CONFIG")
BASE_MODEL = click.option(
    "--base-model", metavar="PATH", help="The base model, where it isn't where training had it."
)
DIMENSIONS = click.option(
    "--dimension",
    "-d",
    "dimensions",
    multiple=True,
    metavar="NAME[=RATING]",
    help="Ask for it, at this rating or its best; several times for several.",
)
EVERYTHING = click.option("--overall", is_flag=True, help="Ask for all dimensions at their best.")
FORCE = click.option("--force", is_flag=True, help="Overwrite the output where there is one.")
FORMATS = ("jsonl", "alpaca_eval", "arena_hard", "mt_bench")


def settings_of(dimensions: tuple[str, ...], overall: bool) -> dict[str, float | None]:
    from axolotl_amopo.steering.steering import OVERALL, parse_settings

    return ({OVERALL: None} if overall else {}) | parse_settings(dimensions)


@click.command(context_settings={"max_content_width": 80}, epilog=f"{EXITS}.")
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
@EVERYTHING
@click.option("--sweep", metavar="NAME", help="One answer for each rating of a dimension.")
@click.option("--output", type=click.Path(path_type=Path), metavar="FILE", help="Of the answers.")
@click.option("--format", "style", type=click.Choice(FORMATS), default="jsonl", show_default=True)
@click.option("--name", metavar="TEXT", help="What the output calls the model; else its folder.")
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
    sweep: str | None,
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
    """Answers of a trained model, asked for ratings.

    \b
        axolotl amopo generate outputs/adapter --prompt "Is tea healthy?" \\
            --dimension honesty=5
        axolotl amopo generate outputs/adapter --input questions.jsonl \\
            --sweep helpfulness --output answers.jsonl

    Without --dimension, --overall and --sweep there is no instruction. Rows of
    the input have messages, prompt, instruction or turns (MT-Bench's questions,
    asked one after the other); their other fields come back beside `response`
    and `amopo`. The model is a folder that training wrote, or its YAML.
    """
    if (prompt is None) == (source is None):
        raise click.UsageError("Name either --prompt TEXT or --input FILE.")
    if style != "jsonl" and (sweep or not output):
        raise click.UsageError(
            f"--format {style} is a file with one answer a question: add --output, and no --sweep."
        )
    check_free(output, force)
    with told(), libraries(quiet=False, as_json=as_json):
        from axolotl_amopo.commands.generate.export import as_row, check, export
        from axolotl_amopo.commands.generate.questions import of_text, read
        from axolotl_amopo.commands.kit.answers import Generator, Sampling
        from axolotl_amopo.commands.kit.trained import find
        from axolotl_amopo.errors import AMoPOError

        settings = settings_of(dimensions, overall)
        trained = find(model, base_model)
        prompts = read(source) if source else [of_text(prompt)]
        check(prompts, style)
        each = [settings]
        if sweep:
            if sweep in settings:
                raise AMoPOError(f"--sweep {sweep}: leave --dimension {sweep} out.")
            if trained.steering.rating_in_prompt == "none":
                raise AMoPOError("--sweep: the model was trained without ratings in its prompts.")
            each = [settings | {sweep: r} for r in trained.steering.dimension(sweep).ratings()]
        for one in filter(None, each):
            trained.steering.asked(one)  # before the model is loaded
        began = time.monotonic()
        _hush(quiet)
        generator = Generator(trained, backend, base=base)
        count = sum(one.questions for one in prompts) * len(each)
        with _progress(count, quiet) as done:
            answers = generator.answers(prompts, each, Sampling(**sampling), done)
        called = name or trained.folder.resolve().name + ("-base" if base else "")
        text = export(answers, style, called)
    if output:
        output.write_text(text, encoding="utf-8")
    elif not as_json:
        _show(answers, sys.stdout.isatty())
    facts = {
        "output": output and str(output),
        "answers": len(answers),
        "unfinished": sum(not one.finished for one in answers),
        "tokens": sum(one.tokens for one in answers),
        "seconds": round(time.monotonic() - began, 3),
    }
    if as_json:
        rows = {} if output else {"rows": [as_row(one, called) for one in answers]}
        click.echo(json.dumps(facts | rows))
    elif output and not quiet:
        cut = f", {facts['unfinished']} cut off" if facts["unfinished"] else ""
        click.echo(f"Written: {output} ({len(answers)} answers{cut})")


@click.command(context_settings={"max_content_width": 80}, epilog=f"{EXITS}.")
@MODEL
@click.option("--output", type=click.Path(path_type=Path), required=True, metavar="FILE")
@DIMENSIONS
@EVERYTHING
@FORCE
@QUIET
def template(
    model: str, output: Path, dimensions: tuple[str, ...], overall: bool, force: bool, quiet: bool
) -> None:
    """A chat template that steers by a line of the system message.

    \b
        axolotl amopo template outputs/adapter --output steered.jinja
        vllm serve outputs/merged --chat-template steered.jinja

    The system message's first line then says what to ask for, and is taken out:

    \b
        {"role": "system", "content": "amopo: helpfulness=4, honesty=5"}

    It may say overall or none too. With --dimension or --overall, that is what
    conversations without such a line ask for. The template is held against what
    training rendered before it is written. Over a folder's chat_template.jinja
    (with --force), everything that loads the folder steers.
    """
    check_free(output, force)
    with told():
        from axolotl_amopo.commands.kit.trained import chat_template, find, load_tokenizer
        from axolotl_amopo.steering.template import check, steered

        trained = find(model)
        tokenizer = load_tokenizer(trained)
        settings = settings_of(dimensions, overall)
        own = chat_template(tokenizer, trained.folder)
        made = steered(own, trained.steering, settings)
        check(tokenizer, made, trained.steering)
    output.write_text(made, encoding="utf-8")
    if not quiet:
        click.echo(f"Written: {output}")


@click.command(context_settings={"max_content_width": 80}, epilog=f"{EXITS}.")
@MODEL
@BASE_MODEL
@click.option("--host", default="127.0.0.1", show_default=True, help="0.0.0.0 for all networks.")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=7860, show_default=True, help="0 for any."
)
@click.option("--share", is_flag=True, help="A public link through Gradio's servers.")
@click.option("--quiet", is_flag=True, help="No words but the address.")
def chat(
    model: str, base_model: str | None, host: str, port: int, share: bool, quiet: bool
) -> None:
    """A page in the browser: base and tuned answers, and a slider a dimension.

    \b
        axolotl amopo chat outputs/adapter

    An adapter is switched off for the base's answers, so one model is in memory;
    beside a whole model, the base is loaded too where --base-model names it.
    Prints the address and opens no browser; Ctrl-C ends it.
    """
    with told():
        from axolotl_amopo.commands.chat.app import Sides, free_port, page, serve
        from axolotl_amopo.commands.kit.trained import find

        trained = find(model, base_model)
        trained.steering  # noqa: B018, a folder that can't be steered, before the model is loaded
        port = free_port(host, port)
        _hush(quiet)
        sides = Sides(trained, with_base=trained.is_adapter or base_model is not None)
        serve(page(sides), host=host, port=port, share=share)


def _hush(quiet: bool) -> None:
    from transformers.utils import logging

    if quiet:
        logging.disable_progress_bar()
        logging.set_verbosity_error()


@contextmanager
def _progress(count: int, quiet: bool):
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = TextColumn("answers"), BarColumn(), MofNCompleteColumn()
    with Progress(*columns, console=Console(stderr=True), disable=quiet) as progress:
        task = progress.add_task("answers", total=count)
        yield lambda made: progress.advance(task, made)


def _show(answers: list["Answer"], colours: bool) -> None:
    from rich.console import Console
    from rich.text import Text

    from axolotl_amopo.steering.steering import written

    console = Console(width=80, highlight=False, force_terminal=colours)
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
