"""A LoRA computes what PEFT's computes, forwards and backwards, and starts as PEFT's starts."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from adapting import BOUND, WRONG, decoder_of, far, lora_beside, peft_around, with_weights
from family_zoo import ZOO, make_checkpoint, some_ids
from torch import Tensor
from torch.nn import functional

from tlt_cli.errors import TltError
from tlt_cli.model.lora import Lora, LowRankUpdate, updates
from tlt_cli.model.sites import Site

everywhere = pytest.mark.parametrize("family", ZOO)


def loss_of(logits: Tensor, ids: Tensor) -> Tensor:
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def backwards(loss: Tensor) -> None:
    loss.backward()  # type: ignore[no-untyped-call]


def gradients(lora: Lora) -> dict[str, tuple[Tensor, Tensor]]:
    """By module, the gradients of A and B."""
    with torch.no_grad():
        for value in lora.parameters():
            assert value.grad is not None
            value.copy_(value.grad)
    return {site.module: (a, b) for site, _, a, b in lora.matrices()}


@everywhere
@pytest.mark.parametrize("rslora", [False, True], ids=["plain", "rslora"])
def test_same_function_and_gradients_as_peft(tmp_path: Path, family: str, rslora: bool) -> None:
    folder, ids = make_checkpoint(tmp_path, family), some_ids()
    model = peft_around(folder, lora_alpha=12, use_rslora=rslora)
    expected = model(ids).logits
    backwards(loss_of(expected, ids))
    decoder = decoder_of(folder)
    plain = decoder(ids)
    lora = Lora(decoder, updates(decoder, rank=4, alpha=12, rslora=rslora), dtype=torch.float64)
    decoder.adapter = with_weights(lora, model.state_dict())
    logits = decoder(ids)
    assert far(plain, expected) > WRONG, "the adapter is too quiet to tell anything"
    assert far(logits, expected) < BOUND
    backwards(loss_of(logits, ids))
    named = dict(model.named_parameters())
    for module, both in gradients(lora).items():
        for side, found in zip("AB", both, strict=True):
            wanted = named[f"base_model.model.{module}.lora_{side}.default.weight"].grad
            assert far(found, wanted) < BOUND, (module, side)


def test_well_known_mistakes_are_seen(tmp_path: Path) -> None:
    """alpha over r for rsLoRA, and a fused B whose chunks changed places, are far from PEFT."""
    folder, ids = make_checkpoint(tmp_path, "gpt2"), some_ids()
    model = peft_around(folder, lora_alpha=12, use_rslora=True)
    expected, decoder = model(ids).logits, decoder_of(folder)
    wrong = Lora(decoder, updates(decoder, rank=4, alpha=12), dtype=torch.float64)
    decoder.adapter = with_weights(wrong, model.state_dict())
    assert far(decoder(ids), expected) > WRONG
    lora = Lora(decoder, updates(decoder, rank=4, alpha=12, rslora=True), dtype=torch.float64)
    decoder.adapter = with_weights(lora, model.state_dict())
    assert far(decoder(ids), expected) < BOUND
    for site, _, a, b in lora.matrices():
        if len(site.roles) == 3:
            lora.set(site.module, a, b.roll(len(b) // 3, 0))
    assert far(decoder(ids), expected) > WRONG


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_some_modules_with_ranks_of_their_own(tmp_path: Path, family: str) -> None:
    folder, ids = make_checkpoint(tmp_path, family), some_ids()
    modules = ["c_attn", "mlp.c_proj"] if family == "gpt2" else ["q_proj", "v_proj", "down_proj"]
    model = peft_around(
        folder, target_modules=modules, r=3, lora_alpha=6, rank_pattern={modules[0]: 5}, alpha_pattern={modules[1]: 7}
    )
    decoder = decoder_of(folder)
    chosen = updates(decoder, rank=3, alpha=6, targets=modules, ranks={modules[0]: 5}, alphas={modules[1]: 7})
    decoder.adapter = with_weights(Lora(decoder, chosen, dtype=torch.float64), model.state_dict())
    assert far(decoder(ids), model(ids).logits) < BOUND
    assert {update.scale for update in chosen.values()} == {6 / 5, 7 / 3, 6 / 3} - (
        {2.0} if family == "gpt2" else set()
    )


def test_nothing_changes_at_the_start(tmp_path: Path) -> None:
    """B is zero; A is uniform as PEFT's, the same for the same seed and no other."""
    decoder, ids = decoder_of(make_checkpoint(tmp_path, "llama"), torch.float32), some_ids()
    plain = decoder(ids)

    def drawn(seed: int) -> Lora:
        return Lora(decoder, updates(decoder, rank=16), generator=torch.Generator().manual_seed(seed))

    decoder.adapter = first = drawn(0)
    assert torch.equal(decoder(ids), plain)
    for site, update, a, b in first.matrices():
        bound = 1 / math.sqrt(site.inputs)
        assert not b.any()
        assert 0.9 * bound < float(a.abs().max()) <= bound
        assert update.scale == 2
    assert all(torch.equal(one, other) for one, other in zip(first.parameters(), drawn(0).parameters(), strict=True))
    assert not torch.equal(next(first.parameters()), next(drawn(1).parameters()))
    assert not any(name.startswith("adapter") for name, _ in decoder.named_parameters())


def test_a_module_alone_is_what_it_is_among_its_neighbours(tmp_path: Path) -> None:
    """What query, key and value share is made of the input at hand: not of one that an unfinished pass has left."""
    decoder = decoder_of(make_checkpoint(tmp_path, "llama"))
    lora = lora_beside(decoder)
    products = {site.module: (update.scale * b @ a, site) for site, update, a, b in lora.matrices()}

    def check(x: Tensor, y: Tensor, module: str) -> None:
        product, site = products[module]
        assert torch.allclose(lora.add(y, x, site.roles[0], site.layer), y + x @ product.T)

    sites: list[Site] = [site for _, site in products.values() if site.layer == 0]
    for order in (sites, sites[::-1], [sites[1], sites[0], sites[1], sites[4], sites[2]]):
        for site in order:
            check(torch.randn(2, 5, site.inputs).double(), torch.randn(2, 5, site.outputs[0]).double(), site.module)
    shared = torch.randn(2, 5, sites[0].inputs).double()
    for site in (*sites[:3], sites[0], sites[1]):
        check(shared, torch.randn(2, 5, site.outputs[0]).double(), site.module)


def test_recomputed_blocks_have_the_same_gradients(tmp_path: Path) -> None:
    folder, ids = make_checkpoint(tmp_path, "llama"), some_ids()
    decoder = decoder_of(folder)
    found = []
    for recompute in (False, True):
        decoder.adapter = lora = lora_beside(decoder)
        step = decoder.begin(ids.shape[1])
        x = decoder.embed(ids, step)
        lora.begin(x, step)
        for layer in range(3):
            if recompute:
                x = torch.utils.checkpoint.checkpoint(decoder.block, x, layer, step, use_reentrant=False)
            else:
                x = decoder.block(x, layer, step)
        backwards(loss_of(decoder.logits(x), ids))
        found.append([parameter.grad for parameter in lora.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_decoder_and_adapter_are_one_graph(tmp_path: Path) -> None:
    """torch.compile meets nothing that breaks its graph, and leaves nothing of a pass behind in the adapter."""
    decoder, ids = decoder_of(make_checkpoint(tmp_path, "llama")), some_ids()
    decoder.adapter = lora_beside(decoder)
    expected = decoder(ids)
    compiled = torch.compile(decoder, backend="eager", fullgraph=True)
    for _ in range(2):
        assert far(compiled(ids), expected) < 1e-12


def test_what_updates_refuse(tmp_path: Path) -> None:
    decoder = decoder_of(make_checkpoint(tmp_path, "llama"))
    with pytest.raises(TltError, match=r"no linear layer of a block is named 'q_prj' \(did you mean 'q_proj'\?\)"):
        updates(decoder, targets=["q_prj"])
    with pytest.raises(TltError, match="is named 'v_proj'"):
        updates(decoder, targets=["q_proj"], ranks={"v_proj": 2})
    with pytest.raises(TltError, match=r"LoRA of rank 40 for model.layers.0.self_attn.q_proj: wanted .* 1 to 32"):
        updates(decoder, rank=40)
    with pytest.raises(TltError, match="changes nothing"):
        updates(decoder, rank=0)
    assert updates(decoder, targets=["layers.1.*"], ranks={"up_proj": 0}).keys() == {
        f"model.layers.1.{name}"
        for name in (
            "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj",
            "mlp.down_proj",
        )
    }  # fmt: skip
    assert updates(decoder, rank=4, rslora=True)["model.layers.0.mlp.up_proj"] == LowRankUpdate(4, 8.0, True)
    assert LowRankUpdate(4, 8.0, True).scale == 4
