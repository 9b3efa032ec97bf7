"""What our commands have in common: options, errors, exit codes, and who reads what they print."""

import contextlib
import io
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import click

# What was asked for was found, e.g. by `report --fail-on`.
FOUND = 3
EXITS = "Exits with 0 when done, 1 on an error, 2 on wrong use"

QUIET = click.option("--quiet", is_flag=True, help="Print nothing but errors (and --json).")
JSON = click.option(
    "--json", "as_json", is_flag=True, help="For programs: the last line of stdout."
)


@contextlib.contextmanager
def told() -> Iterator[None]:
    """What people can mend, as a sentence."""
    from axolotl_amopo.errors import AMoPOError

    try:
        yield
    except AMoPOError as error:
        raise click.ClickException(str(error)) from None


@contextlib.contextmanager
def libraries(*, quiet: bool, as_json: bool) -> Iterator[None]:
    """axolotl's banner, log and bars: nowhere with --quiet, on stderr with --json. What libraries
    are imported for is imported inside, for loggers keep the stream they found."""
    with contextlib.ExitStack() as stack:
        if quiet:
            # Never closed: loggers that are made meanwhile keep it.
            nowhere = io.StringIO()
            logging.disable(logging.WARNING)
            stack.callback(logging.disable, logging.NOTSET)
            stack.enter_context(contextlib.redirect_stdout(nowhere))
            stack.enter_context(contextlib.redirect_stderr(nowhere))
        elif as_json:
            stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        # It shows the whole validated config, 150 lines, which only training is about. Its level
        # is set when it is imported.
        config = logging.getLogger("axolotl.cli.config")
        config.addFilter(_is_warning)
        stack.callback(config.removeFilter, _is_warning)
        yield


def _is_warning(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.WARNING


def check_free(output: Path | None, force: bool) -> None:
    """Refuse, before the work, a file that can't be written or is somebody's.

    Raises:
        click.ClickException: saying what is in the way.
    """
    if output is None:
        return
    if output.is_dir():
        raise click.ClickException(f"{output} is a folder; name a file.")
    if output.exists() and not force:
        raise click.ClickException(f"{output} is there already; name another, or add --force.")
    if not output.parent.is_dir():
        raise click.ClickException(f"{output.parent}: there is no such folder.")
