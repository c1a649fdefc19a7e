"""Every rank at once: what it costs, what it loses, how well the model still reads; and the smallest that does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tlt_cli.checkpoint.writer import check_target
from tlt_cli.cli.console import Cell, Output, Table
from tlt_cli.cli.execute import Outcome
from tlt_cli.cli.factor_request import Request
from tlt_cli.cli.factoring import Opened, decompose_all, decomposed, opened_matrices, write_ranks
from tlt_cli.cli.judging import eval_text, read_with
from tlt_cli.cli.opening import load_decoder, parse_dtype
from tlt_cli.cli.plotting import check_plot, drawn, save_plot
from tlt_cli.errors import TltError, UsageError
from tlt_cli.surgery.factor import ranks_at
from tlt_cli.surgery.factorizations import Factorizations
from tlt_cli.surgery.spectrum_shape import knee, shape_of
from tlt_cli.surgery.sweep import Point, grid, sweep

if TYPE_CHECKING:
    from tlt_cli.model.text import Tokens

_MOST_ROWS = 40


@dataclass(frozen=True)
class Swept:
    """A sweep: `report` is everything, JSON-able; `table` has a row per rank and `matrices` one per matrix. `written`
    is the model picked, where one was asked for and written; `missed` says why none was."""

    report: dict[str, Any]
    table: Table
    matrices: Table
    curve: Sequence[str]
    written: Outcome | None = None
    missed: str | None = None


def show(swept: Swept, out: Output) -> None:
    """The table and the curve, or the path of what was written. TltError where nothing was good enough."""
    if len(swept.matrices.rows) <= _MOST_ROWS:
        out.report(swept.matrices)
    if swept.written is not None:
        out.report(swept.table)
        out.report(swept.written.table)
        out.result(swept.report, line=swept.written.report["path"])
    else:
        out.result(swept.report, table=swept.table)
    if not out.json:
        for line in swept.curve:
            out.summary(line)
    if swept.missed is not None:
        raise TltError(swept.missed)


def sweep_checkpoint(source: str, request: Request, *, ranks: str | None, plot: Path | None, out: Output) -> Swept:
    """Decompose every matrix of `source` once and follow the rank from 1 to where nothing gets smaller any more.

    With a text the model is read at each rank; with a bound on the perplexity the smallest model within it is picked,
    and written where the request has an output. Raises TltError for what cannot be done.
    """
    kind = None if request.dtype is None else parse_dtype(request.dtype)
    if plot is not None:
        check_plot(plot, force=request.force)
    opened = opened_matrices(source, request, out=out, values=True)
    wanted = grid(opened.found, None if ranks is None else _parsed(ranks))
    if request.align > 1:
        wanted = [rank for rank in wanted if rank % request.align == 0]
        if not wanted:
            raise UsageError(f"--align {request.align}: none of the ranks to look at is a multiple of it")
    if request.output is not None:
        if request.max_perplexity is None:
            raise UsageError("a sweep writes no model; say with --max-perplexity which of its models to write")
        check_target(request.output, opened.checkpoint, force=request.force)
    text = eval_text(opened, request, out=out)
    made = decomposed(opened, request, out=out)
    decompose_all(opened.found, made, out=out)
    errors = {
        matrix.name: made.losses(matrix, [rank for rank in wanted if rank < matrix.break_even])
        for matrix in opened.found
    }
    points = sweep(opened.found, errors, wanted, opened.tensors)
    read = None if text is None else _read(opened, request, made, points, text, out=out)
    at = _knee(points, read)
    picked, missed = _picked(request, points, read)
    report = _report(opened, request, made, points, read, text, at)
    written = None
    if picked is not None:
        report["picked"] = report["points"][points.index(picked)]
        if request.output is not None and picked.rank is not None:
            chosen = ranks_at(opened.found, picked.rank)
            made.as_if_first({m: r for m in opened.found if (r := chosen.by_slot[m.name]) is not None})
            written = write_ranks(
                opened,
                request,
                chosen,
                made,
                output=request.output,
                kind=kind,
                out=out,
                size=("rank", picked.rank),
                judged=False,
            )
            report |= {"path": written.report["path"], "written": written.report}
    label = "error" if read is None else "perplexity"
    values = [point.error for point in points] if read is None else [found["perplexity"] for found in read]
    if plot is not None:
        save_plot(
            plot, [point.parameters for point in points], values, label=label, knee=at,
            spectra={matrix.name: made.spectrum(matrix).tolist() for matrix in opened.found},
        )  # fmt: skip
        report["plot"] = str(plot)
    curve = drawn([point.parameters for point in points], values, across="parameters", up=label, mark=at)
    return Swept(report, _table(points, read, at), _matrices(report["matrices"]), curve, written, missed)


def _parsed(ranks: str) -> list[int]:
    try:
        return [int(rank) for rank in ranks.split(",")]
    except ValueError:
        raise UsageError(f"--ranks {ranks}: expected whole numbers between commas, such as 8,16,32") from None


def _read(
    opened: Opened, request: Request, made: Factorizations, points: Sequence[Point], text: Tokens, *, out: Output
) -> list[dict[str, Any]]:
    """{perplexity, nll, tokens} at every point. The model is loaded once; from rank to rank each product grows by the
    directions that came in between."""
    import torch

    from tlt_cli.surgery.matrices import part_of, put

    assert opened.fitted is not None
    decoder = load_decoder(opened.checkpoint, opened.fitted, device=request.device)
    parameters = {name: parameter.data for name, parameter in decoder.named_parameters()}
    whole = {matrix.name: part_of(parameters[matrix.tensor], matrix).clone() for matrix in opened.found}
    products = {m.name: torch.zeros(m.rows, m.columns, device=decoder.device) for m in opened.found}
    found, before = [], 0
    with out.progress(f"reading {text.info['source']} at {len(points)} ranks") as progress:
        for index, point in enumerate(points):
            for matrix in opened.found:
                target = parameters[matrix.tensor]
                if point.rank is None or point.rank >= matrix.break_even:
                    part_of(target, matrix).copy_(whole[matrix.name])
                    continue
                a, b = made.factors(matrix, point.rank)
                grown = b[:, before:] @ a[before:] if made.nested else b @ a
                product = products[matrix.name]
                product += grown.to(product) if made.nested else grown.to(product) - product
                put(target, matrix, product)
            found.append(read_with(decoder, opened.fitted, text, request))
            before = point.rank or 0
            progress(index + 1, len(points))
    return found


def _knee(points: Sequence[Point], read: Sequence[Mapping[str, Any]] | None) -> int | None:
    """The point where more parameters stop paying: of the error's curve, or of the log-likelihood's."""
    values = [point.error for point in points] if read is None else [found["nll"] for found in read]
    return knee([point.parameters for point in points], values)


def _picked(
    request: Request, points: Sequence[Point], read: Sequence[Mapping[str, Any]] | None
) -> tuple[Point | None, str | None]:
    """The smallest factored model within the bound, or why there is none."""
    if request.max_perplexity is None:
        return None, None
    assert read is not None
    factored = [
        (point, found["perplexity"]) for point, found in zip(points, read, strict=True) if point.rank is not None
    ]
    good = [point for point, value in factored if value <= request.max_perplexity]
    if good:
        return min(good, key=lambda point: (point.parameters, point.rank)), None
    best, value = min(factored, key=lambda pair: pair[1])
    return None, (
        f"no rank keeps the perplexity within {request.max_perplexity:g}: the best is {value:.6g} at rank {best.rank}, "
        f"and the model as it is has {read[-1]['perplexity']:.6g}; nothing was written"
    )


def _report(
    opened: Opened,
    request: Request,
    made: Factorizations,
    points: Sequence[Point],
    read: Sequence[Mapping[str, Any]] | None,
    text: Tokens | None,
    at: int | None,
) -> dict[str, Any]:
    matrices = []
    for matrix in opened.found:
        shape = asdict(shape_of(made.spectrum(matrix)))
        matrices.append(
            {
                "name": matrix.name, "tensor": matrix.tensor, "rows": matrix.rows, "columns": matrix.columns,
                "break_even": matrix.break_even, "shape": shape.pop("name"), **shape,
                "seconds": made.seconds[matrix.name], "singular": made.spectrum(matrix).tolist(),
            }
        )  # fmt: skip
    rows = [
        {**asdict(point), **({} if read is None else read[index]), "knee": index == at}
        for index, point in enumerate(points)
    ]
    told = {} if text is None else {"corpus": text.info["source"], "corpus_sha256": text.info["sha256"]}
    return {
        "source": opened.checkpoint.source, "family": opened.fitted.family.name if opened.fitted else None,
        "method": request.weighing, **told, "points": rows, "knee": None if at is None else points[at].rank,
        "matrices": matrices, "seconds": sum(made.seconds.values()),
    }  # fmt: skip


def _table(points: Sequence[Point], read: Sequence[Mapping[str, Any]] | None, at: int | None) -> Table:
    columns = ["rank", "factored", "parameters", "keep", "bytes", "error"]
    rows: list[list[Cell]] = []
    for index, point in enumerate(points):
        rank = "dense" if point.rank is None else point.rank
        row: list[Cell] = [rank, point.factored, point.parameters, point.keep, point.bytes, point.error]
        if read is not None:
            row.append(read[index]["perplexity"])
        rows.append([*row, "knee" if index == at else None])
    return Table([*columns, *(["perplexity"] if read is not None else []), "note"], rows)


def _matrices(found: Sequence[Mapping[str, Any]]) -> Table:
    columns = ("matrix", "shape", "break-even", "effective rank", "stable rank", "spectrum")
    return Table(
        columns,
        [
            [
                one["name"], f"{one['rows']}x{one['columns']}", one["break_even"], round(one["effective"], 1),
                round(one["stable"], 1),
                one["shape"] + (f" behind {', '.join(map(str, one['drops'][:4]))}" if one["drops"] else ""),
            ]
            for one in found
        ],
    )  # fmt: skip
