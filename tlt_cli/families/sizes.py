"""Axis sizes <-> config.json: read the sizes a config states, and edit a config so that it states new ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tlt_cli.axes import bindings
from tlt_cli.checkpoint.strict_json import shortened
from tlt_cli.errors import TltError
from tlt_cli.families.expression import evaluate, invert
from tlt_cli.families.table import Family

_LARGEST = 2**63 - 1  # of any stored dim


def lookup(table: Family, config: Mapping[str, Any], key: str) -> int:
    """A size key of config.json: where it is absent the table's default; where that leaves it null, what it derives."""
    value = config[key] if key in config else table.defaults.get(key)
    if value is None and key in table.derived:
        return evaluate(table.derived[key], lambda name: lookup(table, config, name))
    if value is None:
        raise TltError(f"config.json has no {key}, which the {table.name} table needs")
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _LARGEST:
        raise TltError(f"config.json says {key}={shortened(value)}; expected a whole number of at least 1")
    return value


def read_sizes(table: Family, config: Mapping[str, Any]) -> dict[str, int]:
    """The size of every axis as config.json states it. Raises TltError where a size is missing or not whole."""
    sizes = {}
    for axis, expression in table.axes.items():
        try:
            sizes[axis] = evaluate(expression, lambda key: lookup(table, config, key))
        except TltError as error:
            raise TltError(f"{table.name} axis {axis}: {error}") from error
    return sizes


def edit_config(table: Family, config: Mapping[str, Any], sizes: Mapping[str, int]) -> dict[str, Any]:
    """A copy of config.json that states these sizes; only keys whose value changes are touched.

    Keys that name an axis directly are written first, then the numerators of quotients. Raises TltError where the
    family cannot have the sizes: no assignment of its keys states them, or a multiple it must keep is broken.
    """
    edited = dict(config)
    simple = [axis for axis, expression in table.axes.items() if not expression.sign]
    for axis in simple + [axis for axis in table.axes if axis not in simple]:
        target = invert(table.axes[axis], sizes[axis], lambda key: lookup(table, edited, key))
        if target is None:
            continue
        key, value = target
        try:
            stated = lookup(table, edited, key)
        except TltError:
            stated = None
        free = not any(str(table.axes[other]) == key for other in simple)
        if stated != value and (axis in simple or free):
            edited[key] = value
    problem = illegal(table, edited, sizes)
    if problem:
        raise TltError(problem)
    return edited


def illegal(table: Family, config: Mapping[str, Any], sizes: Mapping[str, int]) -> str | None:
    """Why this family cannot have these sizes, or None if it can."""
    for axis, expression in table.axes.items():
        try:
            stated = evaluate(expression, lambda key: lookup(table, config, key))
        except TltError as error:
            return f"{table.name} cannot have {bindings(sizes)}: {error}"
        if stated != sizes[axis]:
            return (
                f"{table.name} cannot have {bindings(sizes)}: its config says {axis} = {expression}, which is {stated}"
            )
    for key, divisor in table.multiples.items():
        size, by = lookup(table, config, key), lookup(table, config, divisor)
        if size % by:
            return f"{table.name} cannot have {key}={size} with {divisor}={by}: it must be a multiple of it"
    return None
