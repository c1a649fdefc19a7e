"""Weights and AdamW's state grown together: an evenly doubled model repeats the small model's next losses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from family_zoo import ZOO, make_checkpoint
from growing import Source, opened, planned
from safetensors.torch import load_file, save_file
from torch.nn import functional

from tlt_cli.checkpoint.reader import open_checkpoint
from tlt_cli.checkpoint.writer import write
from tlt_cli.errors import TltError, UsageError
from tlt_cli.model.decoder import Decoder
from tlt_cli.model.weights import load_checkpoint
from tlt_cli.surgery.grow import Recipe
from tlt_cli.surgery.optimizer import STATE, advice, grow_moments

RATE, DECAY, EPSILON, STEPS = 3e-3, 0.1, 1e-8, 120
EVEN = Recipe(noise=0.0)
Advice = dict[str, dict[str, Any]]


def optimizer_for(decoder: Decoder, told: Advice | None = None, state: dict[str, torch.Tensor] | None = None) -> Any:
    groups, offset = [], decoder.description["gain_offset"]
    for name, parameter in decoder.named_parameters():
        factor = told[name] if told is not None else {"lr": 1.0, "weight_decay": 1.0, "eps": 1.0}
        # decay pulls a gain stored as 1 + w to 1, whatever it was scaled by: such gains are not decayed
        decay = 0.0 if offset and parameter.dim() == 1 else DECAY
        groups.append(
            {
                "params": [parameter],
                "lr": RATE * factor["lr"],
                "weight_decay": decay * factor["weight_decay"],
                "eps": EPSILON * factor["eps"],
            }
        )
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), foreach=False)
    for name, parameter in decoder.named_parameters() if state else ():
        moments = {moment: state[f"{name}.{moment}"].clone() for moment in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {"step": state["step"].clone(), **moments}
    return optimizer


def steps(decoder: Decoder, optimizer: Any, first: int, count: int) -> list[float]:
    losses = []
    for step in range(first, first + count):
        ids = torch.randint(0, 97, (2, 16), generator=torch.Generator().manual_seed(step))
        logits = decoder(ids)[:, :-1]
        loss = functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def trained(folder: Path, family: str, tied: bool) -> tuple[Source, list[float]]:
    """A float64 checkpoint after ten steps with its optimizer's state, and its losses of the steps that follow."""
    source = opened(make_checkpoint(folder, family, tied, dtype=torch.float64))
    decoder = load_checkpoint(source.checkpoint, source.fitted, dtype=torch.float64)
    optimizer = optimizer_for(decoder)
    steps(decoder, optimizer, 0, 10)
    save_file({name: p.detach().clone() for name, p in decoder.named_parameters()}, folder / "model.safetensors")
    moments = {
        f"{name}.{moment}": optimizer.state[parameter][moment]
        for name, parameter in decoder.named_parameters()
        for moment in ("exp_avg", "exp_avg_sq")
    }
    save_file({**moments, "step": torch.tensor(10.0)}, folder / STATE)
    return opened(folder), steps(decoder, optimizer, 10, STEPS)


def continued(
    source: Source, out: Path, *, told: Advice | None = None, forget: str = "", recipe: Recipe = EVEN
) -> list[float]:
    """The doubled model's losses on the same batches; `forget` leaves a moment as the small model had it."""
    dim = 2 * source.fitted.sizes["hidden"]
    growth, plan = planned(source, recipe, dim=dim)
    moments = grow_moments(growth, open_checkpoint(source.folder / STATE))
    tensors = (*plan.tensors, *moments)
    write(out, tensors, source.checkpoint, config=plan.config, metadata={"format": "pt"}, force=True)
    state = load_file(out / STATE)
    if forget:
        state = {name: value * (2 if name.endswith(forget) else 1) for name, value in state.items()}
    grown = opened(out)
    decoder = load_checkpoint(grown.checkpoint, grown.fitted, dtype=torch.float64)
    told = advice(growth) if told is None else told
    return steps(decoder, optimizer_for(decoder, told, state), 10, STEPS)


def apart(first: list[float], second: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("family", ZOO)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_an_evenly_doubled_model_repeats_the_losses(tmp_path: Path, family: str, tied: bool) -> None:
    source, losses = trained(tmp_path / "small", family, tied)
    assert apart(losses, continued(source, tmp_path / "grown")) <= 1e-10
    assert losses[-1] != losses[0]


def test_each_part_of_the_rule_is_needed(tmp_path: Path) -> None:
    source, losses = trained(tmp_path / "small", "llama", False)
    growth, _ = planned(source, EVEN, dim=64)
    told = advice(growth)
    for key in ("lr", "weight_decay"):
        wrong = {name: {**factors, key: 1.0} for name, factors in told.items()}
        assert apart(losses, continued(source, tmp_path / "grown", told=wrong)) > 1e-6, key
    for moment in ("exp_avg", "exp_avg_sq"):
        assert apart(losses, continued(source, tmp_path / "grown", forget=moment)) > 1e-4, moment
    assert apart(losses, continued(source, tmp_path / "grown", recipe=Recipe(noise=0.3))) > 1e-6


def test_the_advice_is_the_published_table(tmp_path: Path) -> None:
    for tied in (True, False):
        source = opened(make_checkpoint(tmp_path / str(tied), "llama", tied))
        told = advice(planned(source, EVEN, dim=64)[0])
        half = {"lr": 0.5, "weight_decay": 2.0, "uniform": True}
        assert told["model.layers.0.self_attn.q_proj.weight"] == {**half, "eps": 0.5}
        assert told["model.layers.0.mlp.down_proj.weight"] == {**half, "eps": 0.5}
        assert told["model.embed_tokens.weight"]["lr"] == 1.0 and told["model.embed_tokens.weight"]["eps"] == 0.5
        last = told["model.norm.weight" if tied else "lm_head.weight"]
        assert last == {**half, "eps": 1.0}
        uneven = advice(planned(source, EVEN, dim=40)[0])
        assert not uneven["model.layers.0.self_attn.q_proj.weight"]["uniform"]


def test_fresh_second_moments_are_the_mean(tmp_path: Path) -> None:
    source, _ = trained(tmp_path / "small", "llama", False)
    growth, plan = planned(source, Recipe(method="identity"), dim=64, ffn=100)
    tensors = (*plan.tensors, *grow_moments(growth, open_checkpoint(source.folder / STATE)))
    write(tmp_path / "grown", tensors, source.checkpoint, config=plan.config, metadata={"format": "pt"})
    old, new = load_file(source.folder / STATE), load_file(tmp_path / "grown" / STATE)
    name = "model.layers.0.mlp.gate_proj.weight"
    assert new[f"{name}.exp_avg"][48:].abs().max() == 0 and new[f"{name}.exp_avg"][:, 32:].abs().max() == 0
    assert torch.allclose(new[f"{name}.exp_avg_sq"][48:], old[f"{name}.exp_avg_sq"].mean())
    assert torch.allclose(new[f"{name}.exp_avg_sq"][:, 32:], old[f"{name}.exp_avg_sq"].mean())
    assert float(new["step"]) == 10


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    source, _ = trained(tmp_path / "small", "llama", False)
    growth, _ = planned(source, EVEN, dim=64)
    state = load_file(source.folder / STATE)
    del state["model.norm.weight.exp_avg_sq"]
    save_file(state, tmp_path / STATE)
    with pytest.raises(TltError, match=r"has no model\.norm\.weight\.exp_avg_sq"):
        grow_moments(growth, open_checkpoint(tmp_path / STATE))
    save_file({**state, "model.norm.weight.exp_avg_sq": torch.zeros(31)}, tmp_path / STATE)
    with pytest.raises(TltError, match=r"is \[31\], but the parameter \[32\]"):
        grow_moments(growth, open_checkpoint(tmp_path / STATE))
    with pytest.raises(UsageError, match="rotate"):
        grow_moments(planned(source, Recipe(method="rotate"), dim=64)[0], open_checkpoint(source.folder / STATE))


def test_the_command_writes_state_and_advice(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from tlt_cli.cli import app

    source, _ = trained(tmp_path / "small", "llama", False)
    words = ["grow", str(source.folder), "--to-dim", "64", "--optimizer-state", str(source.folder)]
    result = CliRunner().invoke(app, [*words, "-o", str(tmp_path / "big"), "--json"])
    assert result.exit_code == 0, result.output
    told = json.loads((tmp_path / "big" / "optimizer.json").read_text())
    assert told == json.loads(result.stdout)["optimizer"]["advice"]
    assert load_file(tmp_path / "big" / STATE)["model.norm.weight.exp_avg"].shape == (64,)
    assert opened(tmp_path / "big").fitted.sizes["hidden"] == 64
    refused = CliRunner().invoke(app, [*words, "-o", str(tmp_path / "big.safetensors")])
    assert refused.exit_code == 2 and "folder" in refused.stderr
