"""Where a checkpoint comes from, as machines read it (lineage, in the metadata) and as people do (the model card).

No times, users or paths: the same command on the same input gives the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tlt_cli
from tlt_cli.checkpoint.lazy import Checkpoint

if TYPE_CHECKING:
    from huggingface_hub import CardData

_CARRIED_OVER = ("license", "license_name", "license_link", "language", "pipeline_tag")


def lineage(checkpoint: Checkpoint, *, operation: str, command: str, details: Mapping[str, Any]) -> dict[str, Any]:
    """What was done to `checkpoint` by which command, and under "history" all that was done to it before, oldest first.

    Parents are named by repository or base name and by digest: sha256 as `Checkpoint.digest` gives it. Of several
    parents the histories stand one behind the other, what they have in common once.
    """
    parents = checkpoint.parents or (checkpoint,)
    steps = [step for parent in parents for step in _history(parent)]
    return {
        "version": tlt_cli.__version__,
        "operation": operation,
        "command": command,
        "parents": [_parent(parent) for parent in parents],
        "details": dict(details),
        "history": [step for number, step in enumerate(steps) if step not in steps[:number]],
    }


def _parent(checkpoint: Checkpoint) -> dict[str, str]:
    found = {"source": source_name(checkpoint), "sha256": checkpoint.digest()}
    if checkpoint.repository is not None and checkpoint.revision is not None:
        found["revision"] = checkpoint.revision
    return found


def adapter_lineage(
    base: Checkpoint, before: Checkpoint | None, *, operation: str, command: str, details: Mapping[str, Any]
) -> dict[str, Any]:
    """As `lineage`, of an adapter beside `base`: it goes on from the adapter `before`, the second parent, if any."""
    found = lineage(base, operation=operation, command=command, details=details)
    if before is not None:
        found["parents"].append({"source": source_name(before), "sha256": before.digest()})
        found["history"] = _history(before) or found["history"]
    return found


def _history(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    last = dict(checkpoint.lineage or {})
    earlier = last.pop("history", [])
    return [*(earlier if isinstance(earlier, list) else []), *([last] if last else [])]


def metadata(lineage: Mapping[str, Any]) -> dict[str, str]:
    """The lineage as it is stored in a weight file's `__metadata__`."""
    return {"format": "pt", "tlt": json.dumps(lineage)}


def source_name(checkpoint: Checkpoint) -> str:
    """The repository's id, or the base name of the file or folder."""
    if checkpoint.repository is not None:
        return checkpoint.repository
    assert checkpoint.location is not None
    return checkpoint.location.resolve().name


def companions(checkpoint: Checkpoint) -> dict[str, Path]:
    """The files that go along unread, by their names relative to the checkpoint's folder."""
    if checkpoint.location is None:
        return {}
    folder = checkpoint.location if checkpoint.location.is_dir() else checkpoint.location.parent
    return {path.relative_to(folder).as_posix(): path for path in checkpoint.companions}


def model_card(
    checkpoint: Checkpoint,
    lineage: Mapping[str, Any],
    *,
    changes: Sequence[tuple[str, str, str]],
    notes: Sequence[str] = (),
    library: str = "transformers",
    relation: str = "finetune",
) -> str:
    """README.md of what was made of `checkpoint`; `changes` are rows of (what, before, after).

    `library` loads it, and `relation` is what it is to its base model, in the words of the hub.

    Licence, language and task are carried over from the source's own card; the base model is the source's repository,
    or what the source said it was based on. Of several parents all are base models, and only what their cards agree in
    is carried over.
    """
    from huggingface_hub.repocard_data import ModelCardData  # alone: the whole library takes six times as long

    parents = checkpoint.parents or (checkpoint,)
    cards = [_source_data(parent) for parent in parents]
    readable = all(known for _, known in cards)
    base = [
        name
        for parent, (data, _) in zip(parents, cards, strict=True)
        for name in ([parent.repository] if parent.repository else _strings(data.get("base_model")))
    ]
    base = list(dict.fromkeys(base))
    first = cards[0][0]
    carried = {
        key: first.get(key)
        for key in _CARRIED_OVER
        if first.get(key) is not None and all(data.get(key) == first.get(key) for data, _ in cards)
    }
    tags = [*(tag for data, _ in cards for tag in _strings(data.get("tags"))), "tlt", lineage["operation"]]
    data = ModelCardData(
        library_name=library,
        base_model=(base[0] if len(base) == 1 else base) or None,
        base_model_relation=relation if base else None,
        tags=list(dict.fromkeys(tags)),
        **carried,
    )
    name = ", ".join(dict.fromkeys(source_name(parent) for parent in parents))
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {name}, after `tlt {lineage['operation']}`",
        f"Made from **{name}** by tlt {lineage['version']}:",
        f"```\n{lineage['command']}\n```",
    ]
    if changes:
        parts.append("\n".join(("| | before | after |", "| --- | --- | --- |", *map(_row, changes))))
    if not readable:
        notes = [*notes, "The card of the source could not be read, so its licence is not repeated here: look it up."]
    if len({str(data.get("license")) for data, _ in cards}) > 1:
        notes = [*notes, "The sources are under several licences, so none is stated here: look them up."]
    if notes:
        parts.append("\n".join(f"- {note}" for note in notes))
    sources = ", ".join(f"{parent['source']} (sha256 `{parent['sha256']}`)" for parent in lineage["parents"])
    parts.append(f"Source: {sources}. `tlt inspect` prints the whole lineage.")
    return "\n\n".join(parts) + "\n"


def _source_data(checkpoint: Checkpoint) -> tuple[CardData, bool]:
    """What the source's card says of itself, and whether it could be read at all."""
    from huggingface_hub.repocard_data import ModelCardData

    card = checkpoint.card or ""
    if not card.startswith("---"):
        return ModelCardData(), True
    from huggingface_hub import ModelCard

    try:
        return ModelCard(card, ignore_metadata_errors=True).data, True
    except Exception:  # YAML that does not parse raises its own errors, YAML that is no card half a dozen others
        return ModelCardData(), False


def _strings(value: object) -> list[str]:
    """A card's field that should be one or several words; anything else that stands there is dropped."""
    values = value if isinstance(value, list) else [value]
    return [text for text in values if isinstance(text, str)]


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
