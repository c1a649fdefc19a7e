"""LoRA training beside PEFT with the Trainer of transformers: python tests/benchmarks/lora.py CHECKPOINT [STEPS].

Same model, rows, dtype, rank, start values and fused AdamW in one process, in turns so that both meet the same load.
Each puts CONTEXT tokens of a row through the model, the most that its kernels like, and predicts the next of each.
Prints tokens per second of each, the mean loss (the same in all), and the ratios; the aim is 1.3 beside the Trainer.
PEFT in a plain loop stands there too, to show how much is the Trainer's. CPU time tells more on a machine that others
use as well.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from peft import LoraConfig, get_peft_model

from tlt_cli.checkpoint.reader import open_checkpoint
from tlt_cli.families import fit
from tlt_cli.model.lora import Lora, updates
from tlt_cli.model.weights import load_checkpoint
from tlt_cli.training.loop import Run, take_step
from tlt_cli.training.optimizers import optimizers
from tlt_cli.training.recipe import Recipe
from tlt_cli.training.windows import Batch

RANK, BATCH, CONTEXT, RATE, WARM, ROUNDS = 8, 8, 128, 1e-3, 3, 5
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
Timed = tuple[float, float, float]  # tokens per second by the clock and of this process alone, mean loss


def peft_model(source: str) -> Any:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    return get_peft_model(model, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=TARGETS, task_type="CAUSAL_LM"))


def given(rows: torch.Tensor) -> dict[str, torch.Tensor]:
    """Rows [..., T + 1] as a stock model takes them, its targets shifted already."""
    following = rows[..., 1:].contiguous()
    return {"input_ids": rows[..., :-1], "labels": following, "shift_labels": following}


class Clock:
    """Starts when the first steps are done, so that what is set up once is not counted."""

    def begin(self, step: int) -> None:
        if step == WARM:
            self.start = time.perf_counter(), time.process_time()

    def end(self, rows: int, loss: float) -> Timed:
        tokens = rows * CONTEXT - WARM * BATCH * CONTEXT
        return tokens / (time.perf_counter() - self.start[0]), tokens / (time.process_time() - self.start[1]), loss


class Watch(transformers.TrainerCallback):
    """The clock where the Trainer is."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_step_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        self.clock.begin(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        self.timed = self.clock.end(BATCH * state.global_step, 0.0) if state.global_step > WARM else (0.0, 0.0, 0.0)


def with_trainer(source: str, rows: torch.Tensor) -> Timed:
    steps, watch = len(rows) // BATCH, Watch(Clock())
    arguments = transformers.TrainingArguments(
        output_dir="unused", per_device_train_batch_size=BATCH, max_steps=steps, learning_rate=RATE,
        lr_scheduler_type="constant", weight_decay=0.0, optim="adamw_torch_fused", report_to=[], save_strategy="no",
        logging_strategy="no", disable_tqdm=True, use_cpu=True, train_sampling_strategy="sequential",
        remove_unused_columns=False,
    )  # fmt: skip
    data = [given(row) for row in rows]
    trainer = transformers.Trainer(peft_model(source), arguments, train_dataset=data, callbacks=[watch])
    loss = trainer.train().training_loss
    return *watch.timed[:2], float(loss)


def with_peft(source: str, rows: torch.Tensor) -> Timed:
    model, losses, clock = peft_model(source), [], Clock()
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0, fused=True)
    for step, batch in enumerate(torch.split(rows, BATCH)):
        clock.begin(step)
        loss = model(**given(batch)).loss
        losses.append(loss.item())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return clock.end(len(rows), statistics.mean(losses))


def with_tlt(source: str, rows: torch.Tensor) -> Timed:
    checkpoint = open_checkpoint(source)
    fitted = fit({name: info.shape for name, info in checkpoint.tensors.items()}, checkpoint.config)
    decoder = load_checkpoint(checkpoint, fitted).requires_grad_(False)
    lora = Lora(decoder, updates(decoder, rank=RANK))
    start = peft_model(source).state_dict()
    for site, _, _, b in lora.matrices():
        lora.set(site.module, start[f"base_model.model.{site.module}.lora_A.default.weight"], b)
    decoder.adapter = lora
    trained, clock, losses = dict(lora.named_parameters()), Clock(), []
    recipe = Recipe(
        steps=len(rows) // BATCH, learning_rate=RATE, batch=BATCH, context=CONTEXT, warm_up=0, decay=0,
        weight_decay=0.0, betas=(0.9, 0.999),
    )  # fmt: skip
    run = Run(
        decoder=decoder, trained=trained, windows=Given(rows), recipe=recipe, optimizers=optimizers(trained, recipe),
        adapter=lora,
    )  # fmt: skip
    for step in range(recipe.steps):
        clock.begin(step)
        losses.append(take_step(run, step).loss)
    return clock.end(len(rows), statistics.mean(losses))


@dataclass(frozen=True)
class Given:
    """The rows that PEFT reads, as the loop asks for them."""

    rows: torch.Tensor

    def batch(self, first: int, count: int) -> Batch:
        rows = self.rows[first : first + count]
        return Batch(rows, None, torch.zeros(len(rows), dtype=torch.long), torch.arange(first, first + len(rows)))


def main() -> None:
    source, steps = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 30
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    vocab = transformers.AutoConfig.from_pretrained(source).vocab_size
    rows = torch.randint(0, vocab, (steps * BATCH, CONTEXT + 1), generator=torch.Generator().manual_seed(0))
    ways = {"PEFT + Trainer": with_trainer, "PEFT, plain loop": with_peft, "tlt": with_tlt}
    rounds = [{name: run(source, rows) for name, run in ways.items()} for _ in range(ROUNDS)]
    print(f"rank {RANK}, {BATCH} x {CONTEXT} tokens, float32, {torch.get_num_threads()} thread(s), {steps} steps")
    for name in ways:
        wall, own = (statistics.median(one[name][kind] for one in rounds) for kind in (0, 1))
        print(f"{name:16} {wall:8.0f} tokens/s, {own:8.0f} per CPU second, mean loss {rounds[0][name][2]:.6f}")
    for name in list(ways)[:-1]:
        wall, own = (statistics.median(one["tlt"][kind] / one[name][kind] for one in rounds) for kind in (0, 1))
        print(f"tlt / {name}: {wall:.2f} by the clock, {own:.2f} by CPU time")


if __name__ == "__main__":
    main()
