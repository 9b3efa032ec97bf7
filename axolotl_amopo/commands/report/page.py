"""Runs as one HTML page that needs nothing else, for a desk and for a phone."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment
from markupsafe import Markup

from axolotl_amopo.commands.report import show
from axolotl_amopo.commands.report.findings import findings, outcome
from axolotl_amopo.commands.report.plots import Plot
from axolotl_amopo.training.runs import Run

TEMPLATE = Path(__file__).with_name("page.html")
# Where every run differs, and which says nothing about it.
NOT_COMPARED = {"output_dir", "dataset_prepared_path"}


def page(runs: dict[str, Run], plots: list[tuple[Plot, str]], marker: str) -> str:
    """The page's HTML. What the log says is escaped.

    Args:
        plots: each with its SVG.
        marker: see `marker`.
    """
    template = Environment(autoescape=True).from_string(TEMPLATE.read_text(encoding="utf-8"))
    prompts = dict.fromkeys(name for run in runs.values() for name in run.prompts)
    html = template.render(
        runs=runs,
        prompts=list(prompts),
        plots=[(plot, Markup(svg)) for plot, svg in plots],
        marker=marker,
        differences=differences(runs),
        findings=findings,
        outcome=outcome,
        show=show,
    )
    return html.strip() + "\n"


def marker(runs: list[Run], folder: Path) -> str:
    """Tells whether a page in a folder is one of these runs; the same where all are moved."""
    places = [os.path.relpath(run.folder.resolve(), folder.resolve()) for run in runs]
    digest = hashlib.sha256(json.dumps(places).encode()).hexdigest()[:16]
    return f'<meta name="amopo-report" content="{digest}">'


def differences(runs: dict[str, Run]) -> dict[str, list[str]]:
    """Settings that are not the same in all runs, and their value in each."""
    settings = [_settings(run) for run in runs.values()]
    keys = dict.fromkeys(key for each in settings for key in each)
    table = {key: [each.get(key, "-") for each in settings] for key in keys}
    return {key: values for key, values in table.items() if len(set(values)) > 1}


def _settings(run: Run) -> dict[str, str]:
    about = dict(run.about)
    try:
        config = yaml.safe_load(about.pop("config", None) or "")
    except yaml.YAMLError:
        config = None
    config = config if isinstance(config, dict) else {}
    # What the run was told on its command line is in `about` alone.
    about = {key: value for key, value in about.items() if key not in ("name", "data", "prompts")}
    return {
        key: value
        for key, value in (_flat(config) | _flat(about)).items()
        if key not in NOT_COMPARED
    }


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            flat |= _flat(value, f"{name}.")
        else:
            flat[name] = value if isinstance(value, str) else json.dumps(value, default=str)
    return flat
