"""Which models can lie side by side: those of all sources one by one, and what they must have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from tlt_cli.errors import TltError
from tlt_cli.families import Fit
from tlt_cli.families.factors import dense_config
from tlt_cli.families.groups import check_weights, refuse_joint
from tlt_cli.families.sizes import edit_config
from tlt_cli.model.describe import OF_ONE_PART, describe

# Sizes, and what is said elsewhere: of these models may differ, and of OF_ONE_PART.
_FREE = (*OF_ONE_PART, "ffn", "roles", "groups", "lowrank", "window", "rotary")
VOCAB = "vocab"
_WHAT_WORKS = {
    "vocab": "merge models of one tokenizer",
    "tied": "untie the one that is tied: save it with tie_word_embeddings=false and a head of its own",
}


@dataclass(frozen=True, eq=False)
class Source:
    """A checkpoint that is merged: its fit, its stored dtypes by tensor, what it is called, its digest.

    Its tensors are read under their names behind the number of the checkpoint (`checkpoint.together`). `tokens` are
    rows of its own for each id of the merged model [V], -1 where it has none: the mean of its rows stands there. None
    where its ids are those of the merged model.
    """

    fit: Fit
    dtypes: Mapping[str, str]
    name: str
    sha256: str
    tokens: Sequence[int] | None = None


@dataclass(frozen=True, eq=False)
class Model:
    """One of the models side by side: where it comes from, and which slice it is there if there are several."""

    number: int
    source: Source
    slice: int | None
    fit: Fit
    weight: float
    name: str
    sha256: str

    @property
    def label(self) -> str:
        """What it is called in messages."""
        return self.name if self.slice is None else f"part {self.slice + 1} of {self.source.name}"


def models(sources: Sequence[Source], weights: Sequence[float]) -> list[Model]:
    """All models of all sources in order: of one that is merged already each of its parts, its weights multiplied."""
    found = []
    for number, (source, weight) in enumerate(zip(sources, weights, strict=True)):
        groups = source.fit.groups
        refuse_joint(groups, f"merging {source.name}")
        for at, fitted in enumerate(source.fit.parts):
            own = _speaking(_dense(fitted), source.tokens)
            if groups is None:
                found.append(Model(number, source, None, own, weight, source.name, source.sha256))
            else:
                part = groups.parts[at]
                found.append(Model(number, source, at, own, weight * part.weight, part.name, part.sha256))
    return found


def counted(sources: Sequence[Source], weights: Sequence[float] | None) -> list[Model]:
    """`models`, checked: that they can be merged at all, and the weights."""
    if not sources or (len(sources) == 1 and sources[0].fit.groups is None):
        raise TltError(f"{len(sources)} model given; merging takes two or more, or one that is merged already")
    shares = [1 / len(sources)] * len(sources) if weights is None else list(weights)
    check_weights(shares, len(sources))
    found = models(sources, shares)
    for model in found:
        _check_alone(model)
    for model in found[1:]:
        _check_pair(found[0], model)
    return found


def _dense(fitted: Fit) -> Fit:
    """The fit with the config.json of the stock model, whatever is stored as factors."""
    if fitted.lowrank is None:
        return fitted
    return replace(fitted, config=dense_config(fitted.config, fitted.lowrank.stock))


def _speaking(fitted: Fit, tokens: Sequence[int] | None) -> Fit:
    """The fit with a vocabulary of another size."""
    if tokens is None:
        return fitted
    sizes = {**fitted.sizes, VOCAB: len(tokens)}
    return replace(fitted, sizes=sizes, config=edit_config(fitted.family, fitted.config, sizes))


def _check_alone(model: Model) -> None:
    coded = [] if model.fit.lowrank is None or model.fit.lowrank.bits is None else model.fit.places.values()
    if model.source.tokens is not None and any(place.slot and VOCAB in place.arrow.axes for place in coded):
        raise TltError(
            f"{model.label} has 8-bit codes for its words, and words that it lacks would need the mean of them; "
            "`tlt fold SRC` first"
        )
    bare = [place.name for place in model.fit.places.values() if not place.roles]
    if bare or not model.fit.family.roles:
        raise TltError(
            f"{model.label}: the {model.fit.family.name} table does not say what {bare[0] if bare else 'its tensors'} "
            "does in the model; merge needs it: name it in [wiring]"
        )


def _check_pair(first: Model, other: Model) -> None:
    """TltError naming the first thing in which two models differ and may not."""
    names = [model.fit.family.name for model in (first, other)]
    if first.fit.family != other.fit.family:
        raise TltError(
            f"{first.label} is a {names[0]} and {other.label} a {names[1]}: models of one family are merged; for "
            "others take the mean of what they say, outside of a file"
        )
    one, two = describe(first.fit), describe(other.fit)
    for key, value in one.items():
        if key not in _FREE and value != two[key]:
            works = _WHAT_WORKS.get(key, "such models cannot lie side by side; merge those that agree in it")
            raise TltError(f"{first.label} has {key}={value} and {other.label} {key}={two[key]}: {works}")
    for key in ("window", "rotary"):
        for layer, (value, own) in enumerate(zip(one[key], two[key], strict=False)):
            if value != own:
                raise TltError(
                    f"layer {layer} of {first.label} has {key}={value} and of {other.label} {key}={own}: one layer "
                    "looks back alike in all models that lie side by side"
                )
    missing = sorted(one["roles"].keys() ^ two["roles"].keys())
    for role, spot in one["roles"].items():
        if not missing and spot["bias"] != two["roles"][role]["bias"]:
            has, lacks = (first, other) if spot["bias"] else (other, first)
            raise TltError(
                f"{has.label} has a bias at {role} and {lacks.label} has none; give {lacks.label} one of zeros and set "
                "the switch in its config.json"
            )
    if missing:
        raise TltError(f"only one of {first.label} and {other.label} has a {missing[0]}; merge models that agree in it")
