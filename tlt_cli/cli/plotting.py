"""Curves and maps drawn: by matplotlib in a file (it comes with the extra `plot`); curves also in a terminal."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from tlt_cli.errors import TltError, UsageError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from tlt_cli.cli.heatmap import Map

SUFFIXES = (".png", ".svg", ".pdf")
_WIDTH, _HEIGHT = 60, 12
_LABELS = 64  # of a map's rows at most


def check_plot(path: Path, *, force: bool, option: str = "--plot") -> None:
    """Whether a plot can be drawn to `path`, before any work. TltError or UsageError where it cannot."""
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(f"{option} {path}: expected a name that ends in {', '.join(SUFFIXES)}")
    if path.exists() and not force:
        raise TltError(f"{option} {path}: exists already; name another file, or replace it with --force")
    if not path.parent.is_dir():
        raise TltError(f"{option} {path}: no folder {path.parent}")
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise TltError(f"{option} draws with matplotlib, which is not installed: pip install 'tlt[plot]'") from error


def save_plot(
    path: Path,
    parameters: Sequence[int],
    values: Sequence[float],
    *,
    label: str,
    knee: int | None,
    spectra: Mapping[str, Sequence[float]],
) -> None:
    """The curve of `values` over `parameters`, and beside it every matrix's spectrum, relative to its largest value."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    curve, fall = figure.subplots(1, 2)
    curve.plot(parameters, values, marker=".", color="tab:blue")
    if knee is not None:
        curve.plot(parameters[knee], values[knee], marker="D", color="tab:red", linestyle="none", label="knee")
        curve.legend()
    if label == "perplexity":
        curve.set_yscale("log")
    curve.set(xlabel="parameters", ylabel=label, title="the whole checkpoint")
    for singular in spectra.values():
        top = singular[0] if singular and singular[0] > 0 else 1.0
        fall.plot(range(1, len(singular) + 1), [value / top for value in singular], linewidth=0.8, alpha=0.7)
    fall.set(
        xlabel="index",
        ylabel="singular value / largest",
        title=f"{len(spectra)} matrices",
        yscale="log",
        ylim=(1e-4, 1.3),
    )
    for axes in (curve, fall):
        axes.grid(alpha=0.3)
    _save(figure, path)


def save_heatmaps(path: Path, maps: Sequence[tuple[str, Map]], *, across: int) -> None:
    """Titled maps, `across` in each row; groups are framed, and of many names only some are written."""
    from matplotlib.figure import Figure

    rows = -(-len(maps) // across)
    figure = Figure(figsize=(5.2 * across, 5.4 * rows), dpi=150, layout="constrained")
    places = figure.subplots(rows, across, squeeze=False)
    for place, (title, each) in zip(places.flat, maps, strict=True):
        shown = place.imshow(each.cosines, vmin=-1, vmax=1, cmap="RdBu_r", interpolation="nearest")
        count = len(each.names)
        ticks = range(0, count, -(-count // _LABELS))
        size = max(3.0, min(8.0, 260 / len(ticks)))
        for axis, turned in ((place.xaxis, 90), (place.yaxis, 0)):
            axis.set_ticks(ticks, [each.names[tick] for tick in ticks], fontsize=size, rotation=turned)
            for label in axis.get_ticklabels():
                label.set_parse_math(False)  # a token may be a dollar
        edges = [0, *(at for at in range(1, count) if each.labels[at] != each.labels[at - 1]), count]
        for first, last in pairwise(edges):
            sides = [first - 0.5, last - 0.5]
            place.plot(
                [sides[0], sides[1], sides[1], sides[0], sides[0]], [sides[0], sides[0], sides[1], sides[1], sides[0]],
                color="black", linewidth=0.6, clip_on=False,
            )  # fmt: skip
        place.set(title=title, xlim=(-0.5, count - 0.5), ylim=(count - 0.5, -0.5))
    figure.colorbar(shown, ax=places, label="cosine", shrink=0.6)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # it draws a box for it
        _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    from matplotlib import rc_context

    staged = path.with_name(f".{path.name}.partial")
    with rc_context({"svg.hashsalt": "tlt"}):  # names inside are drawn by lot otherwise
        figure.savefig(staged, format=path.suffix[1:].lower(), metadata=_undated(path))
    staged.replace(path)


def _undated(path: Path) -> dict[str, None]:
    """The same curve gives the same file."""
    return {} if path.suffix.lower() == ".png" else {"Date" if path.suffix.lower() == ".svg" else "CreationDate": None}


def drawn(
    across_values: Sequence[float], values: Sequence[float], *, across: str, up: str, mark: int | None
) -> list[str]:
    """The curve as lines of text; values that span more than a factor of 20 are drawn on a log scale. Nothing where
    fewer than three of them are finite."""
    kept = [
        (x, y, index == mark)
        for index, (x, y) in enumerate(zip(across_values, values, strict=True))
        if math.isfinite(y)
    ]
    if len(kept) < 3:
        return []
    low, high = min(y for _, y, _ in kept), max(y for _, y, _ in kept)
    log = low > 0 and high > 20 * low
    height = (
        (lambda y: math.log(y / low) / math.log(high / low)) if log else (lambda y: (y - low) / ((high - low) or 1))
    )
    left, right = min(x for x, _, _ in kept), max(x for x, _, _ in kept)
    cells = [[" "] * _WIDTH for _ in range(_HEIGHT)]
    for x, y, marked in sorted(kept, key=lambda point: point[2]):
        column = round((x - left) / ((right - left) or 1) * (_WIDTH - 1))
        cells[_HEIGHT - 1 - round(height(y) * (_HEIGHT - 1))][column] = "◆" if marked else "•"
    labels = [f"{high:.4g}", *[""] * (_HEIGHT - 2), f"{low:.4g}"]
    margin = max(len(label) for label in labels)
    lines = [f"{up}{', log scale' if log else ''}{'   ◆ knee' if mark is not None else ''}"]
    lines += [f"{label:>{margin}} │{''.join(row).rstrip()}" for label, row in zip(labels, cells, strict=True)]
    lines.append(f"{'':>{margin}} └{'─' * _WIDTH}")
    lines.append(f"{'':>{margin}}  {left:<,}{f'{right:,} {across}':>{_WIDTH - len(f'{left:,}')}}")
    return lines
