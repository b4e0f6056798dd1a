"""Loss curves as PNG and SVG: runs against time and against tokens, over the published curves.

The same input gives the same files: no date, fixed identifiers in the SVG, the built-in font.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path

from records import history, rules
from records.history import FOLDER, Curve, clock, count, write
from records.parse import Run

# colours that stay apart in grey and for colour-blind readers (Okabe and Ito)
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", "--", ":", "-.")  # where there are more groups than colours
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

    Published curves and our records of the track are behind in grey; an axis without data is left
    out.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    behind: list[Curve] = []
    if track is not None and published:
        behind = _chosen(history.published_curves(track.published, root) if track.published else ())
        labels = {label for label, _ in groups}
        behind += [c for c in history.own_curves(track.name, root) if c.label not in labels]
    curves = [(label, [_curve(run) for run in runs]) for label, runs in groups]
    axes_of = [axis for axis in ("time", "tokens")
               if any(_xs(curve, axis) for _, group in curves for curve in group)] or ["steps"]
    with plt.rc_context(STYLE):
        width = 4.6 * len(axes_of) + (0.6 if len(axes_of) == 1 else 0)
        figure, axes = plt.subplots(
            1, len(axes_of), figsize=(width, 3.5), layout="constrained", squeeze=False, sharey=True
        )
        for axis, unit in zip(axes[0], axes_of):
            _panel(axis, unit, curves, behind, track)
        handles, names = axes[0][0].get_legend_handles_labels()
        if max(map(len, names), default=0) <= 24 and len(names) <= 6:
            axes[0][0].legend(loc="upper right")
        else:
            columns = 1 if len(axes_of) == 1 else 2
            figure.legend(handles, names, loc="outside lower center", ncols=columns)
        axes[0][0].set_ylabel("validation loss")
        if title:
            figure.suptitle(title, fontsize=10)
        files = save(figure, out)
        plt.close(figure)
    return files


def save(figure, out: Path) -> list[Path]:
    """Write OUT.png and OUT.svg, each whole or not at all."""
    files = []
    for kind, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
        data = io.BytesIO()
        figure.savefig(data, format=kind, metadata=metadata)
        files.append(out.with_name(f"{out.name}.{kind}"))
        write(files[-1], data.getvalue())
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


def _curve(run: Run) -> Curve:
    steps, losses, times, tokens = zip(*(
        (p.step, p.val_loss, p.train_time_ms, run.tokens_at(p.step)) for p in run.points))
    return Curve("", None, steps, losses, None if None in times else times,
                 None if None in tokens else tokens)


def _xs(curve: Curve, unit: str) -> list[float] | None:
    """Seconds, tokens or steps of each point; None if unknown."""
    if unit == "time":
        return curve.times_ms and [t / 1000 for t in curve.times_ms]
    return curve.axis(unit)


def _panel(axis, unit, groups, behind, track) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    floors, tops, starts, ends = [], [], [], []

    def line(xs, losses, **style) -> bool:
        """One curve, without the loss before the first step. True if there was anything to draw."""
        pairs = [(x, y) for x, y in zip(xs, losses) if x > 0]
        if not pairs:
            return False
        axis.plot(*zip(*pairs), **style)
        floors.append(min(losses))
        starts.append(pairs[0][0])
        ends.append(pairs[-1][0])
        return True

    labelled = -math.inf
    for curve in sorted(behind, key=lambda c: (_xs(c, unit) or [0])[-1]):
        xs = _xs(curve, unit)
        if xs is None or not line(xs, curve.losses, color="#b8b8b8", lw=0.8, zorder=1):
            continue
        if math.log(xs[-1] / labelled if labelled > 0 else math.inf) > 0.05:
            # Below the end there is room for "#62" alone before the numbers of the axis begin.
            short = len(curve.label) <= 4
            axis.annotate(
                curve.label, (xs[-1], curve.losses[-1]), xytext=(0, -4 if short else 4),
                rotation=90, textcoords="offset points", ha="center",
                va="top" if short else "bottom", fontsize=6, color="#808080",
            )
            labelled = xs[-1]
    for i, (label, curves) in enumerate(groups):
        color, several, first = COLORS[i % len(COLORS)], len(curves) > 1, True
        dashes = DASHES[i // len(COLORS) % len(DASHES)]
        name = f"{label} (n = {len(curves)})" if several else label
        for curve in curves:
            xs = _xs(curve, unit)
            if xs is None or not line(
                xs, curve.losses, color=color, ls=dashes, lw=0.9 if several else 1.6, zorder=3,
                alpha=0.75 if several else 1.0, label=name if first else None,
            ):
                continue
            axis.plot(xs[-1:], curve.losses[-1:], "o", ms=3, color=color, zorder=4)
            tops.append(max(y for step, y in zip(curve.steps, curve.losses) if step > 0))
            first = False
    if track is not None:
        axis.axhline(track.target, color="#444444", lw=0.8, ls=(0, (4, 3)), zorder=2)
        axis.annotate(
            f"target {track.target:g}", (0, track.target), xycoords=("axes fraction", "data"),
            xytext=(3, -3), textcoords="offset points", va="top", fontsize=7, color="#444444",
        )
        floors.append(track.target)
    if not ends:
        return
    floor = min(floors)
    # the part where runs differ; the first validations are far above all others
    height = min(max(tops, default=floor + 1) - floor, 1.5)
    axis.set_ylim(floor - 0.13 * height, floor + 1.04 * height)
    axis.set_xlabel({"time": "training time", "tokens": "training tokens", "steps": "steps"}[unit])
    if max(ends) > 5 * min(ends):
        axis.set_xscale("log")
        axis.set_xlim(max(min(starts) * 0.8, max(ends) / 1000), max(ends) * 1.15)
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
        axis.xaxis.set_minor_locator(NullLocator())
    else:
        axis.set_xlim(0, max(ends) * 1.04)
    words = count if unit != "time" else lambda seconds: clock(1000 * seconds)
    axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: words(x)))
