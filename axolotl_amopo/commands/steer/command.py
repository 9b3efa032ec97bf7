"""The click command `axolotl amopo steer`."""

from pathlib import Path
from typing import Any

import click

from axolotl_amopo.commands.kit.options import (
    BASE_MODEL,
    JSON,
    QUIET,
    check_free,
    check_top_p,
    command,
    library_output,
    parse_models,
    quiet_transformers,
    sampling_options,
    write_json,
)

FILE = click.Path(path_type=Path, dir_okay=False)


@command()
@click.argument("model", metavar="[NAME=]MODEL_OR_CONFIG")
@click.option(
    "--raters",
    "raters_file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    required=True,
    metavar="FILE",
    help="YAML of what rates the answers, see `axolotl amopo rate`.",
)
@click.option(
    "--input",
    "source",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    required=True,
    metavar="FILE",
    help="Questions that training has not seen: .jsonl, .json or .txt.",
)
@click.option(
    "--output",
    "folder",
    type=click.Path(file_okay=False, path_type=Path),
    required=True,
    metavar="FOLDER",
    help="Keeps answers and ratings; called again, the command goes on from there.",
)
@click.option(
    "--model",
    "others",
    multiple=True,
    metavar="[NAME=]PATH",
    help="Another run for the same picture; as often as you like.",
)
@click.option("--no-base", is_flag=True, help="Leave the untuned model out.")
@BASE_MODEL
@click.option("--limit", type=click.IntRange(2), metavar="N", help="Draw so many questions.")
@click.option(
    "--points",
    type=click.IntRange(2),
    default=5,
    show_default=True,
    help="At most so many numbers per dimension.",
)
@click.option(
    "--only",
    type=click.Choice(["sweep", "front"]),
    help="Leave the weights out, or the sweeps of single dimensions.",
)
@click.option(
    "--samples",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Answers per question and number; above 1 with --temperature.",
)
@sampling_options(max_new_tokens=256)
@click.option("--dry-run", is_flag=True, help="Show what would be asked; load no model.")
@click.option("--html", type=FILE, metavar="FILE", help="Write a page with plots.")
@click.option(
    "--force",
    is_flag=True,
    help="Overwrite the page, and replace another measurement in the folder.",
)
@JSON
@QUIET
def steer(
    model: str,
    raters_file: Path,
    source: Path,
    folder: Path,
    others: tuple[str, ...],
    no_base: bool,
    base_model: str | None,
    limit: int | None,
    points: int,
    only: Any,
    samples: int,
    seed: int,
    backend: str,
    dry_run: bool,
    html: Path | None,
    force: bool,
    as_json: bool,
    quiet: bool,
    **sampling: Any,
) -> None:
    """Ask a model for each rating, and rate what it answers: does it follow?

    \b
        axolotl amopo steer outputs/adapter --raters raters.yml \\
            --input held_out.jsonl --output steered --html steered.html

    Every dimension is asked for at each of its ratings, and all of them by
    weights. The tables say what is obtained for what is asked (rank correlation,
    with 95 % intervals over questions), what else changes with it, length among
    it, and which compromises the weights reach, beside the base model asked the
    same. Raters that made the ratings of training would see their own taste:
    take others.
    """
    check_free(html, force)
    check_top_p(sampling["top_p"], sampling["temperature"])
    with library_output(quiet=False, as_json=True):
        from axolotl_amopo.commands.kit.generator import Sampling
        from axolotl_amopo.commands.kit.models import find_model
        from axolotl_amopo.commands.kit.questions import read_prompts
        from axolotl_amopo.commands.kit.text import progress_bars
        from axolotl_amopo.commands.steer import steer as steering
        from axolotl_amopo.raters.config import load_raters

        raters = load_raters(raters_file)
        prompts = read_prompts(source)
        if "=" in model and not Path(model).exists():
            [(own, model)] = parse_models((model,), {steering.BASE})
            first = find_model(model, base_model)
        else:
            first = find_model(model, base_model)
            own = first.folder.resolve().name
            own = own if own != steering.BASE else "tuned"
        named = [(own, first)]
        taken = {steering.BASE, own}
        named += [(name, find_model(path)) for name, path in parse_models(others, taken)]
        if dry_run:
            asked = steering.plan_asks(named, raters, points, with_base=not no_base, only=only)
        else:
            if quiet:
                quiet_transformers()
            with progress_bars("{}", disable=quiet) as bars:
                report = steering.steer(
                    named,
                    prompts,
                    raters,
                    folder,
                    sampling=Sampling(seed=seed, **sampling),
                    samples=samples,
                    points=points,
                    only=only,
                    limit=limit,
                    seed=seed,
                    with_base=not no_base,
                    backend=backend,
                    force=force,
                    bars=bars,
                )
    from axolotl_amopo.commands.steer.text import print_asks, print_report

    if dry_run:
        count = min(len(prompts), limit or len(prompts)) * samples
        write_json(
            {one.name: [ask.to_json() for ask in one.asks] for one in asked}, as_json=as_json
        )
        if not as_json and not quiet:
            print_asks(asked, count)
        return
    if html:
        from axolotl_amopo.commands.steer.page import steer_page

        html.write_text(steer_page(report), encoding="utf-8")
    write_json(report.to_json(), as_json=as_json)
    if not quiet:
        if not as_json:
            print_report(report)
        if html:
            click.echo(f"Written: {html}", err=as_json)
        click.echo(f"Kept: {folder} (answers and ratings)", err=as_json)
