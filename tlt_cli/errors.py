"""The one exception that users see as a plain line: what is wrong, what was expected, what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class TltError(ValueError):
    """A request or an input that tlt refuses; the message is the whole explanation."""


class UsageError(TltError):
    """A combination of options that can never work (exit code 2, like any other bad usage)."""


def nearest(name: str, known: Iterable[str]) -> str:
    """ " (did you mean 'x'?)" for the closest known name, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean '{close[0]}'?)" if close else ""
