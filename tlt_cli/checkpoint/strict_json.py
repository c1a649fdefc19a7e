"""JSON as a checkpoint may hold it: one object, unique keys, proper text."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from tlt_cli.errors import TltError


def strict_json_object(raw: bytes, where: str) -> dict[str, Any]:
    """A JSON object as a dict, key order kept; `where` names the file in errors.

    Raises TltError for what json.loads would let pass: duplicate keys (it keeps the last), NaN and
    unpaired surrogates (neither can be written again).
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) < len(pairs):
            (repeated, count), *_ = Counter(key for key, _ in pairs).most_common(1)
            raise TltError(f"{where}: {shortened(repeated)} occurs {count} times; names must be unique")
        return result

    def refuse_constant(constant: str) -> None:
        raise TltError(f"{where}: not valid JSON: {constant} is not a JSON number")

    try:
        text = raw.decode("utf-8")
        value = json.loads(text, object_pairs_hook=unique, parse_constant=refuse_constant)
        if "\\u" in text:  # only an escape can spell a lone surrogate in text that was UTF-8
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except TltError:
        raise
    except UnicodeDecodeError as error:
        raise TltError(f"{where}: not valid UTF-8 at byte {error.start} of the JSON") from None
    except UnicodeEncodeError:
        raise TltError(f"{where}: a name holds an unpaired surrogate, which UTF-8 lacks") from None
    except RecursionError:
        raise TltError(f"{where}: not valid JSON: nested too deeply") from None
    except ValueError as error:
        raise TltError(f"{where}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise TltError(f"{where}: the JSON must be an object, not {shortened(value)}")
    return value


def shortened(value: object) -> str:
    """A value as an error message can hold it: its repr, at most 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
