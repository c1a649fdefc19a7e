"""The training loop learns, is deterministic, and counts what it costs; new models have just their family's tensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from family_zoo import ZOO, make_checkpoint, some_ids, stock_logits

from tlt_cli.checkpoint.reader import open_checkpoint
from tlt_cli.errors import TltError
from tlt_cli.families import fit
from tlt_cli.model.decoder import Decoder
from tlt_cli.model.perplexity import perplexity
from tlt_cli.training.loop import draw, held_out, rate, train, training_flops
from tlt_cli.training.saving import save
from tlt_cli.training.start import blank, new_decoder

CONFIG = ZOO["llama"](vocab_size=32, num_hidden_layers=1, architectures=["LlamaForCausalLM"]).to_dict()


def pattern(length: int = 600) -> torch.Tensor:
    """A text with a rule to learn: each token is the one before it plus 3."""
    return torch.arange(length) * 3 % 32


def some_decoder(seed: int = 0) -> Decoder:
    return new_decoder(blank(CONFIG), seed=seed)


def learn(decoder: Decoder, ids: torch.Tensor, **options: Any) -> list[float]:
    return train(decoder, ids, **{"steps": 40, "batch": 4, "context": 16, "learning_rate": 1e-2, **options})


def test_it_learns_what_there_is_to_learn() -> None:
    """The loss falls on a rule and, the negative control, not on noise that is never seen twice."""
    noise = torch.randint(0, 32, (20_000,), generator=torch.Generator().manual_seed(0))
    learned, guessed = some_decoder(), some_decoder()
    losses = learn(learned, pattern())
    learn(guessed, noise[:10_000])
    assert losses[0] == pytest.approx(3.47, abs=0.1)  # log 32: a start that favours nothing
    assert losses[-1] < 0.5 and held_out(learned, pattern()[64:], context=16) < 0.5
    assert held_out(guessed, noise[10_000:], context=16) > 3.4


def test_a_seed_is_a_run() -> None:
    runs = [learn(some_decoder(), pattern(), steps=6, seed=seed) for seed in (1, 1, 2)]
    assert runs[0] == runs[1] and runs[0] != runs[2]


def test_models_of_one_seed_see_the_same_windows() -> None:
    ids = torch.arange(500)
    first, again, other = (draw(ids, 3, 8, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(first - first[:, :1], torch.arange(8).expand(3, 8))  # each row is contiguous
    edge = draw(torch.arange(8), 3, 8, torch.Generator())
    assert torch.equal(edge, torch.arange(8).expand(3, 8))


def test_the_rate_rises_and_falls_to_zero() -> None:
    rates = [rate(step, 100, 10) for step in range(100)]
    assert rates[9] == 1.0 and rates[0] == pytest.approx(0.1) and rates[99] == pytest.approx(1 / 90)
    assert rates[:10] == sorted(rates[:10]) and rates[9:] == sorted(rates[9:], reverse=True)
    assert [rate(step, 2, 4) for step in range(2)] == [0.25, 0.5]  # stopped while still warming up


def test_only_matrices_decay() -> None:
    """Where no gradient arrives decay alone moves weights: the matrices', not the gains'."""
    decoder = some_decoder()
    before = {name: p.detach().clone() for name, p in decoder.named_parameters()}
    query, gain = "model.layers.0.self_attn.q_proj.weight", "model.norm.weight"

    def moved(decay: float) -> dict[str, float]:
        model = some_decoder()
        with torch.no_grad():
            model.weight("lm_head.weight").zero_()  # nothing behind it gets a gradient in the first step
        learn(model, pattern(), steps=1, weight_decay=decay, warm_up=1)
        return {name: float((p.detach() - before[name]).norm()) for name, p in model.named_parameters()}

    assert moved(0.5)[query] == pytest.approx(float(before[query].norm()) * 0.5 * 1e-2, rel=1e-3)
    assert moved(0.5)[gain] == 0 and moved(0.0)[query] == 0


def test_callbacks_see_every_step() -> None:
    done: list[tuple[int, int]] = []
    logged: list[tuple[int, float]] = []
    losses = learn(
        some_decoder(), pattern(), steps=3,
        progress=lambda *now: done.append(now), log=lambda *now: logged.append(now),
    )  # fmt: skip
    assert done == [(1, 3), (2, 3), (3, 3)] and logged == list(enumerate(losses))


def test_what_is_refused() -> None:
    with pytest.raises(TltError, match="10 tokens, less than one window of 16"):
        learn(some_decoder(), pattern(10))
    broken = some_decoder()
    with torch.no_grad():
        broken.weight("model.norm.weight").fill_(float("nan"))
    with pytest.raises(TltError, match="the loss is nan at step 0"):
        learn(broken, pattern())


def test_held_out_is_what_eval_calls_nll() -> None:
    decoder = some_decoder()
    assert held_out(decoder, pattern(100), context=16) == perplexity(decoder, pattern(100), 16)["nll"]


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_flops_are_those_of_the_multiplications(tied: bool) -> None:
    """Against torch's own counter, which sees every matrix product, forward and backward, but not inside attention."""
    from torch.utils.flop_counter import FlopCounterMode

    decoder, context = new_decoder(blank({**CONFIG, "tie_word_embeddings": tied})), 8
    with FlopCounterMode(display=False) as counter:
        ids = some_ids(32, 1, context)
        decoder(ids).sum().backward()
    data = decoder.description
    attended = data["layers"] * data["heads"] * data["head_dim"] * context * context
    counted = training_flops(decoder, context, context=context)
    assert counter.get_total_flops() == counted - 6 * attended
    assert training_flops(decoder, context, context=2 * context) == counted + 6 * attended


@pytest.mark.parametrize("family", ZOO)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_new_model_has_what_its_file_would_have(tmp_path: Path, family: str, tied: bool) -> None:
    made = open_checkpoint(make_checkpoint(tmp_path / "made", family, tied))
    assert made.config is not None
    stored = fit({name: info.shape for name, info in made.tensors.items()}, made.config)
    new = new_decoder(blank(made.config))
    wanted = {place.pattern: made.tensors[name].shape for name, place in stored.places.items()}
    assert {blank(made.config).places[name].pattern for name, _ in new.named_parameters()} == set(wanted)
    assert sum(p.numel() for p in new.parameters()) == sum(
        torch.Size(made.tensors[n].shape).numel() for n in stored.places
    )


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_a_saved_model_is_the_model(tmp_path: Path, family: str) -> None:
    """Stock transformers reads from the folder what the decoder computes; the lineage says where it came from."""
    config = json.loads((make_checkpoint(tmp_path / "made", family) / "config.json").read_text())
    decoder = new_decoder(blank(config), seed=3)
    save(decoder, tmp_path / "new", config=config, command="tlt demo", details={"seed": 3})
    with torch.no_grad():
        logits = decoder(some_ids())
    assert torch.allclose(stock_logits(tmp_path / "new", some_ids()), logits, atol=2e-5 * float(logits.std()))
    source = open_checkpoint(tmp_path / "new")
    assert source.lineage is not None and source.lineage["command"] == "tlt demo" and source.lineage["parents"] == []
    save(decoder, tmp_path / "next", config=config, command="tlt demo", source=source)
    lineage = open_checkpoint(tmp_path / "next").lineage
    assert lineage is not None and lineage["parents"] == [{"source": "new", "sha256": source.digest()}]
    assert lineage["history"][0]["details"] == {"seed": 3}
    with pytest.raises(TltError, match="exists already"):
        save(decoder, tmp_path / "next", config=config, command="tlt demo")
    assert transformers.AutoConfig.from_pretrained(tmp_path / "next").vocab_size == config["vocab_size"]
