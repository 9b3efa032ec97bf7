"""Click options, errors, exit codes and output streams that several commands share."""

import contextlib
import errno
import io
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click

from axolotl_amopo.errors import AMoPOError, wants_traceback

# The exit code where a command found what it was asked to look for, e.g. by `report --fail-on`.
EXIT_FOUND = 3
# What the system says of a disk, or a user's share of it, that takes no more.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
EXITS = "Exits with 0 when done, 1 on an error, 2 on wrong use"


class Command(click.Command):
    """A command that says an error of ours in one sentence, as click does its own, and exits 1.

    Args:
        needs_axolotl: false for a command that reads and writes files alone.
    """

    def __init__(self, *args: Any, needs_axolotl: bool = True, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.needs_axolotl = needs_axolotl

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        # vLLM's environment may have none: it wants other versions than axolotl.
        if self.needs_axolotl and find_spec("axolotl"):
            from axolotl.utils import set_misc_env, set_pytorch_cuda_alloc_conf

            # As axolotl's own start does, which `axolotl-amopo` goes without.
            set_pytorch_cuda_alloc_conf()
            set_misc_env()
        try:
            return super().invoke(ctx)
        except AMoPOError as error:
            if wants_traceback():
                raise
            raise click.ClickException(str(error)) from None
        except OSError as error:
            if error.errno not in FULL or wants_traceback():
                raise
            raise click.ClickException(
                f"{error.filename or 'a file'}: can't be written ({error.strerror}); make room, "
                "and run it again."
            ) from None


# A command whose help fits 80 columns and ends with its exit codes.
command = partial(
    click.command, cls=Command, context_settings={"max_content_width": 80}, epilog=f"{EXITS}."
)

QUIET = click.option("--quiet", is_flag=True, help="Print nothing but errors (and --json).")
JSON = click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="For programs: the last line of stdout; all of it by `axolotl-amopo`.",
)
OUTPUT = click.option(
    "--output",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Write the JSON to a file.",
)

# Of the commands that use a trained model.
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
ALL_DIMENSIONS = click.option(
    "--overall", is_flag=True, help="Ask for all dimensions at their best."
)
WEIGHTS = click.option(
    "--weights",
    metavar="NAME=SHARE,...",
    help="Ask by how much dimensions count, from 0 to 1; others share the rest.",
)
FORCE = click.option("--force", is_flag=True, help="Overwrite the output where there is one.")
FORCE_FILES = click.option("--force", is_flag=True, help="Overwrite files that are there.")


SAMPLING = (
    click.option(
        "--temperature",
        type=click.FloatRange(0),
        default=0.0,
        help="0, the default: the likeliest.",
    ),
    click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), default=1.0),
    click.option("--seed", type=int, default=0, show_default=True),
    click.option("--batch-size", type=click.IntRange(1), default=8, show_default=True),
    click.option(
        "--backend",
        type=click.Choice(["auto", "transformers", "vllm"]),
        default="auto",
        help="auto: vLLM on a GPU where it is installed.",
    ),
)


def sampling_options(max_new_tokens: int) -> Callable[[Any], Any]:
    """Return a decorator that adds the options of `kit.generator.Sampling`, and the backend.

    Args:
        max_new_tokens: the default of that option.
    """
    longest = click.option(
        "--max-new-tokens", type=click.IntRange(1), default=max_new_tokens, show_default=True
    )

    def decorate(function: Any) -> Any:
        for option in reversed((longest, *SAMPLING)):
            function = option(function)
        return function

    return decorate


@contextlib.contextmanager
def library_output(*, quiet: bool, as_json: bool) -> Iterator[None]:
    """Send axolotl's banner, log and progress bars nowhere (`quiet`) or to stderr (`as_json`).

    Import the libraries inside: their loggers keep the stream that they found when imported.
    """
    with contextlib.ExitStack() as stack:
        if quiet:
            # Never closed: loggers that are made meanwhile keep it.
            nowhere = io.StringIO()
            logging.disable(logging.WARNING)
            stack.callback(logging.disable, logging.NOTSET)
            stack.enter_context(contextlib.redirect_stdout(nowhere))
            stack.enter_context(contextlib.redirect_stderr(nowhere))
        elif as_json:
            stack.enter_context(_stdout_to_stderr())
        # This logger prints the whole validated config, 150 lines that matter to training alone.
        # axolotl sets its level when it is imported, so a filter and not a level silences it.
        config = logging.getLogger("axolotl.cli.config")
        config.addFilter(_is_warning)
        stack.callback(config.removeFilter, _is_warning)
        yield


@contextlib.contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """Send what Python, C libraries and the processes started meanwhile print to stderr."""
    sys.stdout.flush()
    stdout = os.dup(1)
    os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        sys.stdout.flush()
        os.dup2(stdout, 1)
        os.close(stdout)


def write_json(facts: Any, *, as_json: bool, output: Path | None = None) -> None:
    """Write what a command found as JSON, to a file that is named and with --json to stdout."""
    text = json.dumps(facts)
    if output:
        output.write_text(f"{text}\n", encoding="utf-8")
    if as_json:
        click.echo(text)


def _is_warning(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.WARNING


def quiet_transformers() -> None:
    """Switch off transformers' progress bars and its log below errors."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def check_free(output: Path | None, force: bool) -> None:
    """Refuse, before the work, an output file that can't be written or is there already.

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


def steering_settings(
    dimensions: tuple[str, ...], overall: bool, weights: str | None = None
) -> dict[str, float | None]:
    """Return the settings that --dimension and --overall name, or --weights.

    Raises:
        AMoPOError: for a rating that is not a number, or a dimension that is named twice.
        click.UsageError: for both ratings and weights.
    """
    from axolotl_amopo.steering.steering import OVERALL, Weights, parse_settings

    if weights is not None:
        if dimensions or overall:
            raise click.UsageError(
                "--weights says what to ask for; leave --dimension and --overall out."
            )
        return Weights(parse_settings(weights.split(",")))
    return ({OVERALL: None} if overall else {}) | parse_settings(dimensions)


def parse_models(values: tuple[str, ...], taken: set[str]) -> list[tuple[str, str]]:
    """Return the name and path of `--model NAME=PATH` and `--model PATH`, named as the path ends.

    Args:
        taken: names that others have.

    Raises:
        click.UsageError: for a name that is there twice.
    """
    found: dict[str, str] = {}
    for value in values:
        name, named, path = value.partition("=")
        if not named or Path(value).exists():
            name, path = Path(value).name, value
        if not name or not path:
            raise click.UsageError(f"--model {value}: write NAME=PATH, or the path alone.")
        if name in found or name in taken:
            raise click.UsageError(
                f"--model {value}: '{name}' is taken; write another name before it, OTHER={path}."
            )
        found[name] = path
    return list(found.items())


def check_top_p(top_p: float, temperature: float) -> None:
    """Refuse `--top-p` where the likeliest token is taken whatever it says.

    Raises:
        click.UsageError: for one without a temperature.
    """
    if top_p < 1 and not temperature:
        raise click.UsageError("--top-p has an effect with --temperature above 0 alone.")
