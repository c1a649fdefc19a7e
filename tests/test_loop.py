"""The training loop learns, is deterministic, splits a step without changing it, and counts what it costs."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from family_zoo import ZOO, make_checkpoint, some_ids, stock_logits
from torch import Tensor, nn
from torch.nn import functional

from tlt_cli.checkpoint.reader import open_checkpoint
from tlt_cli.errors import TltError, UsageError
from tlt_cli.families import fit
from tlt_cli.model.decoder import Decoder
from tlt_cli.model.lora import Lora, updates
from tlt_cli.model.perplexity import perplexity
from tlt_cli.training import objective
from tlt_cli.training.corpus import Stream
from tlt_cli.training.flops import training_flops
from tlt_cli.training.loop import Run, held_out, take_step, train
from tlt_cli.training.objective import Loss, Objective, distillation, next_token, scored
from tlt_cli.training.optimizers import optimizers
from tlt_cli.training.recipe import Recipe
from tlt_cli.training.saving import save
from tlt_cli.training.start import blank, new_decoder
from tlt_cli.training.windows import IGNORED, Batch, Windows, targets

VOCAB = 32
CONFIG = ZOO["llama"](vocab_size=VOCAB, num_hidden_layers=1, architectures=["LlamaForCausalLM"]).to_dict()
TWO_LAYERS = {**CONFIG, "num_hidden_layers": 2}
QUERY, GAIN = "model.layers.0.self_attn.q_proj.weight", "model.norm.weight"


def pattern(length: int = 600) -> Tensor:
    """A text with a rule to learn: each token is the one before it plus 3."""
    return torch.arange(length) * 3 % VOCAB


def some_decoder(seed: int = 0, config: dict[str, Any] = CONFIG, loud: float = 1.0) -> Decoder:
    """A new model; `loud` multiplies its matrices, for a new one says nearly the same of every token."""
    decoder = new_decoder(blank(config), seed=seed)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.mul_(loud if parameter.dim() > 1 else 1.0)
    return decoder


def learn(decoder: Decoder, ids: Tensor, **options: Any) -> list[float]:
    return train(decoder, ids, **{"steps": 40, "batch": 4, "context": 16, "learning_rate": 1e-2, **options})


def documents(lengths: Iterable[int], seed: int = 0) -> Stream:
    """Random documents of these lengths."""
    ends = np.cumsum([0, *lengths])
    ids = np.random.default_rng(seed).integers(VOCAB, size=ends[-1])
    return Stream("documents", (ids,), ends[:-1].astype(np.int64), "")


UNEVEN = [1] * 30 + [2] * 30 + [50, 3, 1, 1, 60, 2]  # windows of 16 with anything from 0 to 16 targets


def run_of(
    decoder: Decoder,
    stream: Stream,
    recipe: Recipe,
    *,
    trained: dict[str, nn.Parameter] | None = None,
    objective: Objective = next_token,
    micro: int | None = None,
) -> Run:
    moved = dict(decoder.named_parameters()) if trained is None else trained
    return Run(
        decoder=decoder, trained=moved, windows=Windows((stream,), recipe.context, recipe.seed), recipe=recipe,
        optimizers=optimizers(moved, recipe, blocks=[name for name in moved if ".layers." in name]),
        objective=objective, micro=micro,
    )  # fmt: skip


def values(decoder: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in decoder.named_parameters()}


def gradients(decoder: Decoder, loss: Tensor) -> dict[str, Tensor]:
    decoder.zero_grad()
    loss.backward()
    return {
        name: parameter.grad.clone() for name, parameter in decoder.named_parameters() if parameter.grad is not None
    }


def apart(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Largest difference of tensors by name, relative to the largest entry of each."""
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max() / other[name].abs().max()) for name in one)


# --- a run -----------------------------------------------------------------------------------------------------


def test_it_learns_what_there_is_to_learn() -> None:
    """The loss falls on a rule and, the negative control, not on noise that is never seen twice."""
    noise = torch.randint(0, VOCAB, (20_000,), generator=torch.Generator().manual_seed(0))
    learned, guessed = some_decoder(), some_decoder()
    losses = learn(learned, pattern())
    learn(guessed, noise[:10_000])
    assert losses[0] == pytest.approx(math.log(VOCAB), abs=0.1)  # a start that favours nothing
    assert losses[-1] < 0.5 and held_out(learned, pattern()[64:], context=16) < 0.5
    assert held_out(guessed, noise[10_000:], context=16) > 3.4


def test_a_seed_is_a_run() -> None:
    runs = [learn(some_decoder(), pattern(), steps=6, seed=seed) for seed in (1, 1, 2)]
    assert runs[0] == runs[1] and runs[0] != runs[2]


def test_only_matrices_decay() -> None:
    """Where no gradient arrives decay alone moves weights: the matrices', not the gains'."""
    before = values(some_decoder())

    def moved(decay: float) -> dict[str, float]:
        model = some_decoder()
        with torch.no_grad():
            model.weight("lm_head.weight").zero_()  # nothing behind it gets a gradient in the first step
        learn(model, pattern(), steps=1, weight_decay=decay, warm_up=1)
        return {name: float((now - before[name]).norm()) for name, now in values(model).items()}

    assert moved(0.5)[QUERY] == pytest.approx(float(before[QUERY].norm()) * 0.5 * 1e-2, rel=1e-3)
    assert moved(0.5)[GAIN] == 0 and moved(0.0)[QUERY] == 0


def test_callbacks_see_every_step() -> None:
    done: list[tuple[int, int]] = []
    logged: list[tuple[int, float]] = []
    losses = learn(
        some_decoder(), pattern(), steps=3,
        progress=lambda *now: done.append(now), log=lambda *now: logged.append(now),
    )  # fmt: skip
    assert done == [(1, 3), (2, 3), (3, 3)] and logged == list(enumerate(losses))


def test_held_out_is_what_eval_calls_nll() -> None:
    decoder = some_decoder()
    assert held_out(decoder, pattern(100), context=16) == perplexity(decoder, pattern(100), 16)["nll"]


# --- the recipe ------------------------------------------------------------------------------------------------


def rates(**options: Any) -> list[float]:
    recipe = Recipe(**{"steps": 100, "learning_rate": 2.0, "warm_up": 10, **options})
    return [recipe.rate(step) / 2.0 for step in range(recipe.steps)]


@pytest.mark.parametrize("schedule", ["wsd", "cosine", "linear"])
def test_the_rate_rises_in_a_line_and_never_again(schedule: str) -> None:
    found = rates(schedule=schedule)
    assert found[:10] == pytest.approx([(step + 1) / 10 for step in range(10)]) and max(found) == found[9] == 1.0
    assert found[9:] == sorted(found[9:], reverse=True) and found[-1] > 0
    assert rates(schedule=schedule, warm_up=0)[0] == 1.0
    assert rates(schedule=schedule, steps=2, warm_up=4) == [0.25, 0.5]  # stopped while still warming up


def test_how_the_rate_falls() -> None:
    held = rates(schedule="wsd", decay=20)
    assert set(held[10:80]) == {1.0} and held[80:] == pytest.approx([1 - step / 20 for step in range(20)])
    assert rates(schedule="wsd") == held  # a fifth unless told
    assert set(rates(schedule="wsd", decay=0)[10:]) == {1.0}
    assert rates(schedule="wsd", decay=1000) == rates(schedule="linear")
    wave = rates(schedule="cosine")
    assert wave[10] == 1.0 and wave[55] == pytest.approx(0.55) and wave[-1] == pytest.approx(0.1, abs=1e-3)
    line = rates(schedule="linear")
    assert line[10:] == pytest.approx([1 - step / 90 for step in range(90)])
    assert Recipe(steps=5000).warming == 200 and Recipe(steps=50).warming == 5 and Recipe(steps=3).warming == 1


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"steps": 0}, "--steps 0"), ({"batch": 0}, "--batch-size 0"), ({"context": 0}, "--context 0"),
        ({"learning_rate": 0.0}, "--lr 0"), ({"learning_rate": math.nan}, "--lr nan"), ({"clip": -1.0}, "--clip -1"),
        ({"weight_decay": math.inf}, "--weight-decay inf"), ({"seed": -1}, "--seed -1"),
        ({"schedule": "cosin"}, "--schedule cosin"), ({"optimizer": "sgd"}, "--optimizer sgd"),
        ({"warm_up": -1}, "--warm-up -1"), ({"decay": -1}, "--decay -1"),
    ],
)  # fmt: skip
def test_recipes_that_cannot_be(wrong: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        Recipe(**{"steps": 10, **wrong})


# --- a step in pieces ------------------------------------------------------------------------------------------


def mean_of_means(decoder: Decoder, batch: Batch) -> Loss:
    """Wrong: each micro-batch divided by its own targets, however few they are."""
    found, count = next_token(decoder, batch), max(1, scored(batch))
    return Loss(found.total / count, found.nll)


def after(micro: int | None, how: Objective = next_token, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    decoder = some_decoder(loud=5.0).to(dtype)
    run = run_of(decoder, documents(UNEVEN), Recipe(steps=4, batch=6, context=16), objective=how, micro=micro)
    for step in range(4):
        take_step(run, step)
    return values(decoder)


def test_micro_batches_are_the_batch() -> None:
    counts = [scored(Windows((documents(UNEVEN),), 16).batch(row, 1)) for row in range(6)]
    assert max(counts) >= 3 * min(counts), "documents too alike to tell"
    whole = after(None)
    for micro in (1, 2, 4, 6, 100):
        assert apart(after(micro), whole) < 1e-10
    assert apart(after(2, dtype=torch.float32), after(None, dtype=torch.float32)) < 1e-3
    assert apart(after(2, mean_of_means), after(6, mean_of_means)) > 1e-2


def test_the_loss_of_a_step_is_that_of_its_tokens() -> None:
    """Of all that are predicted, by stock means; a document's first token is not."""
    decoder, recipe = some_decoder(loud=5.0), Recipe(steps=4, batch=6, context=16)
    run = run_of(decoder, documents(UNEVEN), recipe, micro=4)
    batch = run.windows.batch(0, 6)
    with torch.no_grad():
        logits = decoder(batch.rows[:, :-1], documents=batch.documents[:, :-1] if batch.documents is not None else None)
        wanted = functional.cross_entropy(logits.flatten(0, 1), targets(batch).flatten(), ignore_index=IGNORED)
        across = functional.cross_entropy(logits.flatten(0, 1), batch.rows[:, 1:].flatten())
    done = take_step(run, 0)
    assert done.loss == pytest.approx(float(wanted), rel=1e-6) and abs(done.loss - float(across)) > 1e-3
    assert (done.step, done.tokens, done.rate) == (0, 96, recipe.rate(0))


def test_what_an_objective_counts_is_a_mean_per_token() -> None:
    """Over all micro-batches, however many tokens each has, and beside what is done behind the step."""
    teacher, decoder = some_decoder(1, loud=5.0).double(), some_decoder(loud=5.0).double()
    batch = Windows((documents(UNEVEN),), 16).batch(0, 6)
    with torch.no_grad():
        wanted = float(distillation(teacher)(decoder, batch).total) / scored(batch)

    def logged(micro: int | None, how: Objective) -> dict[str, float]:
        decoder = some_decoder(loud=5.0).double()
        run = run_of(decoder, documents(UNEVEN), Recipe(steps=1, batch=6, context=16), objective=how, micro=micro)
        return dict(take_step(replace(run, after=lambda step, rate: {"rate": rate}), 0).numbers)

    def of_means(decoder: Decoder, batch: Batch) -> Loss:
        found = distillation(teacher)(decoder, batch)
        return replace(found, numbers={"kl": found.numbers["kl"] / max(1, scored(batch)) * 6 / len(batch.rows)})

    for micro in (None, 1, 4):
        found = logged(micro, distillation(teacher))
        assert found.keys() == {"kl", "rate"} and found["kl"] == pytest.approx(wanted, rel=1e-6)
    assert logged(1, of_means)["kl"] != pytest.approx(logged(None, of_means)["kl"], rel=1e-2)
    assert logged(None, next_token).keys() == {"rate"}


def test_clipping() -> None:
    """The norm is the whole gradient's; a bound that it is above changes the step as scaling the gradient does."""

    def once(clip: float) -> tuple[float, dict[str, Tensor]]:
        decoder = some_decoder(loud=5.0).double()
        run = run_of(decoder, documents([400]), Recipe(steps=1, batch=4, context=16, clip=clip), micro=1)
        run.optimizers[0].__class__ = Plain
        return take_step(run, 0).norm, {name: p.detach() for name, p in decoder.named_parameters()}

    class Plain(torch.optim.AdamW):
        """Plain gradient descent."""

        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.data -= parameter.grad

    before = values(some_decoder(loud=5.0).double())
    (norm, free), (again, bound) = once(0.0), once(0.25)
    steps = {name: before[name] - now for name, now in free.items()}
    assert (
        norm == again == pytest.approx(math.sqrt(sum(float(s.square().sum()) for s in steps.values()))) and norm > 0.5
    )
    assert (
        apart({n: before[n] - now for n, now in bound.items()}, {n: s * 0.25 / norm for n, s in steps.items()}) < 1e-5
    )


# --- what is minimized -----------------------------------------------------------------------------------------


@pytest.fixture
def few_logits(monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[int]]:
    """Room for the logits of seven tokens; tells of how many tokens they were computed at once."""
    seen: list[int] = []

    def watched(self: Decoder, x: Tensor, head: Callable[..., Tensor] = Decoder.head) -> Tensor:
        seen.append(x.shape[1])
        return head(self, x)

    monkeypatch.setattr(Decoder, "head", watched)

    def begin() -> list[int]:
        monkeypatch.setattr(objective, "LOGIT_BYTES", 7 * 4 * VOCAB)
        seen.clear()
        return seen

    return begin


@pytest.mark.parametrize("how", ["text", "teacher", "both"])
def test_logits_in_chunks_are_the_same_loss(few_logits: Callable[[], list[int]], how: str) -> None:
    """Loss and gradient, with documents; negative control: the loss of another batch."""
    decoder, batch = some_decoder(loud=5.0).double(), Windows((documents(UNEVEN),), 16).batch(0, 3)
    teacher = some_decoder(1, TWO_LAYERS, loud=5.0).double()
    minimized = next_token if how == "text" else distillation(teacher, share=1.0 if how == "teacher" else 0.5)
    whole = minimized(decoder, batch)
    wanted = gradients(decoder, whole.total)
    seen = few_logits()
    chunked = minimized(decoder, batch)
    found = gradients(decoder, chunked.total)
    assert max(seen) == 7 and 48 % 7  # the last chunk is a short one
    assert float(chunked.total.detach()) == pytest.approx(float(whole.total.detach()), rel=1e-6)
    assert float(chunked.nll) == pytest.approx(float(whole.nll), rel=1e-12)
    assert apart(found, wanted) < (1e-10 if how == "text" else 1e-4)
    other = minimized(decoder, Windows((documents(UNEVEN),), 16).batch(3, 3))
    assert apart(gradients(decoder, other.total), wanted) > 1e-2
    with torch.no_grad():
        assert float(minimized(decoder, batch).total) == pytest.approx(float(whole.total.detach()), rel=1e-6)


def test_who_equals_the_teacher_has_nothing_to_learn() -> None:
    batch = Windows((documents(UNEVEN),), 16).batch(0, 3)
    decoder, same, other = some_decoder(loud=5.0), some_decoder(loud=5.0), some_decoder(1, loud=5.0)
    text = gradients(decoder, next_token(decoder, batch).total)
    nothing = distillation(same)(decoder, batch)
    assert abs(float(nothing.total.detach())) < 1e-4 and float(nothing.nll) == float(next_token(decoder, batch).nll)
    largest = {name: float(g.abs().max()) for name, g in gradients(decoder, nothing.total).items()}
    assert all(largest[name] < 1e-5 * float(g.abs().max()) + 1e-6 for name, g in text.items())
    assert not same.weight(QUERY).grad
    something = distillation(other)(decoder, batch)
    assert float(something.total.detach()) > 1 and float(gradients(decoder, something.total)[QUERY].abs().max()) > 1e-2


@pytest.mark.parametrize(("share", "temperature"), [(1.0, 1.0), (0.25, 1.0), (1.0, 2.0)])
def test_distillation_is_the_divergence_from_the_teacher(share: float, temperature: float) -> None:
    """KL(teacher || model), directly from its definition, within documents; the other direction is far off."""
    batch = Windows((documents(UNEVEN),), 16).batch(0, 3)
    assert batch.documents is not None
    decoder, teacher = some_decoder(loud=5.0), some_decoder(1, TWO_LAYERS, loud=5.0)
    inside = targets(batch) != IGNORED
    with torch.no_grad():
        found = distillation(teacher, share=share, temperature=temperature)(decoder, batch)
        own, other = (
            (model(batch.rows[:, :-1], documents=batch.documents[:, :-1])[inside].double() / temperature).softmax(-1)
            for model in (decoder, teacher)
        )
        nll = float(next_token(decoder, batch).nll)
    forward, backward = (float((p * (p / q).log()).sum()) * temperature**2 for p, q in ((other, own), (own, other)))
    assert float(found.total) == pytest.approx(share * forward + (1 - share) * nll, rel=1e-5)
    assert abs(backward - forward) > 0.02 * forward
    assert float(found.nll) == pytest.approx(nll)


def test_a_student_comes_to_agree_with_its_teacher() -> None:
    """Where the text has nothing to say, only the teacher's opinion can have been learned."""
    teacher, student = some_decoder(1, loud=5.0), some_decoder(2)
    recipe = Recipe(steps=30, batch=8, context=16, learning_rate=1e-2)
    run = run_of(student, documents([3000]), recipe, objective=distillation(teacher))
    batch = run.windows.batch(10_000, 4)

    def distance() -> float:
        with torch.no_grad():
            return float(distillation(teacher)(student, batch).total) / scored(batch)

    before = distance()
    for step in range(recipe.steps):
        take_step(run, step)
    assert distance() < 0.8 * before


# --- what moves ------------------------------------------------------------------------------------------------


def test_only_what_is_trained_moves() -> None:
    decoder = some_decoder(config=TWO_LAYERS)
    before = values(decoder)
    for name, parameter in decoder.named_parameters():
        parameter.requires_grad_(".mlp." in name)
    moved = {name: parameter for name, parameter in decoder.named_parameters() if ".mlp." in name}
    run = run_of(decoder, documents([400]), Recipe(steps=2, batch=4, context=16), trained=moved)
    for step in range(2):
        take_step(run, step)
    changed = {name for name, now in values(decoder).items() if not torch.equal(now, before[name])}
    assert changed == set(moved)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_muon_takes_the_matrices_of_the_blocks() -> None:
    decoder, recipe = some_decoder(config=TWO_LAYERS), Recipe(steps=30, optimizer="muon", batch=4, context=16)
    stream = Stream("pattern", (pattern().numpy(),), np.zeros(1, dtype=np.int64), "")
    run = run_of(decoder, stream, recipe)
    names = {id(parameter): name for name, parameter in run.trained.items()}
    held = {
        type(optimizer).__name__: {names[id(p)] for group in optimizer.param_groups for p in group["params"]}
        for optimizer in run.optimizers
    }
    assert held.keys() == {"AdamW", "Muon"} and held["AdamW"] | held["Muon"] == set(run.trained)
    assert held["Muon"] == {name for name, p in run.trained.items() if ".layers." in name and p.dim() == 2}
    losses = [take_step(run, step).loss for step in range(recipe.steps)]
    assert losses[-1] < losses[0] - 0.3
    rates = {group["lr"] for optimizer in run.optimizers for group in optimizer.param_groups}
    assert rates == {recipe.rate(recipe.steps - 1)}


def test_muon_needs_a_torch_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.optim, "Muon", raising=False)
    with pytest.raises(TltError, match=r"--optimizer muon needs torch 2\.9 or later"):
        run_of(some_decoder(), documents([400]), Recipe(steps=1, optimizer="muon", context=16))


# --- what is refused -------------------------------------------------------------------------------------------


def test_what_is_refused() -> None:
    with pytest.raises(TltError, match="10 tokens, less than one window of 16"):
        learn(some_decoder(), pattern(10))
    broken = some_decoder()
    with torch.no_grad():
        broken.weight(GAIN).fill_(float("nan"))
    before = values(broken)
    with pytest.raises(TltError, match=r"the loss is nan at step 0; train at a lower rate than 0\.01"):
        learn(broken, pattern())
    assert all(torch.equal(now, before[name]) for name, now in values(broken).items() if name != GAIN)
    with pytest.raises(TltError, match="no token of step 0 is to be predicted: every document is one token long"):
        take_step(run_of(some_decoder(), documents([1] * 100), Recipe(steps=1, batch=2, context=16)), 0)
    frozen = {name: p for name, p in broken.named_parameters() if p.dim() == 1}
    with pytest.raises(UsageError, match="--optimizer muon is for the matrices of a model's blocks, and none"):
        run_of(some_decoder(), documents([400]), Recipe(steps=1, optimizer="muon", context=16), trained=frozen)


def test_a_gradient_that_is_no_number_moves_nothing() -> None:
    """The loss may be a number where its gradient is none; a state saved behind such a step would be lost."""

    def steep(decoder: Decoder, batch: Batch) -> Loss:
        found = next_token(decoder, batch)
        return Loss(found.total + (found.total - found.total.detach()).abs().sqrt(), found.nll)

    decoder = some_decoder()
    before = values(decoder)
    run = run_of(decoder, documents([400]), Recipe(steps=1, batch=2, context=16), objective=steep)
    with pytest.raises(TltError, match=r"the gradient is nan at step 0; train at a lower rate than 0\.001"):
        take_step(run, 0)
    assert all(torch.equal(now, before[name]) for name, now in values(decoder).items())


def failing(error: BaseException, decoder: Decoder, batch: Batch) -> Loss:
    raise error


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), MemoryError(),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory: 12 bytes")])  # fmt: skip
def test_out_of_memory_names_the_knob_and_the_value(error: BaseException) -> None:
    def message(micro: int | None, batch: int = 8) -> str:
        recipe = Recipe(steps=1, batch=batch, context=16)
        run = run_of(some_decoder(), documents([400]), recipe, micro=micro, objective=partial(failing, error))
        with pytest.raises(TltError) as caught:
            take_step(run, 0)
        return str(caught.value)

    assert "8 windows of 16 tokens" in message(None) and "--micro-batch 4" in message(None)
    assert "--micro-batch 1" in message(2) and "--micro-batch 1" in message(3)
    assert "--micro-batch 4" in message(100)  # more than there are is all there are
    assert "--micro-batch" not in message(1) and "--context 8" in message(1) and "--lora" in message(1)


def test_other_errors_are_not_called_out_of_memory() -> None:
    run = run_of(
        some_decoder(), documents([400]), Recipe(steps=1, context=16), objective=partial(failing, RuntimeError("bug"))
    )
    with pytest.raises(RuntimeError, match=r"^bug$"):
        take_step(run, 0)


# --- what it costs ---------------------------------------------------------------------------------------------


def counted(decoder: Decoder, context: int) -> int:
    """Operations of every matrix product, there and back, as torch counts them; of attention it does not know here."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        decoder(some_ids(VOCAB, 1, context)).sum().backward()
    return int(counter.get_total_flops())


def attention(decoder: Decoder, context: int) -> int:
    data = decoder.description
    return 6 * int(data["layers"] * data["heads"] * data["head_dim"]) * context * context


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_flops_are_those_of_the_multiplications(tied: bool) -> None:
    decoder, context = new_decoder(blank({**TWO_LAYERS, "tie_word_embeddings": tied})), 8
    found = training_flops(decoder, context, context=context)
    assert counted(decoder, context) == found - attention(decoder, context)
    longer = training_flops(decoder, context, context=2 * context)
    assert longer == found + attention(decoder, context)


def test_frozen_weights_cost_two_thirds() -> None:
    """A LoRA: there, back through the frozen weights, and its own products. The first layer's are not gone through."""
    decoder, context = some_decoder(config=TWO_LAYERS).requires_grad_(False), 8
    decoder.adapter = lora = Lora(decoder, updates(decoder, rank=2))
    size = sum(parameter.numel() for parameter in lora.parameters())
    found = training_flops(decoder, context, context=context, trained=(), adapter=size) - attention(decoder, context)
    measured = counted(decoder, context)
    assert 0.9 * found < measured <= found
    everything = training_flops(decoder, context, context=context, adapter=size) - attention(decoder, context)
    assert measured < 0.75 * everything  # what a model counts that takes all weights for trained


def test_some_trained_weights() -> None:
    decoder, context = some_decoder(config=TWO_LAYERS), 8
    for name, parameter in decoder.named_parameters():
        parameter.requires_grad_("embed" in name or ".mlp." in name)
    trained = [name for name, parameter in decoder.named_parameters() if parameter.requires_grad]
    found = training_flops(decoder, context, context=context, trained=trained)
    assert counted(decoder, context) == found - attention(decoder, context)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_nothing_goes_back_below_the_first_that_is_trained(tied: bool) -> None:
    """The count is exact, attention aside, where a whole layer is trained, or the head alone."""
    decoder, context = some_decoder(config={**TWO_LAYERS, "tie_word_embeddings": tied}), 8
    for glob in ("model.layers.1.", *(() if tied else ("lm_head",))):
        for name, parameter in decoder.named_parameters():
            parameter.requires_grad_(name.startswith(glob))
        trained = [name for name, parameter in decoder.named_parameters() if parameter.requires_grad]
        data = decoder.description
        attended = 2 * data["layers"] + 4 * ("layers" in glob)
        found = training_flops(decoder, context, context=context, trained=trained)
        found -= attended * int(data["heads"] * data["head_dim"]) * context * context
        assert counted(decoder, context) == found
        everything = training_flops(decoder, context, context=context)
        assert found < 0.8 * everything


# --- new models and saved ones ---------------------------------------------------------------------------------


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
    save(decoder.stored, tmp_path / "new", config=config, command="tlt demo", details={"seed": 3})
    with torch.no_grad():
        logits = decoder(some_ids())
    assert torch.allclose(stock_logits(tmp_path / "new", some_ids()), logits, atol=2e-5 * float(logits.std()))
    source = open_checkpoint(tmp_path / "new")
    assert source.lineage is not None and source.lineage["command"] == "tlt demo" and source.lineage["parents"] == []
    save(decoder.stored, tmp_path / "next", config=config, command="tlt demo", source=source)
    lineage = open_checkpoint(tmp_path / "next").lineage
    assert lineage is not None and lineage["parents"] == [{"source": "new", "sha256": source.digest()}]
    assert lineage["history"][0]["details"] == {"seed": 3}
    with pytest.raises(TltError, match="exists already"):
        save(decoder.stored, tmp_path / "next", config=config, command="tlt demo")
    assert transformers.AutoConfig.from_pretrained(tmp_path / "next").vocab_size == config["vocab_size"]


def test_it_is_stored_in_the_dtype_that_was_asked_for(tmp_path: Path) -> None:
    decoder = some_decoder()
    save(decoder.stored, tmp_path / "half.st", config=CONFIG, command="", dtypes={QUERY: "BF16"})
    made = open_checkpoint(tmp_path / "half.st")
    assert {name for name, info in made.tensors.items() if info.dtype == "BF16"} == {QUERY}
    assert torch.equal(made.read(QUERY), decoder.weight(QUERY).detach().bfloat16())
    assert torch.equal(made.read(GAIN), decoder.weight(GAIN).detach())
