"""Write runs as an HTML page."""

import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from markupsafe import Markup

from axolotl_amopo.commands.kit.page import render_page
from axolotl_amopo.commands.report.findings import headline
from axolotl_amopo.commands.report.plots import Plot
from axolotl_amopo.training.runs import (
    TrainingRun,
    compared_metrics,
    explain_change,
    explain_numbers,
    format_metric,
)

if TYPE_CHECKING:
    from axolotl_amopo.commands.report.report import ReportedRun

TEMPLATE = Path(__file__).with_name("page.html")
# Keys in which every run differs, and that say nothing about the training.
NOT_COMPARED = {"output_dir", "dataset_prepared_path"}
# What the log says of a run that is no setting, or follows from one.
NO_SETTINGS = {"name", "data", "prompts", "objective"}


def report_page(runs: list["ReportedRun"], plots: list[tuple[Plot, str]], marker: str) -> str:
    """Return the page's HTML; what logs say is escaped.

    Args:
        plots: each with its SVG.
        marker: from `page_marker`.
    """
    return render_page(
        TEMPLATE,
        runs=runs,
        prompts=list(dict.fromkeys(name for one in runs for name in one.prompts)),
        plots=[(plot, Markup(svg)) for plot, svg in plots],
        marker=Markup(marker),
        differences=differing_settings({one.name: one.run for one in runs}),
        metrics=compared_metrics([one.run for one in runs]),
        headline=headline,
        explain_change=explain_change,
        explain_numbers=explain_numbers,
        format_metric=format_metric,
    )


def page_marker(runs: list[TrainingRun], folder: Path) -> str:
    """Return the <meta> element by which a folder's page is known as a report of these runs.

    It stays the same where the runs and the folder are moved together.
    """
    places = [os.path.relpath(run.folder.resolve(), folder.resolve()) for run in runs]
    digest = hashlib.sha256(json.dumps(places).encode()).hexdigest()[:16]
    return f'<meta name="amopo-report" content="{digest}">'


def differing_settings(runs: dict[str, TrainingRun]) -> dict[str, list[str]]:
    """Return the settings that are not the same in all runs, with their value in each."""
    settings = [_settings(run) for run in runs.values()]
    keys = dict.fromkeys(key for each in settings for key in each)
    table = {key: [each.get(key, "-") for each in settings] for key in keys}
    return {key: values for key, values in table.items() if len(set(values)) > 1}


def _settings(run: TrainingRun) -> dict[str, str]:
    about = dict(run.about)
    try:
        config = yaml.safe_load(about.pop("config", None) or "")
    except yaml.YAMLError:
        config = None
    config = config if isinstance(config, dict) else {}
    # Options of the command line are in `about` and not in the config.
    about = {key: value for key, value in about.items() if key not in NO_SETTINGS}
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
