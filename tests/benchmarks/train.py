"""Training beside a plain loop around transformers: python tests/benchmarks/train.py [CHECKPOINT] [--cuda] [--steps N].

The same model, start values, windows, dtype, fused AdamW and clipping in one process, in turns step by step, so that
both meet the same load; losses must agree. Prints tokens per second and the ratio of the times of neighbouring steps
(the aim is 1.0), for a small Llama and for the shape of CHECKPOINT.

With --cuda: the same in bfloat16, then MFU at 124M and 350M parameters compiled (the aim is 45 % and 50 %), and a tree
of LoRAs whose leaves have 64 ranks together beside one LoRA of rank 64 (0.95 of its tokens per second).
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional

from tlt_cli.model.decoder import Decoder
from tlt_cli.model.lora import Lora, updates
from tlt_cli.model.tree import Tree
from tlt_cli.model.tree_shape import Shape
from tlt_cli.training.flops import peak_flops, training_flops
from tlt_cli.training.init import initial_config
from tlt_cli.training.loop import Run, take_step
from tlt_cli.training.optimizers import optimizers
from tlt_cli.training.recipe import Recipe
from tlt_cli.training.start import blank, new_decoder
from tlt_cli.training.windows import Batch

WARM = 4  # steps that are not timed
SMALL = "llama:dim=256,layers=4,heads=4"
LARGE = {
    "124M": ("llama:dim=768,layers=12,heads=12,ffn=2048,tie_word_embeddings=true", 32),
    "350M": ("llama:dim=1024,layers=24,heads=16,ffn=2816,tie_word_embeddings=true", 16),
}
VOCAB, CONTEXT = 50304, 1024  # of the large ones
RANK, DEPTH = 64, 2
Step = Callable[[int], float]


@dataclass
class Noise:
    """Random windows, all of them made before anything is timed; tokens of little else than habit, so losses fall."""

    rows: Tensor

    @classmethod
    def of(cls, vocab: int, context: int, count: int) -> Noise:
        drawn = torch.rand(count, context + 1, generator=torch.Generator().manual_seed(0))
        return cls((drawn.pow(8) * vocab).long())

    def batch(self, first: int, count: int) -> Batch:
        rows = self.rows[first : first + count]
        return Batch(rows, None, torch.zeros(count, dtype=torch.long), torch.arange(first, first + count))


def ours(
    decoder: Decoder, noise: Noise, recipe: Recipe, *, half: bool, compiled: bool = False, adapter: Any = None
) -> Step:
    if adapter is not None:
        decoder.requires_grad_(False)
        decoder.adapter = adapter
    trained: dict[str, nn.Parameter] = dict((decoder if adapter is None else adapter).named_parameters())
    if compiled:
        decoder.compile()
    run = Run(
        decoder=decoder, trained=trained, windows=noise, recipe=recipe, optimizers=optimizers(trained, recipe),
        adapter=adapter, autocast=torch.bfloat16 if half else None,
    )  # fmt: skip
    return lambda step: take_step(run, step).loss


def theirs(config: dict[str, Any], decoder: Decoder, noise: Noise, recipe: Recipe, *, half: bool) -> Step:
    """The loop that one writes around transformers: SDPA, fused AdamW, clipping."""
    device = decoder.device
    kind = getattr(transformers, config["architectures"][0])
    model = kind(kind.config_class(**config)).to(device)
    missing, unexpected = model.load_state_dict(decoder.state_dict(), strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
    model.tie_weights()
    model.train()
    matrices = [p for p in model.parameters() if p.dim() > 1]
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay},
              {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0}]  # fmt: skip
    optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=recipe.betas, fused=True)

    def step(number: int) -> float:
        rows = noise.batch(number * recipe.batch, recipe.batch).rows.to(device)
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate(number)
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            logits = model(input_ids=rows[:, :-1], use_cache=False).logits
            loss = functional.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def timed(step: Step, number: int, device: torch.device) -> tuple[float, float]:
    """Seconds that a step took, and its loss."""
    start = time.perf_counter()
    loss = step(number)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start, loss


def compare(name: str, config: dict[str, Any], steps: int, device: torch.device) -> float:
    """Both loops in turns; returns how many times as fast ours is."""
    recipe = Recipe(steps=steps + WARM, batch=8, context=min(128, int(config["max_position_embeddings"])), warm_up=2)
    half = device.type == "cuda"
    decoder = new_decoder(blank(config)).to(device)
    noise = Noise.of(config["vocab_size"], recipe.context, recipe.steps * recipe.batch)
    plain = theirs(config, decoder, noise, recipe, half=half)
    own = ours(decoder, noise, recipe, half=half)
    found = []
    for number in range(recipe.steps):
        pair = {
            way: timed(step, number, device) for way, step in (("own", own), ("plain", plain))[:: 1 - number % 2 * 2]
        }
        found.append((*pair["own"], *pair["plain"]))
        assert abs(pair["own"][1] - pair["plain"][1]) < (5e-2 if half else 1e-3), (number, pair)
    kept = found[WARM:]
    ratio = statistics.median(plain / own for own, _, plain, _ in kept)
    speed = [recipe.tokens / statistics.median(column) for column in ([x[0] for x in kept], [x[2] for x in kept])]
    size = sum(p.numel() for p in decoder.parameters())
    print(
        f"{name}: {size / 1e6:.2f}M parameters, {recipe.batch} x {recipe.context} tokens, {torch.get_num_threads()} "
        f"thread(s): tlt {speed[0]:,.0f} tokens/s, plain loop {speed[1]:,.0f}; tlt is {ratio:.3f} times as fast "
        f"(losses {kept[-1][1]:.5f} and {kept[-1][3]:.5f})"
    )
    return ratio


def paced(step: Step, recipe: Recipe, device: torch.device) -> float:
    """Tokens per second, in the median step after compilation."""
    times = [timed(step, number, device)[0] for number in range(recipe.steps)]
    return recipe.tokens / statistics.median(times[2 * WARM :])


def utilization(name: str, steps: int, device: torch.device) -> None:
    """MFU of full training: bfloat16, compiled."""
    spec, batch = LARGE[name]
    config = initial_config(spec, vocab=VOCAB, context=CONTEXT)
    recipe = Recipe(steps=steps + 2 * WARM, batch=batch, context=CONTEXT)
    decoder = new_decoder(blank(config)).to(device)
    noise = Noise.of(VOCAB, CONTEXT, recipe.steps * recipe.batch)
    torch.cuda.reset_peak_memory_stats(device)
    speed = paced(ours(decoder, noise, recipe, half=True, compiled=True), recipe, device)
    peak, origin = peak_flops(device)
    cost = training_flops(decoder, recipe.tokens, context=CONTEXT) / recipe.tokens
    print(
        f"{name}: {batch} x {CONTEXT} tokens, bfloat16, compiled: {speed:,.0f} tokens/s, MFU {speed * cost / peak:.1%} "
        f"of {origin}, {torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB"
    )


def adapters(name: str, steps: int, device: torch.device) -> None:
    """Tokens per second of a LoRA and of trees beside the same frozen model."""
    spec, batch = LARGE[name]
    config = initial_config(spec, vocab=VOCAB, context=CONTEXT)
    recipe = Recipe(steps=steps + 2 * WARM, batch=batch, context=CONTEXT)
    noise = Noise.of(VOCAB, CONTEXT, recipe.steps * recipe.batch)
    shape = Shape(depth=DEPTH, rank=RANK >> DEPTH, form="leaf")

    def routed(route: str) -> Callable[[Decoder], Any]:
        return lambda decoder: Tree(decoder, Shape(depth=DEPTH, rank=shape.rank, form="leaf", route=route))

    made: dict[str, Callable[[Decoder], Any]] = {
        f"LoRA of rank {RANK}": lambda decoder: Lora(decoder, updates(decoder, rank=RANK)),
        **{f"tree of {shape.leaves} leaves of rank {shape.rank}, route {r}": routed(r) for r in ("running", "token")},
    }
    first = 0.0
    for compiled in (False, True):
        for kind, make in made.items():
            torch.compiler.reset()
            decoder = new_decoder(blank(config)).to(device)
            own = ours(decoder, noise, recipe, half=True, compiled=compiled, adapter=make(decoder))
            speed = paced(own, recipe, device)
            first = speed if kind == next(iter(made)) else first
            how = "compiled" if compiled else "eager"
            print(f"{name}, {how}, {kind}: {speed:,.0f} tokens/s, {speed / first:.3f} of the LoRA's")


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoint", nargs="?")
    parser.add_argument("--cuda", action="store_true")
    parser.add_argument("--steps", type=int, default=40)
    given = parser.parse_args()
    transformers.logging.set_verbosity_error()
    device = torch.device("cuda" if given.cuda else "cpu")
    configs = {"small Llama": initial_config(SMALL, vocab=2048, context=128)}
    if given.checkpoint is not None:
        configs[given.checkpoint] = transformers.AutoConfig.from_pretrained(given.checkpoint).to_dict()
    ratios = [compare(name, config, given.steps, device) for name, config in configs.items()]
    if given.cuda:
        torch.set_float32_matmul_precision("high")
        for name in LARGE:
            torch.compiler.reset()
            utilization(name, given.steps, device)
        adapters("124M", given.steps, device)
    return int(min(ratios) < 1.0)


if __name__ == "__main__":
    sys.exit(main())
