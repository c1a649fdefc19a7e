"""The linear modules of a decoder's blocks: what an adapter may stand beside, by the names that the file has."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from tlt_cli.errors import TltError, nearest
from tlt_cli.model.decoder import Decoder

READERS = (("query", "key", "value"), ("output",), ("gate", "up"), ("down",))  # roles in one bracket read the same


@dataclass(frozen=True)
class Site:
    """One module of a layer. `roles` are several where the module is fused; their outputs lie one behind the other.

    `outputs` has one size per role. `transposed` says that the file stores [in, out].
    """

    layer: int
    module: str
    roles: tuple[str, ...]
    inputs: int
    outputs: tuple[int, ...]
    transposed: bool

    @property
    def short(self) -> str:
        """The module's last name, as PEFT's target_modules have it."""
        return self.module.rpartition(".")[2]


def sites(decoder: Decoder) -> list[Site]:
    """All of them, layer by layer, in the order in which a block uses them."""
    found = []
    for layer in range(decoder.description["layers"]):
        sizes, modules = decoder.sizes(layer), dict[str, list[str]]()
        spots = decoder.description["roles"]
        for role in (role for group in READERS for role in group if role in spots):
            modules.setdefault(spots[role]["name"].format(layer=layer), []).append(role)
        for module, roles in modules.items():
            outputs = tuple(sizes[role][0] for role in roles)
            transposed = spots[roles[0]]["transposed"]
            found.append(Site(layer, module, tuple(roles), sizes[roles[0]][1], outputs, transposed))
    return found


def block_prefixes(decoder: Decoder) -> dict[str, int]:
    """What the names of a block's parameters begin with, and its layer."""
    rooms = {id(room): layer for layer, room in decoder.rooms.items()}
    return {f"{name}.": rooms[id(module)] for name, module in decoder.named_modules() if id(module) in rooms}


def reading_alike(chosen: Iterable[Site]) -> list[list[Site]]:
    """The same sites, those together that read the same input: query, key and value of a layer; gate and up."""
    groups: dict[tuple[int, int], list[Site]] = {}
    for site in chosen:
        bracket = next(number for number, roles in enumerate(READERS) if site.roles[0] in roles)
        groups.setdefault((site.layer, bracket), []).append(site)
    return list(groups.values())


def named(module: str, pattern: str) -> bool:
    """Whether a glob means a module: by its whole name, or by the end of it behind a dot.

    >>> named("model.layers.3.mlp.up_proj", "up_proj"), named("model.layers.3.mlp.up_proj", "layers.3.*")
    (True, True)
    """
    return fnmatchcase(module, pattern) or fnmatchcase(module, f"*.{pattern}")


def choose(found: Sequence[Site], patterns: Iterable[str]) -> list[Site]:
    """The sites that any of the globs means; all of them where there are no globs. TltError for one that means none."""
    patterns = list(patterns)
    for pattern in patterns:
        if not any(named(site.module, pattern) for site in found):
            known = sorted({site.short for site in found})
            raise TltError(
                f"no linear layer of a block is named {pattern!r}{nearest(pattern, known)}; there are "
                f"{', '.join(known)}, such as {found[0].module}"
            )
    return [site for site in found if not patterns or any(named(site.module, pattern) for pattern in patterns)]
