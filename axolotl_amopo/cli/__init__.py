"""`axolotl amopo ...`"""

import click


@click.group()
def amopo() -> None:
    """AMoPO: multi-objective preference optimisation."""
