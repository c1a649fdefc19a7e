"""Growing a model along any axis: a fitted header and the sizes asked for in, a Plan out.

Every tensor becomes `W' = P_out W P_in+ + R (I - P_in P_in+)`, which computes the same function for any R
(reference: grow, section 3.0; Net2Net 1511.05641, LEMON 2310.07999, HyperCloning 2409.12903 are its special cases).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from tlt_cli.axes import shape
from tlt_cli.checkpoint.planned import PlannedTensor, Tensors
from tlt_cli.errors import TltError, UsageError
from tlt_cli.families import Fit, Place
from tlt_cli.families.factors import refuse_factored
from tlt_cli.families.groups import refuse_grouped
from tlt_cli.families.layers import move_patterns
from tlt_cli.families.place import named, renamed
from tlt_cli.model.decoder import HEAD_NORMS
from tlt_cli.model.describe import describe, embedding_scale, softmax_scales
from tlt_cli.model.nested import without_levels
from tlt_cli.surgery.arrows import METHODS, AxisMaps, axis_maps, sides
from tlt_cli.surgery.depth import DEPTHS, Layers, layers
from tlt_cli.surgery.plan import Plan
from tlt_cli.surgery.rotary import resize_rotation
from tlt_cli.surgery.spectrum import DenseMap
from tlt_cli.surgery.targets import Sizes, Targets, current, resolve
from tlt_cli.surgery.widen import Widening

FILLS = ("random", "spectral", "zero")
READS_NORM = {  # which norm stands in front of a role
    "query": "attention_norm", "key": "attention_norm", "value": "attention_norm", "gate": "ffn_norm", "up": "ffn_norm",
    "head": "final_norm",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to grow. `noise` is the null-space term's standard deviation, in standard deviations of each matrix;
    `split` the share of a doubled entry's readers that the first copy keeps; `fill` follows the method where None."""

    method: str = "duplicate"
    fill: str | None = None
    noise: float = 1.0
    split: float = 0.5
    depth: str = "identity"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, known in (("method", METHODS), ("depth", DEPTHS), ("fill", (*FILLS, None))):
            if getattr(self, name) not in known:
                options = ", ".join(option for option in known if option)
                raise UsageError(f"--{name} {getattr(self, name)} is not known; take one of {options}")
        if not 0 <= self.noise < float("inf"):
            raise UsageError(f"--noise {self.noise} is not a number of standard deviations of at least 0")
        if not 0 < self.split < 1:
            raise UsageError(f"--split {self.split} is not a share between 0 and 1")
        if not 0 <= self.seed < 1 << 63:
            raise UsageError(f"--seed {self.seed} is not a whole number from 0 to 2^63 - 1")

    @property
    def filled(self) -> str:
        """The fill in use."""
        return self.fill or ("spectral" if self.method == "spectral" else "random")


@dataclass(frozen=True, eq=False)
class Growth:
    """Everything that is known before any tensor is computed: the maps of all axes, the layers, the new config."""

    fit: Fit
    targets: Targets
    recipe: Recipe
    axes: AxisMaps
    layers: Layers
    config: dict[str, Any]
    temperatures: tuple[float, ...]
    embedding: float

    @property
    def rotates(self) -> bool:
        """Whether the residual stream is mixed by a dense map."""
        return isinstance(self.axes.hidden, DenseMap)


def prepare(
    fit: Fit, wanted: Sizes, recipe: Recipe, *, room: Callable[[Mapping[str, int]], None] = lambda sizes: None
) -> Growth:
    """Check the request and find every map. Raises TltError for what the family cannot have or tlt cannot keep.

    `room` is told the new size of every axis before anything of that size is made, and may refuse by raising.
    """
    refuse_factored(fit.lowrank, "growing")
    refuse_grouped(fit.groups, "growing")
    bare = [place.name for place in fit.places.values() if not place.roles]
    if bare or not fit.family.roles:
        raise TltError(
            f"the {fit.family.name} table does not say what {bare[0] if bare else 'its tensors'} does in the model; "
            "grow needs it: name it in [wiring]"
        )
    describe(fit)  # refuses whatever the decoder, and so the verification, could not compute
    if not wanted.named() and recipe.method != "rotate":
        raise UsageError("nothing to grow: say at least one of --to-dim, --to-ffn, --to-heads, --to-kv-heads, "
                         "--to-head-dim, --to-layers, --to-vocab")  # fmt: skip
    targets = resolve(fit, wanted)
    old, new = fit.sizes, targets.sizes
    if new == old and recipe.method != "rotate":
        raise TltError("nothing to grow: the model already has the sizes asked for")
    room(new)
    plan = layers(old["layer"], new["layer"], recipe.depth)
    config = without_levels(targets.config)
    if new["layer"] != old["layer"]:
        config = move_patterns(fit, config, plan.source)
    if "rotary" in new:
        config = resize_rotation(fit, config, new["rotary"])
    axes = axis_maps(fit, new, method=recipe.method, split=recipe.split, seed=recipe.seed)
    if isinstance(axes.hidden, DenseMap) and fit.tied:
        config = {**config, "tie_word_embeddings": False}
    grown = replace(fit, config=config, sizes=new)
    before, after = softmax_scales(fit), softmax_scales(grown)
    return Growth(
        fit, targets, recipe, axes, plan, config,
        temperatures=tuple(before[source] / after[layer] for layer, source in enumerate(plan.source)),
        embedding=(embedding_scale(fit) or 1.0) / (embedding_scale(grown) or 1.0),
    )  # fmt: skip


def grow(fit: Fit, dtypes: Mapping[str, str], wanted: Sizes, recipe: Recipe) -> Plan:
    """The Plan of a grown checkpoint. `dtypes` are the stored dtypes of the tensors, by name; they are kept."""
    return grown(fit, dtypes, wanted, recipe)[1]


def grown(
    fit: Fit,
    dtypes: Mapping[str, str],
    wanted: Sizes,
    recipe: Recipe,
    *,
    room: Callable[[Mapping[str, int]], None] = lambda sizes: None,
) -> tuple[Growth, Plan]:
    """The maps and the Plan, for what else grows along the same maps. `room` as for `prepare`."""
    growth = prepare(fit, wanted, recipe, room=room)
    planned = []
    for name, place, layer in grown_places(growth):
        planned += _tensors(growth, name, place, layer, dtypes[place.name])
    old, new = current(fit), current(replace(fit, sizes=growth.targets.sizes))
    changed = {key: value for key, value in growth.config.items() if fit.config.get(key) != value}
    notes = [*growth.targets.notes, *_notes(growth)]
    plan = Plan(
        operation="grow",
        tensors=tuple(planned),
        config=growth.config,
        exact=recipe.depth == "identity" or len(set(growth.layers.source)) == len(growth.layers.source),
        details={
            "family": fit.family.name,
            "from": old,
            "to": new,
            **asdict(recipe),
            "fill": recipe.filled,
            "layers": list(growth.layers.source),
            "silent": [layer for layer, silent in enumerate(growth.layers.silent) if silent],
            "config": changed,
            "was": {key: value for key, value in fit.config.items() if key in changed or key not in growth.config},
            "added": [key for key in changed if key not in fit.config],
        },
        notes=tuple(notes),
    )
    return growth, plan


def grown_places(growth: Growth) -> Iterable[tuple[str, Place, int | None]]:
    """(new name, the old tensor's place, new layer) of every tensor that comes from an old one."""
    for place in growth.fit.places.values():
        if place.layer is None:
            yield place.name, place, None
            continue
        for layer, source in enumerate(growth.layers.source):
            if source == place.layer:
                yield renamed(place, layer), place, layer


def widening(growth: Growth, name: str, place: Place, layer: int | None, *, double: bool = False) -> Widening:
    """How one tensor comes from its source, through the maps of its dims."""
    recipe = growth.recipe
    return Widening(
        name=name,
        source=place.name,
        old_shape=shape(place.arrow, growth.fit.sizes),
        sides=sides(
            growth.fit,
            growth.axes,
            place,
            temperature=1.0 if layer is None else growth.temperatures[layer],
            embedding_scale=growth.embedding,
            silent=layer is not None and growth.layers.silent[layer],
        ),
        fill=recipe.filled,
        noise=recipe.noise,
        seed=recipe.seed,
        offset=_offset(growth.fit)
        if place.roles and place.roles[0].endswith("_norm") and place.kind == "weight"
        else 0.0,
        double=double,
    )


def _tensors(growth: Growth, name: str, place: Place, layer: int | None, dtype: str) -> list[PlannedTensor]:
    """What becomes of one stored tensor; a rotation makes two of a tied embedding."""
    role = place.roles[0]
    new_shape, double = shape(place.arrow, growth.targets.sizes), dtype == "F64"
    if layer is not None and growth.layers.silent[layer] and _falls_silent(growth.fit, place):
        value = -_offset(growth.fit) if role.endswith("_norm") and place.kind == "weight" else 0.0
        return [_constant(name, new_shape, dtype, place.name, value)]
    if growth.rotates and role.endswith("_norm") and role not in HEAD_NORMS:
        return [_rotated_norm(growth, name, place, new_shape, dtype)]
    work = widening(growth, name, place, layer, double=double)
    if growth.rotates and place.kind == "weight":
        found = [_planned(_folded(growth, work, place, role), new_shape, dtype)]
        if growth.fit.tied and role == "embedding":
            roles = growth.fit.family.roles
            head, embedding = (f"{roles[role].name}.weight" for role in ("head", "embedding"))
            if name == head:  # a tied file may keep the one matrix under the head's name
                found = [replace(found[0], name=embedding)]
            found.append(_planned(_untied_head(growth, work, head, place), new_shape, dtype))
        return found
    if all(side.map.plain for side in work.sides):
        return [PlannedTensor(name, new_shape, dtype, place.name)]
    return [_planned(work, new_shape, dtype)]


def _planned(work: Widening, new_shape: tuple[int, ...], dtype: str) -> PlannedTensor:
    assert work.shape == new_shape, f"{work.name}: maps give {work.shape}, the table {new_shape}"
    return PlannedTensor(work.name, new_shape, dtype, work.source, work, work.work)


def _constant(name: str, new_shape: tuple[int, ...], dtype: str, source: str, value: float) -> PlannedTensor:
    def compute(_: Tensors) -> Iterable[torch.Tensor]:
        height = max(1, (1 << 20) // max(1, *new_shape[1:], 1))
        for start in range(0, new_shape[0], height):
            yield torch.full((min(height, new_shape[0] - start), *new_shape[1:]), value)

    return PlannedTensor(name, new_shape, dtype, source, compute, 4 << 20)


def _falls_silent(fit: Fit, place: Place) -> bool:
    """Whether a block writes nothing once this tensor is zero: its last norm, or else its output and down matrices."""
    last = {
        role: post if post in fit.family.roles else role
        for role, post in (("output", "attention_post_norm"), ("down", "ffn_post_norm"))
    }
    return place.roles[0] in last.values()


def _offset(fit: Fit) -> float:
    """What is added to a stored gain before it multiplies."""
    return float(fit.family.rules.get("gain_offset", 0.0))


# --- rotation: gains are folded into the matrices behind them ---------------------------------------------------


def _folded(growth: Growth, work: Widening, place: Place, role: str) -> Widening:
    gain, shift = (named(growth.fit.places, READS_NORM.get(role, ""), kind, place.layer) for kind in ("weight", "bias"))
    return replace(work, gain=gain, gain_offset=_offset(growth.fit), shift=shift)


def _untied_head(growth: Growth, work: Widening, name: str, place: Place) -> Widening:
    """The head that a tied embedding was: it reads the stream, with the final norm's gain folded in."""
    vocab, _ = work.sides
    hidden = replace(work.sides[1], map=growth.axes.hidden, reads=True)
    return _folded(growth, replace(work, name=name, sides=(vocab, hidden)), place, "head")


def _rotated_norm(growth: Growth, name: str, place: Place, new_shape: tuple[int, ...], dtype: str) -> PlannedTensor:
    """Gains become one; a bias becomes the spare direction, which the readers behind it multiply with what it was."""
    if place.kind == "weight":
        return _constant(name, new_shape, dtype, place.name, 1.0 - _offset(growth.fit))
    hidden = growth.axes.hidden
    assert isinstance(hidden, DenseMap) and hidden.extra is not None
    extra = hidden.extra

    def compute(_: Tensors) -> Iterable[torch.Tensor]:
        yield extra

    return PlannedTensor(name, new_shape, dtype, place.name, compute, 8 * new_shape[0])


# --- what to say ------------------------------------------------------------------------------------------


def _notes(growth: Growth) -> list[str]:
    notes = []
    recipe, fit = growth.recipe, growth.fit
    if recipe.filled == "zero" or recipe.noise == 0:
        notes.append(
            "without noise the new coordinates start dead or as exact copies; they may never train (--noise 1)"
        )
    if growth.rotates and fit.tied:
        notes.append("the rotation folds the final norm's gain into the head, so head and embedding are no longer tied")
    if len(growth.layers.source) > fit.sizes["layer"] and recipe.depth != "identity":
        notes.append(f"--depth {recipe.depth} does not keep the function: expect the loss to rise before it falls")
    if without_levels(fit.config) != fit.config:
        notes.append("the models inside of it (nested or fractal) stay behind: new entries are none of theirs")
    if growth.targets.sizes["vocab"] > fit.sizes["vocab"]:
        count, size = growth.targets.sizes["vocab"] - fit.sizes["vocab"], fit.sizes["vocab"]
        notes.append(
            f"{count} new tokens start as the mean token: logits of old tokens are kept, their log-probabilities fall "
            f"by at most log(1 + {count}/{size}); the tokenizer is copied as it is"
        )
    return notes
