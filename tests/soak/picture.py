"""The timeline of a soak as a PNG of 1600 by 900. Needs matplotlib, which only `make soak` has."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib import pyplot as plt
from matplotlib.patches import Patch

from .faults import FAULTS
from .record import Event, Record
from .world import HOSTS

_LASTS, _HEALS = "#4c566a", "#e8a33d"
_MAY, _ALLOWED, _OF_PEER, _WRONG = "#e3ebf5", "#3f6ea5", "#b9c9de", "#d1242f"
_STATES = {"up": "#a3c293", "down": "#3b4252", "frozen": "#88c0d0", "cut off": "#b48ead"}
_SILENT = "#d8d8d8"


def draw(record: Record, path: Path) -> None:
    """Write the picture."""
    mpl.use("Agg")
    with plt.rc_context({"font.size": 8, "axes.spines.top": False, "axes.spines.right": False}):
        names = [f.name for f in FAULTS if any(e.name == f.name for e in record.events)]
        figure, panels = plt.subplots(
            5,
            1,
            figsize=(16, 9),
            dpi=100,
            sharex=True,
            height_ratios=[max(8, len(names)), 7, 3.4, 3.4, 4.6],
        )
        _faults(panels[0], record, names)
        _losses(panels[1], record)
        _members(panels[2], record)
        _leases(panels[3], record)
        _convergence(panels[4], record)
        _axis(panels, record)
        _title(figure, record)
        figure.subplots_adjust(left=0.115, right=0.985, top=0.925, bottom=0.05, hspace=0.13)
        figure.savefig(path)
        plt.close(figure)


def _minutes(seconds: float) -> float:
    return seconds / 60


def _title(figure: Any, record: Record) -> None:
    wrong = sum(event.lost_wrongly for event in record.events)
    allowed = sum(event.lost for event in record.events)
    figure.suptitle(
        f"Soak of {record.backend}: {len(record.events)} faults in"
        f" {record.seconds / 60:.0f} minutes, seed {record.seed}, {record.began} UTC.   "
        f"{record.sent} pings, {allowed} lost where allowed, {wrong} where not.   "
        + ("All as promised." if not record.failures else f"{len(record.failures)} FAILURES."),
        x=0.115,
        ha="left",
        fontsize=11,
        color="black" if not record.failures else _WRONG,
    )


def _axis(panels: Any, record: Record) -> None:
    for panel in panels:
        panel.set_xlim(0, _minutes(record.seconds))
        panel.grid(axis="x", color="#e5e5e5", linewidth=0.6)
        panel.set_axisbelow(True)
    panels[-1].set_xlabel("minutes", labelpad=1)


def _faults(panel: Any, record: Record, names: list[str]) -> None:
    least = _minutes(record.seconds) / 500
    for event in record.events:
        row = names.index(event.name)
        begun, undone = _minutes(event.begun), _minutes(event.undone)
        end = _minutes(event.converged if event.converged is not None else event.ended)
        panel.barh(row, max(least, undone - begun), left=begun, height=0.7, color=_LASTS)
        color = _HEALS if event.converged is not None else _WRONG
        panel.barh(
            row, max(least, end - undone), left=max(undone, begun + least), height=0.7, color=color
        )
    panel.set_yticks(range(len(names)), names, fontsize=7.5)
    panel.set_ylim(len(names) - 0.4, -0.6)
    panel.grid(axis="y", color="#f0f0f0", linewidth=0.6)
    _legend(panel, {"the fault lasts": _LASTS, "until converged": _HEALS})


def _losses(panel: Any, record: Record) -> None:
    slots: list[list[str]] = []
    free: list[float] = []
    for label, since, until in record.hosts:
        slot = next((i for i, at in enumerate(free) if at <= since), None)
        if slot is None:
            slot = len(slots)
            slots.append([])
            free.append(0.0)
        slots[slot].append(label)
        free[slot] = record.seconds if until is None else until
    lanes = {label: lane for lane, labels in enumerate(slots) for label in labels}
    for event in record.events:
        width = _minutes(event.until - event.begun)
        for label in _struck(event):
            panel.barh(lanes[label], width, left=_minutes(event.begun), height=0.85, color=_MAY)
    layers: dict[str, set[tuple[float, int]]] = {_OF_PEER: set(), _ALLOWED: set(), _WRONG: set()}
    for at, *pair in record.lost:
        event = record.event_of((pair[0], pair[1]), at)
        for label in pair:
            color = _ALLOWED if label in _struck(event) else _OF_PEER
            if not event.allows((pair[0], pair[1]), at):
                color = _WRONG
            layers[color].add((_minutes(round(at, 1)), lanes[label]))
    for color, points in layers.items():
        size, width = (90, 2.0) if color == _WRONG else (45, 0.9)
        panel.scatter(
            [at for at, _ in points],
            [lane for _, lane in points],
            marker="|",
            s=size,
            linewidths=width,
            color=color,
        )
    panel.set_yticks(range(len(slots)), [_shortened(labels) for labels in slots])
    panel.set_ylim(max(HOSTS, len(slots)) - 0.4, -0.6)
    panel.set_ylabel("pings lost\nwith a host")
    _legend(
        panel,
        {
            "this host may lose packets": _MAY,
            "lost, allowed": _ALLOWED,
            "on the way to such a host": _OF_PEER,
            "lost wrongly": _WRONG,
        },
    )


def _struck(event: Event) -> set[str]:
    """Return the hosts on each of the paths that may lose packets: the one that was struck."""
    return set.intersection(*map(set, event.pairs)) if event.pairs else set()


def _shortened(labels: list[str]) -> str:
    return ", ".join(labels) if len(labels) <= 4 else f"{labels[0]}, {labels[1]} … {labels[-1]}"


def _members(panel: Any, record: Record) -> None:
    names = sorted(record.members)
    for row, name in enumerate(names):
        changes = [*record.members[name], (record.seconds, "")]
        for (since, state), (until, _) in pairwise(changes):
            panel.barh(
                row,
                _minutes(until - since),
                left=_minutes(since),
                height=0.8,
                color=_STATES[state],
            )
    panel.set_yticks(range(len(names)), names)
    panel.set_ylim(len(names) - 0.4, -0.6)
    panel.set_ylabel("etcd")
    _legend(panel, _STATES)


def _leases(panel: Any, record: Record) -> None:
    changes = [*record.leases, (record.seconds, None)]
    for (since, count), (until, _) in pairwise(changes):
        if count is None:
            panel.axvspan(_minutes(since), _minutes(until), color=_SILENT, linewidth=0)
    counts = [(at, float("nan") if count is None else count) for at, count in changes[:-1]]
    counts.append((record.seconds, counts[-1][1] if counts else float("nan")))
    panel.step(
        [_minutes(at) for at, _ in counts],
        [count for _, count in counts],
        where="post",
        color="#2e6f40",
        linewidth=1.2,
    )
    panel.set_ylim(-0.5, 13)
    panel.set_yticks([0, HOSTS, 10])
    panel.set_ylabel("keys below\nsubnets/")
    _legend(panel, {"no answer from etcd": _SILENT})


def _convergence(panel: Any, record: Record) -> None:
    done = [event for event in record.events if event.converged is not None]
    times = [event.converged - event.undone for event in done if event.converged is not None]
    panel.vlines([_minutes(event.undone) for event in done], 0, times, color=_HEALS, linewidth=2)
    for event in record.events:
        if event.converged is None:
            panel.axvline(_minutes(event.begun), color=_WRONG, linewidth=2)
    top = max([1.0, *times]) * 1.25
    for event, time in sorted(zip(done, times, strict=True), key=lambda each: -each[1])[:5]:
        if time > 0.5 * max(times):
            at = _minutes(event.undone)
            # Not beyond the edge.
            side = "right" if event.undone > 0.97 * record.seconds else "center"
            panel.annotate(event.name, (at, time), fontsize=6.5, ha=side, va="bottom")
    panel.set_ylim(0, top)
    panel.set_ylabel("seconds to\nconverge")


def _legend(panel: Any, colors: dict[str, str]) -> None:
    panel.legend(
        handles=[Patch(color=color, label=name) for name, color in colors.items()],
        loc="lower right",
        bbox_to_anchor=(1.0, 0.985),
        ncols=len(colors),
        fontsize=7,
        frameon=False,
        borderpad=0,
        borderaxespad=0,
        handlelength=1.2,
        handleheight=0.7,
    )
