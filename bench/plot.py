"""The picture: how cost grows with the number of peers, and how near the limit traffic comes."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from bench import events, start, traffic
from bench.results import Results, Series

_MARKS = {"host-gw": "o", "vxlan": "s", "udp": "^"}
_STYLES = ("-", "--", ":", "-.")
_COLOURS = {"host-gw": "tab:blue", "vxlan": "tab:orange", "udp": "tab:green", "none": "tab:gray"}


def draw(results: Results, names: Sequence[str], path: Path) -> None:
    """Draw what there is; a panel without results stays empty."""
    figure, axes = plt.subplots(2, 3, figsize=(15, 9))
    growth = (
        (axes[0][0], start.PROGRAMMED, "s", True),
        (axes[0][1], start.MEMORY, "MB", True),
        (axes[0][2], events.RESYNC, "s", True),
        (axes[1][0], events.LATENCY, "ms", False),
    )
    for ax, measure, unit, linear in growth:
        _growth(ax, results, names, measure, unit=unit, linear=linear)
    _bars(axes[1][1], results, names, traffic.TCP, "Mbit/s, logarithmic")
    _bars(axes[1][2], results, names, traffic.ROUND_TRIP, "us, logarithmic")
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    plt.close(figure)


def _growth(
    ax: Axes, results: Results, names: Sequence[str], measure: str, *, unit: str, linear: bool
) -> None:
    """Medians over the number of peers, least and greatest as whiskers.

    Both axes are linear, so that a straight line is what grows linearly. For events, the bar
    reaches to the 99th percentile, and peers are on a logarithmic axis.
    """
    for backend in start.BACKENDS:
        for name, style in zip(names, _STYLES, strict=False):
            series = results.by_peers(measure, backend, name)
            if not series:
                continue
            middle = [s.median for s in series]
            low = [s.median - min(s.values) for s in series]
            high = [(max(s.values) if linear else s.percentile(99)) - s.median for s in series]
            ax.errorbar(
                [s.key.peers for s in series],
                middle,
                yerr=[low, high],
                label=f"{backend}, {name}",
                color=_COLOURS[backend],
                marker=_MARKS[backend],
                linestyle=style,
                capsize=3,
            )
    ax.set_title(measure + ("" if linear else ": median to 99th percentile"))
    ax.set_xlabel("peers")
    ax.set_ylabel(unit)
    if not linear:
        ax.set_xscale("log")
    ax.set_ylim(bottom=0)
    ax.grid(alpha=0.3)
    if ax.get_legend_handles_labels()[0]:
        ax.legend()


def _bars(ax: Axes, results: Results, names: Sequence[str], measure: str, unit: str) -> None:
    found: list[Series] = []
    for backend, limit in traffic.LIMITS.items():
        for name in (limit, *names):
            series = results.find(measure, backend, name)
            if series is not None and series.median > 0:
                found.append(series)
    labels = [f"{s.key.backend}, {s.key.implementation}" for s in found]
    whiskers = [
        [s.median - min(s.values) for s in found],
        [max(s.values) - s.median for s in found],
    ]
    ax.barh(
        range(len(found)),
        [s.median for s in found],
        xerr=whiskers if found else None,
        capsize=3,
        color=[_COLOURS[s.key.backend] for s in found],
    )
    ax.set_yticks(range(len(found)), labels)
    ax.invert_yaxis()
    ax.set_title(measure)
    ax.set_xlabel(unit)
    if found:
        ax.set_xscale("log")
    ax.grid(alpha=0.3, axis="x")
