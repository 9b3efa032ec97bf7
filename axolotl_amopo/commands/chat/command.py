"""The click command `axolotl amopo chat`."""

import click

from axolotl_amopo.commands.kit.options import (
    BASE_MODEL,
    MODEL,
    command,
    quiet_transformers,
)


@command()
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
    """Serve a page with the base's and the tuned answers, and a slider per dimension.

    \b
        axolotl amopo chat outputs/adapter

    An adapter is switched off for the base's answers, so one model is in memory;
    beside a whole model, the base is loaded too where --base-model names it.
    Prints the address and opens no browser; Ctrl-C ends it.
    """
    from axolotl_amopo.commands.chat.app import ComparedModels, chat_page, free_port, serve
    from axolotl_amopo.commands.kit.models import find_model

    trained = find_model(model, base_model)
    trained.steering  # noqa: B018, refuses a folder without steering before the model is loaded
    port = free_port(host, port)
    if quiet:
        quiet_transformers()
    models = ComparedModels(trained, with_base=trained.is_adapter or base_model is not None)
    serve(chat_page(models), host=host, port=port, share=share)
