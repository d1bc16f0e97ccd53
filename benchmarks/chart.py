"""Draws a report as one picture: a small bar chart for each figure, a colour for each peer.

matplotlib is an optional extra, so it is imported only when a chart is asked for, and without type checks.
"""

import importlib
import importlib.util
from pathlib import Path
from typing import Any

from report import Figure, Report

COLUMNS = 3
PANEL_INCHES = (4.2, 2.3)
COLOURS = {"direct": "#9aa0a6", "haproxy": "#4c78a8", "pgbouncer": "#72b7b2", "gateway": "#e45756"}
COLOURS_OF_OTHERS = ("#f2cf5b", "#b279a2", "#9d755d", "#54a24b")


def is_available() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def draw(report: Report, file: Path) -> None:
    """Writes a PNG or SVG, as the file's name says."""
    importlib.import_module("matplotlib").use("Agg")
    pyplot = importlib.import_module("matplotlib.pyplot")

    figures = report.measured_figures()
    rows = max(1, -(-len(figures) // COLUMNS))
    picture, panels = pyplot.subplots(
        rows,
        COLUMNS,
        figsize=(COLUMNS * PANEL_INCHES[0], rows * PANEL_INCHES[1] + 0.6),
        squeeze=False,
        layout="constrained",
    )
    for at, panel in enumerate(panels.flat):
        if at < len(figures):
            _draw_figure(panel, report, figures[at])
        else:
            panel.set_visible(False)
    picture.suptitle(_caption(report), fontsize=9)
    picture.savefig(file)
    pyplot.close(picture)


def _draw_figure(panel: Any, report: Report, figure: Figure) -> None:
    medians = ((peer, report.median(figure.key, peer)) for peer in report.peers_of([figure]))
    shown = {peer: median for peer, median in medians if median is not None}
    bars = panel.barh(list(shown), list(shown.values()), color=[_colour(report, peer) for peer in shown])
    panel.bar_label(bars, labels=[f"{median:,.{figure.digits}f}" for median in shown.values()], fontsize=7, padding=2)
    panel.set_title(f"{figure.title} ({figure.unit})", fontsize=8)
    panel.invert_yaxis()
    panel.margins(x=0.2)
    panel.tick_params(labelsize=7)
    panel.spines[["top", "right"]].set_visible(False)


def _colour(report: Report, peer: str) -> str:
    others = [name for name in report.peers_of(report.measured_figures()) if name not in COLOURS]
    return COLOURS.get(peer) or COLOURS_OF_OTHERS[others.index(peer) % len(COLOURS_OF_OTHERS)]


def _caption(report: Report) -> str:
    seen = report.circumstances
    versions = ", ".join(f"{name} {version}" for name, version in seen.versions.items())
    return (
        f"Medians of {seen.repeats} interleaved repeats, {seen.date[:10]}, {seen.machine['cpu']},"
        f" {seen.machine['cores']} cores\n{versions}"
    )
