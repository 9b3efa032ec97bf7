"""A Python function as a rater: `function: "my_raters:coverage"`.

    def coverage(item):                    # an `Item`: messages, response, row, where
        facts = item.row["facts"]
        return sum(fact in item.response for fact in facts) / len(facts)

It returns a number on the dimension's scale, or None where it has none to give. The module is
looked for beside the YAML, behind all that is installed.
"""

import importlib
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from axolotl_amopo.config.files import digest
from axolotl_amopo.errors import ConfigError
from axolotl_amopo.raters.base import Item, LocalRater, RatedDimension, Rating


def find_function(name: str, folder: Path, where: str) -> tuple[Callable[[Item], Any], str]:
    """Import `module:function`; return the function, and a hash of its module's file.

    Raises:
        ConfigError: where there is none, naming the key.
    """
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute:
        raise ConfigError(f"{where}: must be module:function, got {name!r}.")
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # a module may raise whatever it likes
        raise ConfigError(
            f"{where}: {module_name} can't be imported ({type(error).__name__}: {error}); the "
            f"file must be in {folder} or installed."
        ) from error
    function = getattr(module, attribute, None)
    if not callable(function):
        raise ConfigError(f"{where}: {module_name} has no function '{attribute}'.")
    source = getattr(module, "__file__", None)
    return function, digest(Path(source)) if source else ""


@dataclass
class FunctionRater(LocalRater):
    """Rate by a function of the user's."""

    dimension: RatedDimension
    name: str  # module:function
    function: Callable[[Item], Any]
    code: str  # the hash of its module
    reads_row = True
    clips = False

    def identity(self, dimension: str) -> dict[str, Any]:
        """Return the function's name, and the hash of the file that it is in."""
        return {"rater": "function", "function": self.name, "version": self.code}

    provenance = identity

    def rating(self, item: Item) -> Rating:
        """Return what the function returns for a response."""
        value = self.function(item)
        if value is None:
            return Rating(None, f"{self.name} returned None")
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            return Rating(None, f"{self.name} returned {value!r}"[:200])
        return Rating(number)
