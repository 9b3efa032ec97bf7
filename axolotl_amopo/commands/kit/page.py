"""HTML pages that need nothing else, for a desk and for a phone."""

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader

KIT = Path(__file__).parent


def render_page(template: Path, **values: Any) -> str:
    """Return the HTML of a template that extends `base.html`.

    Values are escaped, for data and logs may hold HTML; what is HTML already comes as `Markup`.
    """
    loader = FileSystemLoader([template.parent, KIT])
    environment = Environment(loader=loader, autoescape=True)
    return environment.get_template(template.name).render(values).strip() + "\n"
