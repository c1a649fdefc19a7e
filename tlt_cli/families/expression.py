"""The right-hand sides of a family's axes: a config key, or a product or quotient of two keys or integers."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from tlt_cli.errors import TltError

_TERM = re.compile(r"([1-9][0-9]{0,8}|[A-Za-z_][A-Za-z_0-9]*)\Z")


@dataclass(frozen=True)
class Expression:
    """`left`, `left / right` or `left * right`, each side a config key or an integer."""

    left: str | int
    sign: str = ""
    right: str | int = 1

    def __str__(self) -> str:
        return f"{self.left} {self.sign} {self.right}" if self.sign else str(self.left)


def parse_expression(text: str) -> Expression:
    """Read "hidden_size" or "head_dim / 2". Raises TltError on anything more."""
    words = text.split()
    terms = all(_TERM.match(word) for word in words[::2])
    if not terms or len(words) not in (1, 3) or (len(words) == 3 and words[1] not in ("/", "*")):
        raise TltError(f"'{text}' is not a size: write a config key, or two keys or integers with / or * between")
    sides = [int(word) if word[0].isdigit() else word for word in words[::2]]
    return Expression(sides[0], words[1], sides[1]) if len(words) == 3 else Expression(sides[0])


def evaluate(expression: Expression, value_of: Callable[[str], int]) -> int:
    """The size; `value_of` looks a config key up. Raises TltError where a quotient is not whole."""

    def side(term: str | int) -> int:
        return term if isinstance(term, int) else value_of(term)

    left = side(expression.left)
    if not expression.sign:
        return left
    right = side(expression.right)
    if expression.sign == "*":
        return left * right
    if right == 0 or left % right:
        raise TltError(f"{expression} = {left} / {right} is not a whole number")
    return left // right


def invert(expression: Expression, size: int, value_of: Callable[[str], int]) -> tuple[str, int] | None:
    """The config key that carries this size and the value it must have; None if no key does."""
    if isinstance(expression.left, int):
        return None
    if not expression.sign:
        return expression.left, size
    right = expression.right if isinstance(expression.right, int) else value_of(expression.right)
    if expression.sign == "/":
        return expression.left, size * right
    return (expression.left, size // right) if right and size % right == 0 else None
