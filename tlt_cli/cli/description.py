"""A checkpoint in words and numbers, from its headers: the data behind `tlt inspect`."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from tlt_cli.axes import bindings
from tlt_cli.checkpoint.lazy import Checkpoint
from tlt_cli.cli.console import Table
from tlt_cli.families.fit import Fit


def describe(checkpoint: Checkpoint, fitted: Fit | None) -> dict[str, Any]:
    """Everything that is known, JSON-able. Without a family axes and layouts stay unknown.

    `parameters` counts what is stored and used: a tied head once, buffers that will be dropped not at all.
    """
    dropped = set(fitted.dropped) if fitted else set()
    tensors = [
        {
            "name": name,
            "axes": str(fitted.places[name].arrow) if fitted and name in fitted.places else None,
            "shape": list(info.shape),
            "dtype": info.dtype,
            "bytes": info.nbytes,
            "parameters": math.prod(info.shape),
            "file": info.file,
            "dropped": name in dropped,
        }
        for name, info in checkpoint.tensors.items()
    ]
    return {
        "source": checkpoint.source,
        "repository": checkpoint.repository,
        "revision": checkpoint.revision,
        "family": fitted.family.name if fitted else None,
        "axes": dict(fitted.sizes) if fitted else {},
        "tied": fitted.tied if fitted else None,
        "groups": fitted.groups.data() if fitted and fitted.groups else None,
        **({"glue": _glue(fitted)} if fitted and fitted.groups and fitted.groups.glue else {}),
        "parameters": sum(t["parameters"] for t in tensors if not t["dropped"]),
        "bytes": sum(t["bytes"] for t in tensors),
        "dtypes": dict(Counter(t["dtype"] for t in tensors)),
        "files": list(checkpoint.shards),
        "lineage": checkpoint.lineage,
        "tensors": tensors,
    }


def tensor_table(data: Mapping[str, Any]) -> Table:
    """One row per tensor."""
    return Table(
        ("tensor", "axes", "shape", "dtype", "bytes"),
        [[t["name"], t["axes"], _shape(t["shape"]), t["dtype"], t["bytes"]] for t in data["tensors"]],
    )


def summary(data: Mapping[str, Any]) -> Iterator[str]:
    """The lines that stand under the table."""
    dtypes = ", ".join(f"{count} {dtype}" for dtype, count in data["dtypes"].items())
    if "adapter" not in data:
        yield f"family: {data['family'] or 'none'}"
    if data["family"]:
        yield f"axes: {bindings(data['axes'])}"
        yield f"tied: {'yes' if data['tied'] else 'no'}"
    if data.get("groups"):
        shares = zip(data["groups"]["parts"], data["groups"]["weights"], strict=True)
        named = ", ".join(f"{part['name']} ({weight:g})" for part, weight in shares)
        yield f"models side by side, with their shares of the logits: {named}"
    if data.get("groups") and data["groups"].get("dense"):
        yield f"folded into one another: {', '.join(data['groups']['dense'])}"
    for site in data.get("glue", ()):
        yield _site(site)
    yield f"parameters: {data['parameters']:,}"
    yield f"bytes: {data['bytes']:,} in {len(data['files'])} file{'s' if len(data['files']) > 1 else ''}"
    yield f"tensors: {len(data['tensors'])} ({dtypes})"
    dropped = [t["name"] for t in data["tensors"] if t["dropped"]]
    if dropped:
        yield f"not carried over by surgery: {', '.join(dropped)}"
    lineage = data["lineage"] or {}
    for step in _records([lineage, *reversed(_records(lineage.get("history")))]):
        if "command" in step:
            yield f"made by: {step['command']} (tlt {step.get('version')})"
        for parent in _records(step.get("parents")):
            yield f"    from {parent.get('source')}, sha256 {parent.get('sha256')}"


def _glue(fitted: Fit) -> list[dict[str, Any]]:
    from tlt_cli.surgery.glue import described

    return described(fitted)


def _site(site: Mapping[str, Any]) -> str:
    if not site["folds"]:
        return f"no glue, for it would not fold: {site['module']}: {site['how']}"
    kind = site["kind"] or "none"
    kind += "" if site["rank"] is None else f", rank {site['rank']}"
    return (
        f"glue in front of {site['module']}: {kind}, on the {site['width']} entries behind {site['reads']}; "
        f"folds into {site['into']}, {site['how']}"
    )


def _records(value: Any) -> list[dict[str, Any]]:
    """The objects of a list; nothing where a file carries something else under a lineage's name."""
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def _shape(shape: list[int]) -> str:
    return "x".join(map(str, shape)) or "scalar"
