"""Loss curves as PNG and SVG: runs against time and against tokens, over the published curves.

The same input gives the same files: no date, fixed identifiers in the SVG, the built-in font.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from records import facts, rules
from records.facts import FOLDER, Curve
from records.lines import Run

# colours that stay apart in grey and for colour-blind readers (Okabe and Ito)
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "xtick.direction": "out",
    "ytick.direction": "out",
    "legend.frameon": False,
    "legend.fontsize": 8,
    "svg.hashsalt": "records",
    "svg.fonttype": "none",
    "savefig.dpi": 200,
}
MAX_PUBLISHED = 9  # labels of more curves would cover each other


def draw(
    groups: Sequence[tuple[str, Sequence[Run]]],
    track: rules.Track | None,
    out: Path,
    *,
    title: str = "",
    root: Path = FOLDER,
    published: bool = True,
) -> list[Path]:
    """Draw groups of runs (label, runs); writes OUT.png and OUT.svg and returns their paths.

    Published curves and our records of the track lie behind in grey; an axis without data is left
    out.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    behind: list[Curve] = []
    if track is not None and published:
        behind = _chosen(facts.published_curves(track.published, root) if track.published else ())
        labels = {label for label, _ in groups}
        behind += [c for c in facts.own_curves(track.name, root) if c.label not in labels]
    axes_of = [a for a in ("time", "tokens") if _has(groups, a)]
    if not axes_of:
        axes_of = ["steps"]
    with plt.rc_context(STYLE):
        width = 4.6 * len(axes_of) + (0.6 if len(axes_of) == 1 else 0)
        figure, axes = plt.subplots(
            1, len(axes_of), figsize=(width, 3.5), layout="constrained", squeeze=False, sharey=True
        )
        for axis, what in zip(axes[0], axes_of):
            _panel(axis, what, groups, behind, track, legend=axis is axes[0][0])
        axes[0][0].set_ylabel("validation loss")
        if title:
            figure.suptitle(title, fontsize=10)
        files = []
        for kind, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
            path = out.with_name(f"{out.name}.{kind}")
            partial = path.with_name(path.name + ".tmp")
            figure.savefig(partial, format=kind, metadata=metadata)
            os.replace(partial, path)
            files.append(path)
        plt.close(figure)
    return files


def _chosen(curves: Sequence[Curve]) -> list[Curve]:
    """First, last and, between them, curves spread evenly over the logarithm of their time."""
    import numpy as np

    records = [c for c in curves if "(" not in c.label and c.times_ms is not None]
    if len(records) <= MAX_PUBLISHED:
        return records
    logs = np.log([c.minutes for c in records])
    wanted = np.linspace(logs.max(), logs.min(), MAX_PUBLISHED)
    return [records[i] for i in sorted({int(np.abs(logs - value).argmin()) for value in wanted})]


def _has(groups, what: str) -> bool:
    return any(_xs(run, what) is not None for _, runs in groups for run in runs)


def _xs(run: Run, what: str) -> list[float] | None:
    if what == "time":
        times = [p.train_time_ms for p in run.points]
        return None if None in times else [t / 1000 for t in times]
    if what == "tokens":
        if not run.tokens or not run.final_step:
            return None
        return [p.step * run.tokens / run.final_step for p in run.points]
    return [float(p.step) for p in run.points]


def _curve_xs(curve: Curve, what: str) -> list[float] | None:
    if what == "time":
        return [t / 1000 for t in curve.times_ms] if curve.times_ms else None
    if what == "tokens":
        return list(curve.tokens) if curve.tokens else None
    return list(curve.steps)


def _panel(axis, what, groups, behind, track, legend: bool) -> None:
    from matplotlib.ticker import FuncFormatter

    lowest, starts, ends = [], [], []
    for curve in behind:
        xs = _curve_xs(curve, what)
        if xs is None:
            continue
        axis.plot(xs, curve.losses, color="#b0b0b0", lw=0.8, zorder=1)
        axis.annotate(
            curve.label, (xs[-1], curve.losses[-1]), xytext=(2, 1), textcoords="offset points",
            fontsize=6, color="#8a8a8a", zorder=1,
        )
        lowest.append(min(curve.losses))
        ends.append(xs[-1])
        starts += [x for x in xs if x > 0][:2]
    for i, (label, runs) in enumerate(groups):
        color, first = COLORS[i % len(COLORS)], True
        thin = len(runs) > 1
        for run in runs:
            xs = _xs(run, what)
            if xs is None:
                continue
            losses = [p.val_loss for p in run.points]
            name = f"{label} (n = {len(runs)})" if thin else label
            axis.plot(
                xs, losses, color=color, lw=0.9 if thin else 1.6, alpha=0.75 if thin else 1.0,
                label=name if first else None, zorder=3,
            )
            axis.plot(xs[-1:], losses[-1:], "o", ms=3, color=color, zorder=3)
            first = False
            lowest.append(min(losses))
            ends.append(xs[-1])
            starts += [x for x in xs if x > 0][:2]
    if track is not None and track.target is not None:
        axis.axhline(track.target, color="#444444", lw=0.8, ls=(0, (4, 3)), zorder=2)
        axis.annotate(
            f"target {track.target:g}", (1, track.target), xycoords=("axes fraction", "data"),
            xytext=(-2, 2), textcoords="offset points", ha="right", fontsize=7, color="#444444",
        )
    if ends and max(ends) > 6 * min(ends) and starts:
        axis.set_xscale("log")
        axis.set_xlim(min(starts), max(ends) * 1.25)
    else:
        axis.set_xlim(0, max(ends) * 1.06 if ends else 1)
    floor = min([*lowest, *([track.target] if track and track.target else [])])
    start = max((p.val_loss for _, runs in groups for run in runs for p in run.points), default=4)
    # the first validations are far above all others; the eye needs the part where runs differ
    axis.set_ylim(floor - 0.04 * max(start - floor, 0.5), floor + 0.6 * max(start - floor, 0.2))
    units = {"time": ("training time", _time_label), "tokens": ("training tokens", _tokens_label),
             "steps": ("steps", lambda x, _: f"{x:,.0f}")}
    name, formatter = units[what]
    axis.set_xlabel(name)
    axis.xaxis.set_major_formatter(FuncFormatter(formatter))
    axis.xaxis.set_minor_formatter(FuncFormatter(lambda x, _: ""))
    if legend and groups:
        axis.legend(loc="upper right")


def _time_label(seconds: float, _: object = None) -> str:
    if seconds < 120:
        return f"{seconds:g} s"
    if seconds < 7200:
        return f"{seconds / 60:g} min"
    return f"{seconds / 3600:g} h"


def _tokens_label(tokens: float, _: object = None) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if tokens >= size:
            return f"{tokens / size:g}{unit}"
    return f"{tokens:g}"
