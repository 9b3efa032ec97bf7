"""The click command `axolotl amopo score`."""

import json
from pathlib import Path
from typing import Any

import click

from axolotl_amopo.commands.kit.options import (
    FORCE_FILES,
    JSON,
    OUTPUT,
    QUIET,
    check_free,
    command,
    library_output,
    parse_models,
    write_json,
)

FILE = click.Path(path_type=Path, dir_okay=False)


@command()
@click.argument("config", type=click.Path(exists=True, dir_okay=False))
@click.option(
    "--model",
    "models",
    multiple=True,
    metavar="[NAME=]PATH",
    help="An adapter or a whole model; as often as you like. Default: what is in output_dir.",
)
@click.option("--base", metavar="PATH", help="The model to compare with. Default: base_model.")
@click.option("--no-base", is_flag=True, help="Score the models alone.")
@click.option(
    "--split",
    type=click.Choice(["test", "train"]),
    default="test",
    show_default=True,
    help="test: test_datasets, or what val_set_size holds out.",
)
@click.option("--limit", type=click.IntRange(1), metavar="N", help="Draw so many pairs.")
@click.option("--seed", default=0, show_default=True, help="Of that draw, and of the intervals.")
@click.option(
    "--reward",
    type=click.Choice(["objective", "average", "sum", "reference"]),
    help="objective: as training's metrics have it, with a reference where there is one; average: "
    "mean log-probability per token; sum: its sum; reference: the sum less the base's.  [default: "
    "objective; of several models average, which all of them have]",
)
@click.option(
    "--prompts",
    type=click.Choice(["both", "own", "plain"]),
    default="both",
    show_default=True,
    help="own: with the instructions, as trained; plain: without any.",
)
@click.option(
    "--batch-pairs",
    type=click.IntRange(1),
    default=2,
    show_default=True,
    metavar="N",
    help="Per forward pass, as many sequences as so many pairs have.",
)
@click.option("--html", type=FILE, metavar="FILE", help="Write a page with plots.")
@click.option("--markdown", type=FILE, metavar="FILE", help="Write the tables as Markdown.")
@click.option("--pairs", type=FILE, metavar="FILE", help="Write every pair's margins (JSON lines).")
@OUTPUT
@JSON
@FORCE_FILES
@QUIET
def score(
    config: str,
    models: tuple[str, ...],
    no_base: bool,
    html: Path | None,
    markdown: Path | None,
    pairs: Path | None,
    output: Path | None,
    as_json: bool,
    force: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Count how often models order rated pairs as the ratings do, per dimension.

    \b
        axolotl amopo score config.yml --html score.html
        axolotl amopo score config.yml --model amopo=out/a --model dpo=out/b

    Compares the model that training left in output_dir with base_model, on the
    pairs that training holds out, under the prompts of training and without any
    instruction (which is fair to models trained by other methods). Models are
    compared on the same pairs, with 95 % intervals and p-values by prompt. A
    reward with a reference is relative to the model as training found it, which
    has no reward itself and is not in the tables.
    """
    targets = {"html": html, "markdown": markdown, "pairs": pairs, "output": output}
    for path in targets.values():
        check_free(path, force)
    if no_base and options["base"]:
        raise click.UsageError("--base and --no-base can't go together.")
    given = parse_models(models, {"base"})

    with library_output(quiet=quiet, as_json=as_json):
        from axolotl_amopo.commands.kit.text import progress_bars
        from axolotl_amopo.commands.score import report as scoring
        from axolotl_amopo.commands.score.rewards import ModelPath
        from axolotl_amopo.commands.score.text import print_scores, to_markdown

        named = [ModelPath(name, path) for name, path in given] or None
        with progress_bars("Scoring {}", disable=quiet) as progress:
            report, scored = scoring.score(
                config, models=named, with_base=not no_base, progress=progress, **options
            )
        if html:
            from axolotl_amopo.commands.score.page import score_page

            html.write_text(score_page(report, scored), encoding="utf-8")
    if markdown:
        markdown.write_text(to_markdown(report), encoding="utf-8")
    if pairs:
        lines = (json.dumps(line) + "\n" for line in scored.lines())
        pairs.write_text("".join(lines), encoding="utf-8")
    write_json(report.to_json(), as_json=as_json, output=output)
    if not quiet:
        if not as_json:
            print_scores(report)
        for path in filter(None, targets.values()):
            click.echo(f"Written: {path}", err=as_json)
