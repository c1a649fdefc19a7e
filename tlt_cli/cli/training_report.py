"""What `tlt train` says of a run at its end, and what of it goes into the model's card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tlt_cli.cli.console import Table
from tlt_cli.cli.training_request import Request
from tlt_cli.cli.training_start import Subject, Texts
from tlt_cli.model.nested import sizes_of
from tlt_cli.training.nested import Inner
from tlt_cli.training.recipe import Recipe


def report_of(
    request: Request, subject: Subject, texts: Texts, recipe: Recipe, output: Path, *, counted: Mapping[str, int],
    recorded: Mapping[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """What is known of a run before its first step; `counted` are the sizes of what moves, by name."""
    return {
        "operation": "train", "command": request.command(subject.name), "path": str(output),
        "source": request.source, "recipe": recipe.data(), "tokens": recipe.steps * recipe.tokens,
        "data": texts.info, "parameters": sum(parameter.numel() for parameter in subject.decoder.parameters()),
        "trained": {"tensors": len(counted), "parameters": sum(counted.values())}, **recorded,
        **({"levels": _level_sizes(subject.inner)} if subject.inner else {}),
    }  # fmt: skip


def changes(report: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """The rows of the model's card."""
    return [("steps", "", f"{report['recipe']['steps']:,}"), ("tokens", "", f"{report['tokens']:,}")]


def closing_table(report: Mapping[str, Any]) -> Table:
    """The table that a run ends with."""
    rows: list[Sequence[Any]] = [
        ("steps", report["recipe"]["steps"]), ("tokens", report["tokens"]), ("parameters", report["parameters"]),
        ("of them, or beside them, trained", report["trained"]["parameters"]),
    ]  # fmt: skip
    rows += _level_rows(report)
    for name, value in report.get("evaluation", {}).items():
        if name != "models":
            rows.append((name.replace("_", " "), value if isinstance(value, int | float) else str(value)))
    if "seconds" in report:
        rows.append(("seconds", round(report["seconds"], 1)))
    return Table(("", "value"), rows)


def _level_sizes(inner: Sequence[Sequence[Inner]]) -> list[dict[str, Any]]:
    """Level by level: how many models, of which sizes."""
    return [
        {"level": number, "models": len(level), **sizes_of(level[0].child.fit), "parameters": level[0].parameters}
        for number, level in enumerate(inner, start=1)
    ]


def _level_rows(report: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """The rows of the closing table: each level's sizes, and of several models the loss of each on each stream."""
    rows: list[tuple[str, Any]] = []
    for level in report.get("levels", ()):
        several = "" if level["models"] == 1 else f"{level['models']} of "
        heads = f"heads {level['heads']}/{level['kv_heads']} of {level['head_dim']}"
        sizes = f"{several}dim {level['dim']}, ffn {level['ffn']}, {heads}, {level['layers']} deep"
        rows.append((f"level {level['level']}", sizes))
        rows.append((f"level {level['level']}, parameters{' of each' if several else ''}", level["parameters"]))
    models = report.get("evaluation", {}).get("models", ())
    if len(models) > len(report.get("levels", ())) or any(len(model["streams"]) > 1 for model in models):
        for model in models:
            found = "  ".join(f"{name} {nll:.4f}" for name, nll in model["streams"].items())
            rows.append((f"loss of {model['model']}", found))
    return rows
