"""The click command `axolotl amopo rate`."""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from axolotl_amopo.commands.kit.options import (
    FORCE,
    JSON,
    QUIET,
    check_free,
    command,
    library_output,
    quiet_transformers,
    write_json,
)

if TYPE_CHECKING:
    from axolotl_amopo.raters.rating import Raters


@command(needs_axolotl=False)
@click.argument("source", metavar="FILE", type=click.Path(exists=True, dir_okay=False))
@click.option(
    "--raters",
    type=click.Path(path_type=Path),
    metavar="RATERS.yml",
    help="Dimensions and who rates them, as above.",
)
@click.option("--judge", metavar="URL", help="A judge behind OpenAI's API, up to /v1.")
@click.option("--judge-model", metavar="NAME", help="The judge's name there.")
@click.option(
    "--judge-key-env", metavar="VARIABLE", help="The environment variable that holds its key."
)
@click.option(
    "--dimension",
    "-d",
    "dimensions",
    multiple=True,
    metavar="NAME",
    help="What to rate; several times for several. Default: all of RATERS.yml.",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Default: FILE-rated.jsonl, beside FILE. Its journal is FILE-rated.jsonl.journal.",
)
@click.option("--limit", type=click.IntRange(1), metavar="N", help="Rate the first N rows.")
@click.option(
    "--scores",
    type=click.Choice(["keep", "replace"]),
    default="keep",
    show_default=True,
    help="Of those that are there: keep them, with the rater's beside in `rated`; or replace them, "
    "and keep them in `replaced`.",
)
@click.option(
    "--dry-run", is_flag=True, help="Say how many requests and tokens it takes; ask nobody."
)
@FORCE
@QUIET
@JSON
def rate(
    source: str,
    raters: Path | None,
    judge: str | None,
    judge_model: str | None,
    judge_key_env: str | None,
    dimensions: tuple[str, ...],
    output: Path | None,
    limit: int | None,
    scores: Any,
    dry_run: bool,
    force: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Rate responses, by judges, reward models, functions or formulas.

    \b
        axolotl amopo rate answers.jsonl --raters raters.yml
        axolotl amopo rate answers.jsonl --judge http://localhost:8000/v1 \\
            --judge-model Qwen/Qwen2.5-7B-Instruct -d helpfulness -d honesty

    \b
    raters.yml:
        dimensions:
          helpfulness: {judge: main, scale: [1, 5]}
          quality: {reward_model: NAME_OR_FOLDER, scale: [-10, 10]}
          coverage: {function: "my_raters:coverage", scale: [0, 1]}
          brevity: {formula: words, direction: lower, scale: [0, 200]}
        judges:
          main: {url: "http://localhost:8000/v1", model: NAME}

    Rows have a prompt (or messages) and responses [{"text": ...}], or one
    response, as `generate` writes them. What is written trains with type:
    amopo.rated. Each rating goes into the journal when it comes, so that after a
    kill the same command goes on and nothing is paid for twice. Where people
    rated the responses, a table says how far the rater agrees with them.
    """
    if (raters is None) == (judge is None):
        raise click.UsageError("Name either --raters RATERS.yml or --judge URL.")
    if judge and not (judge_model and dimensions):
        raise click.UsageError("--judge goes with --judge-model NAME and --dimension NAME.")
    if raters and (judge_model or judge_key_env):
        raise click.UsageError("--judge-model and --judge-key-env go with --judge.")
    path = Path(source)
    output = output or path.with_name(f"{path.stem}-rated.jsonl")
    journal = output.with_name(f"{output.name}.journal")
    if not dry_run:
        check_free(output, force)
    if output.exists() and output.samefile(path):
        raise click.ClickException(f"{output} is the input; name another --output.")

    with library_output(quiet=quiet, as_json=as_json):
        from axolotl_amopo.commands.rate import rate as rating
        from axolotl_amopo.commands.rate import text

        if quiet or as_json:
            quiet_transformers()
        made = _raters(raters, judge, judge_model, judge_key_env, dimensions)
        if dry_run:
            estimate = rating.estimate_file(path, made, journal=journal, limit=limit)
        else:
            with _progress(quiet) as progress:
                report = rating.rate_file(
                    path, made, journal=journal, limit=limit, scores=scores, progress=progress
                )
            _write(output, report.text())
    if dry_run:
        if as_json:
            write_json({name: one._asdict() for name, one in estimate.items()}, as_json=True)
        elif not quiet:
            text.print_estimate(estimate)
        return
    if as_json:
        facts = report.to_json() | {"output": str(output), "journal": str(journal)}
        write_json(facts, as_json=True)
    elif not quiet:
        text.print_report(report, str(output))


def _raters(
    raters: Path | None,
    judge: str | None,
    model: str | None,
    key_env: str | None,
    dimensions: tuple[str, ...],
) -> "Raters":
    from axolotl_amopo.raters.config import load_raters, make_raters

    if raters:
        return load_raters(raters, dimensions)
    values = {
        "dimensions": {name: {"judge": "judge"} for name in dimensions},
        "judges": {"judge": {"url": judge, "model": model, "key_env": key_env}},
    }
    return make_raters(values, "--judge", Path.cwd())


def _write(output: Path, text: str) -> None:
    """Write a file whole or not at all.

    Raises:
        click.ClickException: where the disk takes no more; what was there stays.
    """
    part = output.with_name(f"{output.name}.part")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(output)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise click.ClickException(
            f"{output}: can't be written ({os.strerror(error.errno or 0)}); the ratings are in "
            f"{output}.journal, so the same command asks for none of them again."
        ) from None


@contextlib.contextmanager
def _progress(quiet: bool) -> Iterator[Callable[[int], Callable[[int], None]]]:
    from axolotl_amopo.commands.kit.text import progress_bars

    with contextlib.ExitStack() as stack:

        def begin(count: int) -> Callable[[int], None]:
            # The bar opens here, so that an error in the file stands alone.
            bars = stack.enter_context(progress_bars("{}", disable=quiet))
            return bars("Ratings", count)

        yield begin
