"""The arrow grammar: one line says how a stored tensor is made of named axes, and which way it points.

    "(kv group 2 rotary) <- hidden"      a torch Linear: the rows are its outputs, the columns its inputs
    "hidden -> (3 kv channel)"           its transpose, as GPT-2's Conv1D stores it
    "hidden"                             a vector: a norm's gain, a bias

An *axis* is a named factor; a *dim* is a stored dimension, the product of its factors, outermost first. Read left to
right a layout lists the dims in storage order. The grammar, whole:

    layout := side | side "<-" side | side "->" side
    side   := dim+
    dim    := name | "(" factor+ ")"
    factor := name | integer

>>> arrow = parse("(kv group 2 rotary) <- hidden")
>>> shape(arrow, {"kv": 4, "group": 2, "rotary": 8, "hidden": 128})
(128, 128)
>>> str(arrow)
'(kv group 2 rotary) <- hidden'
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

Factor = str | int
Dim = tuple[Factor, ...]

_TOKEN = re.compile(r"\s*(<-|->|[()]|[A-Za-z_][A-Za-z_0-9]*|[0-9]+|\S)")
_NAME = re.compile(r"[A-Za-z_][A-Za-z_0-9]*\Z")
_NUMBER = re.compile(r"[0-9]+\Z")


class LayoutError(ValueError):
    """A layout string outside the grammar, or sizes that a layout cannot have."""


@dataclass(frozen=True)
class Arrow:
    """A parsed layout: its dims in storage order, and where the outputs are.

    `sign` is "<-" (outputs first), "->" (outputs last) or "" (a vector, all of it output);
    `split_at` is the number of dims on the left-hand side.
    """

    dims: tuple[Dim, ...]
    sign: str
    split_at: int

    @property
    def outputs(self) -> range:
        """Positions of the dims that the arrow writes."""
        return range(self.split_at, len(self.dims)) if self.sign == "->" else range(self.split_at)

    @property
    def inputs(self) -> range:
        """Positions of the dims that the arrow reads; empty for a vector."""
        return range(self.split_at) if self.sign == "->" else range(self.split_at, len(self.dims))

    @property
    def axes(self) -> frozenset[str]:
        """The names of all axes in the arrow."""
        return frozenset(factor for dim in self.dims for factor in dim if isinstance(factor, str))

    def __str__(self) -> str:
        words = [_print_dim(dim) for dim in self.dims]
        if not self.sign:
            return " ".join(words)
        return " ".join([*words[: self.split_at], self.sign, *words[self.split_at :]])


def parse(text: str) -> Arrow:
    """Read a layout. Raises LayoutError that quotes the text and says which rule it breaks."""
    tokens = [match.group(1) for match in _TOKEN.finditer(text.rstrip())]
    if not tokens:
        raise LayoutError("empty layout: expected axis names, such as 'hidden' or 'ffn <- hidden'")
    signs = [token for token in tokens if token in ("<-", "->")]
    if len(signs) > 1:
        raise LayoutError(f"{text!r} has {len(signs)} arrows; a layout has one, or none for a vector")
    if not signs:
        dims = tuple(_dims(tokens, text))
        return Arrow(dims, "", len(dims))
    middle = tokens.index(signs[0])
    left, right = tuple(_dims(tokens[:middle], text)), tuple(_dims(tokens[middle + 1 :], text))
    if not left or not right:
        side = "left" if not left else "right"
        raise LayoutError(f"{text!r} has nothing {side} of its arrow")
    return Arrow(left + right, signs[0], len(left))


def _dims(tokens: Sequence[str], text: str) -> Iterator[Dim]:
    group: list[Factor] | None = None
    for token in tokens:
        if token == "(":
            if group is not None:
                raise LayoutError(f"{text!r} has brackets inside brackets; products are one level deep")
            group = []
        elif token == ")":
            if group is None:
                raise LayoutError(f"{text!r} closes a bracket that was not opened")
            if not group:
                raise LayoutError(f"{text!r} has an empty bracket")
            yield tuple(group)
            group = None
        elif _NUMBER.match(token):
            if group is None:
                raise LayoutError(f"{text!r} has the bare number {token}; numbers stand in brackets beside an axis")
            if len(token) > 9 or int(token) < 1:
                raise LayoutError(f"{text!r} has the factor {token}; factors are at least 1, and below a billion")
            group.append(int(token))
        elif _NAME.match(token):
            if group is None:
                yield (token,)
            elif token in group:
                raise LayoutError(f"{text!r} has the axis {token} twice in one dim")
            else:
                group.append(token)
        else:
            raise LayoutError(f"{text!r} has the character {token!r}; a layout is names, numbers, ( ) and an arrow")
    if group is not None:
        raise LayoutError(f"{text!r} opens a bracket that is not closed")


def _print_dim(dim: Dim) -> str:
    if len(dim) == 1 and isinstance(dim[0], str):
        return dim[0]
    return "(" + " ".join(str(factor) for factor in dim) + ")"


def dim_size(dim: Dim, sizes: Mapping[str, int]) -> int:
    """The stored size of a dim: the product of its factors."""
    missing = [factor for factor in dim if isinstance(factor, str) and factor not in sizes]
    if missing:
        raise LayoutError(f"no size is known for the axis {missing[0]} (known: {bindings(sizes)})")
    return math.prod(factor if isinstance(factor, int) else sizes[factor] for factor in dim)


def shape(arrow: Arrow, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """The stored shape of an arrow at these axis sizes."""
    return tuple(dim_size(dim, sizes) for dim in arrow.dims)


def split(arrow: Arrow, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """The shape with every factor its own dim: `tensor.reshape(split(...))` pulls the products apart."""
    return tuple(dim_size((factor,), sizes) for dim in arrow.dims for factor in dim)


def join(arrow: Arrow, factors: Sequence[int]) -> tuple[int, ...]:
    """The inverse of split: the stored shape, from the sizes of all factors in order."""
    wanted = sum(len(dim) for dim in arrow.dims)
    if len(factors) != wanted:
        raise LayoutError(f"'{arrow}' has {wanted} factors, but {len(factors)} sizes were given")
    sizes = iter(factors)
    return tuple(math.prod(next(sizes) for _ in dim) for dim in arrow.dims)


def solve(arrow: Arrow, stored: Sequence[int], known: Mapping[str, int]) -> dict[str, int]:
    """Axis sizes that follow from a stored shape, where a dim has exactly one unknown axis.

    >>> solve(parse("(kv 2 rotary) <- hidden"), (64, 128), {"kv": 4})
    {'rotary': 8, 'hidden': 128}
    """
    if len(stored) != len(arrow.dims):
        raise LayoutError(f"'{arrow}' has {len(arrow.dims)} dims, but the shape {list(stored)} has {len(stored)}")
    found: dict[str, int] = {}
    for dim, size in zip(arrow.dims, stored, strict=True):
        sizes = {**known, **found}
        unknown = [factor for factor in dim if isinstance(factor, str) and factor not in sizes]
        rest = math.prod(factor if isinstance(factor, int) else sizes.get(factor, 1) for factor in dim)
        if len(unknown) == 1 and rest and size % rest == 0 and size:
            found[unknown[0]] = size // rest
        elif (not unknown and rest != size) or len(unknown) == 1:
            where = f"{_print_dim(dim)} of '{arrow}'"
            own = {factor: sizes[factor] for factor in dim if factor in sizes}
            raise LayoutError(f"{where} is stored as {size}, which does not fit {bindings(own)}")
    return found


def bindings(sizes: Mapping[str, int]) -> str:
    """The sizes as an error message shows them: "kv=4, hidden=128"."""
    return ", ".join(f"{name}={size}" for name, size in sizes.items()) or "nothing"
