"""`axolotl amopo configs`: the example configs that come with the plugin."""

import json
import re
from pathlib import Path

import click

from axolotl_amopo.commands.kit.options import EXITS, JSON, QUIET
from axolotl_amopo.errors import did_you_mean

FOLDER = "example_configs"
PACKAGE = Path(__file__).parent.parent.parent


@click.command(context_settings={"max_content_width": 80}, epilog=f"{EXITS}.")
@click.argument("names", metavar="[NAME]...", nargs=-1)
@click.option(
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    default=FOLDER,
    show_default=True,
    metavar="FOLDER",
    help="Where copies go.",
)
@click.option("--force", is_flag=True, help="Overwrite files that are there.")
@QUIET
@JSON
def configs(names: tuple[str, ...], output: Path, force: bool, quiet: bool, as_json: bool) -> None:
    """List the example configs, or copy those that are named.

    \b
    axolotl amopo configs
    axolotl amopo configs qwen2.5-7b-24gb-qlora

    With a config goes what it refers to, such as a DeepSpeed file.
    """
    known = {path.stem: path for path in sorted(folder().glob("*.yml"))}
    for name in names:
        if name not in known:
            hint = did_you_mean(name, known)
            raise click.ClickException(f"There is no example config {name!r}.{hint}")
    if names:
        made = copy([known[name] for name in names], output, force)
    if as_json:
        about = [{"name": name} | described(path) for name, path in known.items()]
        click.echo(json.dumps([str(path) for path in made] if names else about))
    elif names and not quiet:
        for path in made:
            click.echo(f"Written: {path}")
    elif not quiet:
        for name, path in known.items():
            click.echo(click.style(name, bold=True))
            for text in described(path).values():
                click.echo(click.wrap_text(text, 80, "  ", "  "))


def folder() -> Path:
    """Where the examples are: in the package where it was installed, else beside it."""
    return next(path for path in (PACKAGE / FOLDER, PACKAGE.parent / FOLDER) if path.is_dir())


def described(path: Path) -> dict[str, str]:
    """What a config's own first two lines say."""
    what, hardware, *_ = path.read_text(encoding="utf-8").splitlines()
    return {"what": what.lstrip("# "), "hardware": hardware.removeprefix("# Hardware: ")}


def copy(paths: list[Path], output: Path, force: bool) -> list[Path]:
    """Copy configs, and the files beside them that they name; paths in them follow.

    Raises:
        click.ClickException: before anything is written, where a file is there already.
    """
    texts = {}
    for path in paths:
        text = path.read_text(encoding="utf-8")
        for other in re.findall(rf"^[^#\n]*\b{FOLDER}/(\S+)", text, re.MULTILINE):
            texts[output / other] = (path.parent / other).read_text(encoding="utf-8")
        texts[output / path.name] = text.replace(f"{FOLDER}/", f"{output.as_posix()}/")
    for target in texts:
        if target.exists() and not force:
            raise click.ClickException(
                f"{target} is there already; name another --output, or add --force."
            )
    for target, text in texts.items():
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")
    return list(texts)
