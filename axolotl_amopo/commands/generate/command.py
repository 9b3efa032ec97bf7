"""The click command `axolotl amopo generate`."""

import contextlib
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from axolotl_amopo.commands.kit.options import (
    ALL_DIMENSIONS,
    BASE_MODEL,
    DIMENSIONS,
    FORCE,
    JSON,
    QUIET,
    WEIGHTS,
    check_free,
    check_top_p,
    command,
    library_output,
    quiet_transformers,
    sampling_options,
    steering_settings,
    write_json,
)

if TYPE_CHECKING:
    from axolotl_amopo.steering.steering import Steering

DEFAULT_TEMPERATURES = "0.7,1.0"
FORMATS = ("jsonl", "alpaca_eval", "arena_hard", "mt_bench")


@command()
@click.argument("model", metavar="MODEL_OR_CONFIG", required=False)
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
@click.option(
    "--candidates",
    type=click.IntRange(1),
    metavar="N",
    help="Draw N different responses per prompt, for `rate`.",
)
@click.option(
    "--spread",
    multiple=True,
    metavar="SETTINGS",
    help="Of candidates, e.g. 'helpfulness=5, honesty', overall, none; several times for several. "
    "Default: none, the best of everything, and each dimension's ends.",
)
@click.option(
    "--temperatures", metavar="T,...", help="Of candidates; default: 0.7,1.0.", default=None
)
@click.option("--resume", is_flag=True, help="Go on with an --output of candidates.")
@click.option(
    "--server", metavar="URL", help="Candidates of a model behind OpenAI's API, up to /v1."
)
@click.option("--server-model", metavar="NAME", help="The model's name there.")
@click.option(
    "--server-key-env", metavar="VARIABLE", help="The environment variable that holds its key."
)
@click.option("--concurrency", type=click.IntRange(1), default=8, help="Requests at once.")
@click.option("--name", metavar="TEXT", help="The model's name in the output; else its folder's.")
@click.option("--base", is_flag=True, help="Answer with the untuned base, to compare.")
@BASE_MODEL
@sampling_options(max_new_tokens=512)
@FORCE
@QUIET
@JSON
def generate(
    model: str | None,
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
    candidates: int | None,
    spread: tuple[str, ...],
    temperatures: str | None,
    resume: bool,
    server: str | None,
    server_model: str | None,
    server_key_env: str | None,
    concurrency: int,
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
    and `amopo`. The model is a folder that training wrote, or its YAML; a model
    that was trained by others, or a hub's name, answers without an instruction.

    \b
        axolotl amopo generate outputs/adapter --input prompts.jsonl \\
            --candidates 4 --output candidates.jsonl
        axolotl amopo generate --input prompts.jsonl --candidates 4 \\
            --server http://localhost:8000/v1 --server-model NAME

    Candidates are drawn under --spread and --temperatures by turns. With
    --server, the model is there, and MODEL_OR_CONFIG, which may be left out,
    says what it can be asked for.
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
    if candidates is None:
        for option, given in (
            ("--spread", spread),
            ("--temperatures", temperatures),
            ("--resume", resume),
            ("--server", server),
        ):
            if given:
                raise click.UsageError(f"{option} goes with --candidates.")
        if model is None:
            raise click.UsageError("Missing argument 'MODEL_OR_CONFIG'.")
        check_top_p(sampling["top_p"], sampling["temperature"])
    elif sweep or sweep_weight or dimensions or overall or weights:
        raise click.UsageError("--candidates are asked for by --spread: write that alone.")
    elif style != "jsonl":
        raise click.UsageError(f"--candidates are rows of JSON: leave --format {style} out.")
    elif sampling["temperature"]:
        raise click.UsageError("--candidates are drawn by --temperatures: write that.")
    if (server is None) != (server_model is None):
        raise click.UsageError("--server URL and --server-model NAME go together.")
    if server and (base or base_model or backend != "auto"):
        raise click.UsageError("--server has its own model: leave --base and --backend out.")
    if server_key_env and not server:
        raise click.UsageError("--server-key-env goes with --server.")
    if candidates and not (model or server):
        raise click.UsageError("Name MODEL_OR_CONFIG, or --server.")
    if resume and (force or not output):
        raise click.UsageError("--resume goes on with an --output, without --force.")
    check_free(output, force or resume)
    if candidates:
        chances = _temperatures(temperatures)
        with library_output(quiet=False, as_json=as_json):
            if quiet:
                quiet_transformers()
            facts = _draw(
                model=model,
                prompt=prompt,
                input_file=source,
                number=candidates,
                lines=spread,
                temperatures=chances,
                output=output,
                resume=resume,
                server=(server, server_model, server_key_env, concurrency) if server else None,
                name=name,
                base=base,
                base_model=base_model,
                backend=backend,
                quiet=quiet,
                **sampling,
            )
        if as_json:
            write_json(facts, as_json=True)
        elif not output:
            for row in facts["rows"]:
                click.echo(json.dumps(row, ensure_ascii=False))
        elif not quiet:
            click.echo(_summary(facts, candidates))
        return
    with library_output(quiet=False, as_json=as_json):
        from axolotl_amopo.commands.generate.export import check_style, export_answers
        from axolotl_amopo.commands.kit.answers import answer_row, generate_answers
        from axolotl_amopo.commands.kit.generator import Sampling
        from axolotl_amopo.commands.kit.models import find_model
        from axolotl_amopo.commands.kit.questions import read_prompts, text_prompt

        settings = steering_settings(dimensions, overall, weights)
        trained = find_model(str(model), base_model, from_hub=True, untuned=base)
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


def _draw(
    *,
    model: str | None,
    prompt: str | None,
    input_file: Path | None,
    number: int,
    lines: tuple[str, ...],
    temperatures: list[float],
    output: Path | None,
    resume: bool,
    server: tuple | None,
    name: str | None,
    base: bool,
    base_model: str | None,
    backend: str,
    quiet: bool,
    **sampling: Any,
) -> dict[str, Any]:
    """Draw candidates and write their rows, one prompt after the other; return what came of it."""
    from axolotl_amopo.commands.generate import candidates as drawing
    from axolotl_amopo.commands.kit.generator import Generator, Sampling
    from axolotl_amopo.commands.kit.models import find_model
    from axolotl_amopo.commands.kit.questions import read_prompts, text_prompt
    from axolotl_amopo.endpoint import Endpoint
    from axolotl_amopo.errors import AMoPOError
    from axolotl_amopo.steering.steering import read_settings

    began = time.monotonic()
    trained = find_model(model, base_model, from_hub=True, untuned=base) if model else None
    steering = trained.steering if trained and (trained.has_steering or any(lines)) else None
    spread = [read_settings(line) for line in lines] or drawing.spread_of(steering)
    for settings in filter(None, spread):  # before the model is loaded
        if steering is None:
            raise AMoPOError("--spread: name MODEL_OR_CONFIG, which says what can be asked for.")
        steering.instruction(settings)
    prompts = read_prompts(input_file) if input_file else [text_prompt(str(prompt))]
    drawing.check_prompts(prompts)
    going_on = resume and output is not None and output.exists()
    done = drawing.drawn_before(prompts, output) if going_on and output else set()
    how, counts = Sampling(**sampling), drawing.Counts()
    with _progress(quiet) as begin:
        source: drawing.InProcess | drawing.Served
        if server:
            url, known_as, key_env, concurrency = server
            endpoint = Endpoint(url, known_as, key_env=key_env, concurrency=concurrency)
            endpoint.check()
            source = drawing.Served(endpoint, steering, how)
        else:
            assert trained is not None  # or the command would have ended
            known_as = trained.folder.resolve().name if trained.folder.exists() else str(model)
            known_as += "-base" if base else ""
            source = drawing.InProcess(Generator(trained, backend, base=base), how)
        source.progress = begin((len(prompts) - len(done)) * number)
        rows = drawing.draw_candidates(
            prompts,
            number,
            spread,
            temperatures,
            source,
            model=name or known_as,
            seed=how.seed,
            done=done,
            counts=counts,
        )
        kept = _write_rows(rows, output, going_on=going_on)
    return {
        "output": output and str(output),
        **asdict(counts),
        "seconds": round(time.monotonic() - began, 3),
        **({"tokens": source.tokens} if isinstance(source, drawing.Served) else {}),
        **({} if output else {"rows": kept}),
    }


def _summary(facts: dict[str, Any], number: int) -> str:
    notes = [f"{facts['responses']} responses to {facts['prompts']} prompts"]
    for key, what in (
        ("unfinished", "cut off"),
        ("equal", "equal or empty ones left out"),
        ("refused", "refused by the server"),
        ("short", f"prompts with fewer than {number}"),
    ):
        notes += [f"{facts[key]} {what}"] if facts[key] else []
    return f"Written: {facts['output']} ({', '.join(notes)})"


def _temperatures(text: str | None) -> list[float]:
    """Return what --temperatures names.

    Raises:
        click.UsageError: for what is no number above 0.
    """
    try:
        found = [float(part) for part in (text or DEFAULT_TEMPERATURES).split(",")]
    except ValueError:
        found = []
    if not found or not all(0 < one < math.inf for one in found):
        raise click.UsageError(
            f"--temperatures {text}: write numbers above 0, e.g. {DEFAULT_TEMPERATURES}; at 0 all "
            "responses would be the same."
        )
    return found


def _write_rows(
    rows: Iterator[dict[str, Any]], output: Path | None, *, going_on: bool
) -> list[dict[str, Any]]:
    """Write rows as they come, and return them where there is no file to write.

    Raises:
        AMoPOError: where the file can't be written.
    """
    from axolotl_amopo.errors import AMoPOError

    if output is None:
        return list(rows)
    try:
        with output.open("a" if going_on else "w", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                file.flush()
    except OSError as error:
        raise AMoPOError(
            f"{output}: can't be written ({error.strerror}); what is in it stays, and --resume "
            "goes on with it."
        ) from None
    return []


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
