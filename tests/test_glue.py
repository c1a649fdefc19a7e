"""Law 6 for glue: it starts as nothing, moves alone, and folds into the linears behind it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from factored import apart, modules_cache, remote  # noqa: F401
from family_zoo import ZOO, make_checkpoint, some_ids
from growing import Source, opened
from merging import made, merged, noisy, sampled, weights_of
from safetensors.torch import save_file
from test_merge import UNLIKE, missed, run
from torch import Tensor

from tlt_cli.calibration import stitch as stitching
from tlt_cli.calibration.stitch import stitch
from tlt_cli.checkpoint.together import together
from tlt_cli.checkpoint.writer import write
from tlt_cli.errors import TltError, UsageError
from tlt_cli.families import fit
from tlt_cli.model.compare import distance
from tlt_cli.model.decoder import Decoder
from tlt_cli.model.grouped import Grouped
from tlt_cli.model.modeling import MODELING, modeling_source
from tlt_cli.surgery import merge as surgery
from tlt_cli.surgery.fold_glue import fold_glue
from tlt_cli.surgery.glue import described, glued, idle, sites
from tlt_cli.surgery.plan import Plan
from tlt_cli.surgery.unmerge import alone, block
from tlt_cli.surgery.verify import planned_decoder

BOUND, BOUND64 = 1e-5, 1e-12  # of the logits' deviation
KL = 1e-4  # nats, in bfloat16
WRONG = 1e-1  # what a wrong variant must miss by
KINDS = {"lowrank": 3, "full": None, "blocks": None}
everywhere = pytest.mark.parametrize("family", ZOO)
both_ways = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
kinds = pytest.mark.parametrize("kind", KINDS)
pytestmark = pytest.mark.usefixtures("modules_cache")


def written(folder: Path, plan: Plan, source: Source | list[Source]) -> Source:
    values = together([one.checkpoint for one in source]) if isinstance(source, list) else source.checkpoint
    write(
        folder, plan.tensors, values, config=plan.config, metadata={"format": "pt"},
        files={MODELING: modeling_source()}, jobs=1,
    )  # fmt: skip
    return opened(folder)


def merge_with_glue(folder: Path, parts: list[Source], kind: str, weights: list[float] | None = None) -> Source:
    sources = [surgery.Source(part.fitted, part.dtypes, part.folder.name, "0" * 64) for part in parts]
    return written(folder, glued(surgery.merge(sources, weights), kind, rank=KINDS[kind]), parts)


def moved(source: Source, size: float = 0.3) -> Source:
    """The same file with glue that does something."""
    generator, tensors = torch.Generator().manual_seed(3), weights_of(source.folder)
    for name, tensor in tensors.items():
        if ".glue" in name:
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            tensors[name] = (size * noise / math.sqrt(tensor.shape[1])).to(tensor.dtype)
    save_file(tensors, source.folder / "model.safetensors", {"format": "pt"})
    return opened(source.folder)


def folded(source: Source) -> Plan:
    return fold_glue(source.fitted, source.dtypes)


def planned(plan: Plan, source: Source, dtype: torch.dtype = torch.float64) -> Decoder:
    return planned_decoder(plan, fit(plan.shapes, plan.config), source.checkpoint, dtype=dtype)


@everywhere
@both_ways
@torch.no_grad()
def test_law_6(tmp_path: Path, family: str, tied: bool) -> None:
    """fold(glue) = glue: in float64, as written in float32, streamed, and by transformers; and it is not the mean."""
    kind = list(KINDS)[(list(ZOO).index(family) + tied) % 3]
    parts = made(tmp_path, family, tied, [{}, {}, {}])
    source = moved(merge_with_glue(tmp_path / "glued", parts, kind, [0.5, 0.3, 0.2]))
    ids, plan = some_ids(), folded(source)
    wanted = run(source.folder, dtype=torch.float64)(ids)
    mean = merged(tmp_path / "merged", parts, [0.5, 0.3, 0.2]).mean()
    assert apart(wanted, mean.double()) >= WRONG, "glue must matter"
    assert apart(planned(plan, source)(ids), wanted) <= BOUND64
    assert apart(run(source.folder, stream=True)(ids).double(), wanted) <= BOUND
    assert apart(remote(source.folder)(ids).logits.double(), wanted) <= BOUND
    one = written(tmp_path / "folded", plan, source)
    assert not any(".glue" in name for name in one.fitted.places)
    for found in (run(one.folder)(ids), run(one.folder, stream=True)(ids), remote(one.folder)(ids).logits):
        assert apart(found.double(), wanted) <= BOUND


@everywhere
@torch.no_grad()
def test_law_6_of_unlike_models(tmp_path: Path, family: str) -> None:
    """What a narrower model lacks stays out: its matrices are zero there, whatever glue brings."""
    parts = made(tmp_path, family, True, UNLIKE[family])
    source = merge_with_glue(tmp_path / "glued", parts, "full")
    assert missed(merged(tmp_path / "merged", parts), run(source.folder)) <= BOUND
    source = moved(source)
    wanted = run(source.folder, dtype=torch.float64)(some_ids())
    assert apart(planned(folded(source), source)(some_ids()), wanted) <= BOUND64


@kinds
@torch.no_grad()
def test_in_bfloat16(tmp_path: Path, kind: str) -> None:
    parts = made(tmp_path, "llama", False, [{"dtype": torch.bfloat16}] * 2)
    source = moved(merge_with_glue(tmp_path / "glued", parts, kind), 0.2)
    one, ids = written(tmp_path / "folded", folded(source), source), some_ids()
    assert {tensor.dtype for tensor in weights_of(one.folder).values()} == {torch.bfloat16}
    assert distance(run(source.folder)(ids), run(one.folder)(ids)).kl <= KL
    mean = merged(tmp_path / "merged", parts).mean()
    assert distance(run(source.folder)(ids), mean).kl >= 10 * KL


@everywhere
@kinds
@torch.no_grad()
def test_it_starts_as_nothing(tmp_path: Path, family: str, kind: str) -> None:
    """The logits are those of the merge without glue, bit for bit, and each model can still be taken out."""
    parts = made(tmp_path, family, False, [{}, {}])
    source, plain = merge_with_glue(tmp_path / "glued", parts, kind), merged(tmp_path / "merged", parts)
    assert torch.equal(run(source.folder)(some_ids()), run(plain.folder)(some_ids()))
    assert idle(source.checkpoint.read, source.fitted.places)
    first = alone(source.checkpoint, source.fitted, 1, torch.float32, torch.device("cpu"))
    assert torch.equal(first(some_ids()), run(parts[1].folder)(some_ids()))
    after = moved(source)
    assert not idle(after.checkpoint.read, after.fitted.places)
    with pytest.raises(TltError, match="glued together; taking one out"):
        block(after.fitted, after.dtypes, 0)
    with pytest.raises(TltError, match="glued together; merging"):
        surgery.merge([surgery.Source(after.fitted, after.dtypes, "one", "0" * 64)] * 2)
    one = written(tmp_path / "folded", folded(after), after)
    with pytest.raises(TltError, match="folded into one another; taking one out"):
        block(one.fitted, one.dtypes, 0)


@everywhere
@torch.no_grad()
def test_a_part_alone_is_streamed(tmp_path: Path, family: str) -> None:
    """As it is in memory, with none of it held; narrower parts too."""
    parts = made(tmp_path, family, True, UNLIKE[family])
    source, device = merge_with_glue(tmp_path / "glued", parts, "full"), torch.device("cpu")
    for number, part in enumerate(parts):
        found = alone(source.checkpoint, source.fitted, number, torch.float32, device, stream=True)
        assert all(tensor.is_meta for tensor in found.stored.values())
        assert apart(found(some_ids()), run(part.folder)(some_ids())) <= BOUND


def step(decoder: Decoder, only: str = "") -> dict[str, float]:
    """The largest gradient of every parameter whose name has `only` in it."""
    for name, parameter in decoder.named_parameters():
        parameter.requires_grad_(only in name)
    ids = some_ids()
    torch.nn.functional.cross_entropy(decoder(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()).backward()
    return {name: float(p.grad.abs().max()) for name, p in decoder.named_parameters() if p.grad is not None}


@everywhere
@both_ways
@kinds
def test_every_glue_learns(tmp_path: Path, family: str, tied: bool, kind: str) -> None:
    """No site is dead: what starts at zero has a gradient at once, and the rest of the glue when that has moved."""
    source = merge_with_glue(tmp_path / "glued", made(tmp_path, family, tied, [{}, {}]), kind)
    names = {name for name in source.fitted.places if ".glue" in name}
    found = step(run(source.folder), ".glue")
    assert found.keys() == names and all(found[name] > 0 for name in names if "glue_a" not in name)
    assert not any(found[name] for name in names if "glue_a" in name), "nothing reads it yet"
    assert all(size > 0 for size in step(run(moved(source).folder), ".glue").values())
    heads = {name for name in names if "layers" not in name and ".h." not in name}
    assert bool(heads) == (run(source.folder).description["final_softcap"] is None)


# --- what fails ------------------------------------------------------------------------------------------------


class _Behind(Grouped):
    """Glue behind a linear, where it was in front."""

    def _matrix(self, x: Tensor, role: str, layer: int, inner: dict[str, Tensor] | None) -> Tensor:
        spot = self.description["roles"][role]
        if role not in ("query", "output"):
            return super()._matrix(x, role, layer, inner)
        name, self.description = spot["name"], without(self.description, spot["name"])
        y = super()._matrix(x, role, layer, None)
        self.description = {**self.description, "groups": {**self.description["groups"], "glue": self.kept}}
        return self._glued(y, name, layer)

    @property
    def kept(self) -> dict[str, Any]:
        return {**self._glue, "sites": [*self._glue["sites"], *missing(self)]}


def missing(decoder: Decoder) -> list[str]:
    here = decoder.description["groups"]["glue"]["sites"]
    roles = ("query", "output")
    return [spot for role in roles if (spot := decoder.description["roles"][role]["name"]) not in here]


def without(description: dict[str, Any], site: str) -> dict[str, Any]:
    glue = description["groups"]["glue"]
    left = [one for one in glue["sites"] if one != site]
    return {**description, "groups": {**description["groups"], "glue": {**glue, "sites": left}}}


class _BeforeTheNorm(Grouped):
    """Glue on the residual stream, in front of the norm of each part."""

    def normalize(self, x: Tensor, role: str, layer: int = 0) -> Tensor:
        if role != "attention_norm":
            return super().normalize(x, role, layer)
        return super().normalize(self._glued(x, self.description["roles"]["query"]["name"], layer), role, layer)

    def _matrix(self, x: Tensor, role: str, layer: int, inner: dict[str, Tensor] | None) -> Tensor:
        if role not in ("query", "key", "value"):
            return super()._matrix(x, role, layer, inner)
        whole = self.description
        for one in ("query", "key", "value"):
            self.description = without(self.description, self.description["roles"][one]["name"])
        y = super()._matrix(x, role, layer, None)
        self.description = whole
        return y


class _NoWeights(Grouped):
    """A head into which glue was folded and the weights of the parts were not."""

    def _dense_head(self, x: Tensor, *more: Any) -> Tensor:
        return super()._dense_head(x, *more) * self.count


@pytest.mark.parametrize("kind", [_Behind, _BeforeTheNorm], ids=lambda value: value.__name__)
@torch.no_grad()
def test_glue_elsewhere_is_other_glue(tmp_path: Path, kind: type[Grouped]) -> None:
    source = moved(merge_with_glue(tmp_path / "glued", made(tmp_path, "llama", False, [{}, {}]), "full"))
    right, ids = run(source.folder, dtype=torch.float64), some_ids()
    wrong = kind(right.description, dtype=torch.float64)
    wrong.load_state_dict(right.state_dict())
    found = planned(folded(source), source)(ids)
    assert apart(found, right(ids)) <= BOUND64 and apart(found, wrong(ids)) >= WRONG


@torch.no_grad()
def test_wrong_folds_miss_by_far(tmp_path: Path) -> None:
    """G W in the place of W G, float32 in the place of float64, the weights left out, one G^T."""
    source = moved(merge_with_glue(tmp_path / "glued", made(tmp_path, "llama", False, [{}, {}]), "full"))
    ids, plan = some_ids(), folded(source)
    wanted = run(source.folder, dtype=torch.float64)(ids)
    right = planned(plan, source)
    assert apart(right(ids), wanted) <= BOUND64
    name = "model.layers.1.self_attn.o_proj"
    stored, glue = (source.checkpoint.read(f"{name}{end}.weight").double() for end in ("", ".glue"))
    linear, whole = torch.block_diag(*stored), torch.eye(len(glue)) + glue
    for wrong in (whole @ linear, linear @ whole.T, linear):
        decoder = planned(changed(plan, f"{name}.weight", wrong), source)
        assert apart(decoder(ids), wanted) >= WRONG
    same = planned(changed(plan, f"{name}.weight", linear @ whole), source)
    assert apart(same(ids), wanted) <= BOUND64
    coarse = planned(changed(plan, f"{name}.weight", (linear @ whole).float()), source)
    assert apart(coarse(ids), wanted) >= 100 * BOUND64
    decoder = _NoWeights(right.description)
    decoder.load_state_dict(weights_of(written(tmp_path / "folded", plan, source).folder))
    assert apart(decoder(ids).double(), wanted) >= WRONG


def changed(plan: Plan, name: str, value: Tensor) -> Plan:
    def compute(_: Any) -> Iterator[Tensor]:
        yield value

    return replace(plan, tensors=tuple(replace(t, compute=compute) if t.name == name else t for t in plan.tensors))


# --- what is said of it ----------------------------------------------------------------------------------------


def test_a_tied_head_becomes_its_own(tmp_path: Path) -> None:
    source = moved(merge_with_glue(tmp_path / "glued", made(tmp_path, "llama", True, [{}, {}]), "lowrank"))
    plan = folded(source)
    assert source.fitted.tied and plan.config["tie_word_embeddings"] is False and plan.shapes["lm_head.weight"]
    assert "matrix of its own" in plan.notes[0]
    capped = made(tmp_path / "capped", "gemma2", True, [{"final_logit_softcapping": 1.0}] * 2)
    plan = folded(moved(merge_with_glue(tmp_path / "glued2", capped, "lowrank")))
    assert plan.config["tie_word_embeddings"] is True and "lm_head.weight" not in plan.shapes


def test_what_is_said_of_sites(tmp_path: Path) -> None:
    """As many as there are linears that read, and why there are none elsewhere."""
    known = {"llama": (8, []), "gpt2": (5, []), "qwen3": (8, ["q_norm"]), "gemma2": (7, ["post_", "capped"])}
    for family, (count, reasons) in known.items():
        source = merge_with_glue(
            tmp_path / family / "glued", made(tmp_path / family, family, False, [{}, {}]), "lowrank"
        )
        found = described(source.fitted)
        assert len(sites(source.fitted)) == sum(site["folds"] for site in found) == count
        text = json.dumps([site for site in found if not site["folds"]])
        assert all(reason in text for reason in (*reasons, "residual stream"))


@pytest.mark.parametrize(
    ("glue", "match"),
    [
        ([], "groups.glue must be an object"),
        ({"kind": "paste", "sites": ["a"]}, "one of lowrank, full, blocks"),
        ({"kind": "lowrank", "sites": ["lm_head"]}, "a whole number, with lowrank alone, not None"),
        ({"kind": "full", "rank": 3, "sites": ["lm_head"]}, "a whole number, with lowrank alone"),
        ({"kind": "lowrank", "rank": 3, "sites": []}, "a list of modules' names"),
        ({"kind": "lowrank", "rank": 3, "sites": ["lm_head"]}, "no such glue"),
        ({"kind": "lowrank", "rank": 2}, "a list of modules' names"),
        (None, "no such glue"),
    ],
)
def test_config_that_says_it_wrongly(tmp_path: Path, glue: Any, match: str) -> None:
    source = merge_with_glue(tmp_path / "glued", made(tmp_path, "llama", False, [{}, {}]), "lowrank")
    config = json.loads((source.folder / "config.json").read_text())
    config["groups"]["glue"] = glue
    (source.folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(TltError, match=match):
        opened(source.folder)


def test_glue_that_is_missing_or_of_another_shape(tmp_path: Path) -> None:
    source = merge_with_glue(tmp_path / "glued", made(tmp_path, "llama", False, [{}, {}]), "lowrank")
    tensors, name = weights_of(source.folder), "model.layers.2.mlp.up_proj.glue_b.weight"
    for value, match in ((None, f"{name} is missing"), (torch.zeros(64, 4), "part hidden.* = .64, 3.")):
        kept = {**tensors, name: value} if value is not None else {n: t for n, t in tensors.items() if n != name}
        save_file(kept, source.folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(TltError, match=match):
            opened(source.folder)


def test_ranks_and_kinds_that_cannot_be(tmp_path: Path) -> None:
    parts = made(tmp_path, "llama", False, [{}, {}])
    plan = surgery.merge([surgery.Source(part.fitted, part.dtypes, part.folder.name, "0" * 64) for part in parts])
    for kind, rank, match in (
        ("lowrank", 65, "more than the 64"),
        ("full", 2, "goes with"),
        ("paste", None, "not known"),
    ):
        with pytest.raises(UsageError, match=match):
            glued(plan, kind, rank=rank)
    assert glued(plan, "none") is plan
    with pytest.raises(TltError, match="no glue"):
        fold_glue(parts[0].fitted, parts[0].dtypes)


# --- a start by least squares ----------------------------------------------------------------------------------


@kinds
@torch.no_grad()
def test_stitching_alike_models(tmp_path: Path, kind: str) -> None:
    """Two copies predict each other exactly: full stitching changes nothing there, and shares are all alike."""
    part = made(tmp_path, "llama", False, [{}])
    source = merge_with_glue(tmp_path / "glued", part * 2, kind)
    decoder, ids = run(source.folder), some_ids(batch=8, length=32)
    assert isinstance(decoder, Grouped)
    found = stitch(decoder, ids)
    assert found.losses[found.share] == min(found.losses.values())
    if kind == "full":
        assert max(found.losses.values()) - found.losses[0.0] <= 1e-2
    with pytest.raises(TltError, match="needs 4"):
        stitch(decoder, ids[:3])


@kinds
@torch.no_grad()
def test_stitching_takes_the_measure_that_loses_least(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Worse copies of a model read what it says: each learns from the others. Of maps whose rows are mixed up none
    helps. What is read alike is measured and solved once."""
    clean = opened(make_checkpoint(tmp_path / "clean", "llama", False))
    source = merge_with_glue(tmp_path / "glued", noisy(clean, tmp_path), kind)
    ids, solved, plain = sampled(clean, 48, 32, (0, 97)), list[int](), stitching._difference

    def counting(moment: Tensor, count: int) -> Tensor:
        solved.append(len(moment))
        return plain(moment, count)

    def mixed_up(moment: Tensor, count: int) -> Tensor:
        rows = torch.randperm(len(moment), generator=torch.Generator().manual_seed(1))
        return plain(moment, count)[rows]

    gains = []
    for difference in (counting, mixed_up):
        decoder = run(source.folder)
        assert isinstance(decoder, Grouped)
        monkeypatch.setattr(stitching, "_difference", difference)
        found = stitch(decoder, ids)
        assert found.losses.keys() == {0.0, 0.05, 0.1, 0.2, 0.4, 0.7, 1.0}
        assert found.losses[found.share] == min(found.losses.values())
        assert (found.starts is None) == (found.share == 0.0)
        gains.append(found.losses[0.0] - found.losses[found.share])
        if difference is counting:
            assert found.share > 0 and found.starts is not None
            names = {name for name in source.fitted.places if ".glue" in name}
            assert {f"{module}.{name}.weight" for module, tensors in found.starts.items() for name in tensors} == names
    assert gains[0] >= 0.03 and gains[1] <= 0.003, gains
    assert len(solved) == 4 * 3 + 1


def test_stitching_of_what_memory_does_not_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = merge_with_glue(tmp_path / "glued", made(tmp_path, "llama", False, [{}, {}]), "blocks")
    decoder = run(source.folder)
    assert isinstance(decoder, Grouped)
    whole = 8 * (3 * (3 * 64**2 + 96**2) + 64**2)  # three layers of four inputs each, and the head's
    monkeypatch.setattr(stitching, "_MOST_BYTES", whole)
    stitch(decoder, some_ids(batch=4))
    monkeypatch.setattr(stitching, "_MOST_BYTES", whole - 1)
    with pytest.raises(TltError, match="start from the identity"):
        stitch(decoder, some_ids(batch=4))
