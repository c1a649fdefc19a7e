"""Law 6 for adapters: folded, base and LoRA are one stock model that computes what they computed side by side."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from adapting import BOUND, WRONG, decoder_of, far, lora_beside, peft_around, stock, write_lora
from factored import MIX, case
from family_zoo import ZOO, make_checkpoint, some_ids, stock_logits
from growing import opened
from peft import PeftModel
from safetensors.torch import load_file
from typer.testing import CliRunner

from tlt_cli.cli import app
from tlt_cli.cli.adapters import adapter_of
from tlt_cli.surgery.fold_adapter import fold_updates

everywhere = pytest.mark.parametrize("family", ZOO)


@pytest.fixture(autouse=True)
def plain_terminal(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("_TYPER_FORCE_DISABLE_TERMINAL", "1")
    monkeypatch.delenv("TLT_DEBUG", raising=False)
    monkeypatch.chdir(tmp_path)


def tlt(*arguments: str | Path, code: int = 0) -> str:
    """Run a command in this process, which must exit with `code`: what is on stdout, or the one line of the error."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], prog_name="tlt")
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.stderr
    return result.stderr.strip().splitlines()[-1].removeprefix("tlt: error: ") if code else result.stdout


@everywhere
@torch.no_grad()
def test_folded_is_what_peft_merges(tmp_path: Path, family: str) -> None:
    base, ids = make_checkpoint(tmp_path / "base", family, tied=family == "gpt2"), some_ids()
    settings: dict[str, Any] = {"rslora": True, "targets": ["c_attn", "mlp.c_proj"] if family == "gpt2" else ["v_proj"]}
    adapter = write_lora(tmp_path, base, "adapter", **settings)
    report = json.loads(tlt("fold", adapter, "--json"))
    assert report["path"] == "adapter-folded"
    assert report["verification"]["relative"] <= report["verification"]["bound"]
    assert report["verification"]["kl"] < 1e-9
    peft = PeftModel.from_pretrained(stock(base), str(adapter))
    beside = peft(ids).logits
    assert far(stock_logits(base, ids).double(), beside) > WRONG, "the adapter is too quiet to tell anything"
    assert far(stock_logits(tmp_path / "adapter-folded", ids).double(), beside) < BOUND
    merged, before = peft.merge_and_unload().state_dict(), load_file(base / "model.safetensors")
    after = load_file(tmp_path / "adapter-folded" / "model.safetensors")
    assert after.keys() == before.keys()
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed == {f"{site.module}.weight" for site in lora_beside(decoder_of(base), **settings).sites}
    assert all(torch.equal(after[name], merged[name].float()) for name in changed), "rounded once, from float64"
    assert json.loads((base / "config.json").read_text()) == json.loads(Path("adapter-folded/config.json").read_text())


def test_a_wrong_fold_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice the scale, and on GPT-2 the chunks of a fused B in another order."""

    def folded_wrong(wrong: Any, fitted: Any, dtypes: Any, updates: Any, details: Any) -> Any:
        return fold_updates(fitted, dtypes, [wrong(update) for update in updates], details=details)

    wrongs: dict[str, Callable[[Any], Any]] = {
        "scale": lambda update: replace(update, scale=2 * update.scale),
        "chunks": lambda update: replace(update, b=update.b.roll(len(update.b) // 3, 0)),
    }
    base = make_checkpoint(tmp_path / "base", "gpt2")
    adapter = write_lora(tmp_path, base, "adapter", targets=["c_attn"])
    for wrong in wrongs.values():
        monkeypatch.setattr("tlt_cli.cli.folding_adapter.fold_updates", partial(folded_wrong, wrong))
        assert "verification failed: logits differ" in tlt("fold", adapter, code=1)
        assert not Path("adapter-folded").exists()
    monkeypatch.undo()


def test_bfloat16_is_rounded_once(tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base", "llama", dtype=torch.bfloat16)
    adapter = write_lora(tmp_path, base, "adapter")
    report = json.loads(tlt("fold", adapter, "-o", tmp_path / "out", "--json"))
    assert (
        report["verification"]["relative"]
        <= report["verification"]["bound"]
        < report["verification"]["written"]["relative"]
    )
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "out"))
    for site, update, a, b in lora_beside(decoder_of(base)).matrices():
        name = f"{site.module}.weight"
        assert torch.equal(after[name], (before[name].double() + update.scale * b @ a).bfloat16())
        twice = (before[name].double() + (update.scale * b @ a).bfloat16()).bfloat16()
        assert not torch.equal(after[name], twice)


def test_blocks_of_rows_are_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = make_checkpoint(tmp_path / "base", "gpt2")
    adapter = write_lora(tmp_path, base, "adapter")
    tlt("fold", adapter, "-o", "whole")
    monkeypatch.setattr("tlt_cli.surgery.fold_adapter._BLOCK", 500)
    tlt("fold", adapter, "-o", "blocks")
    assert Path("whole/model.safetensors").read_bytes() == Path("blocks/model.safetensors").read_bytes()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@torch.no_grad()
def test_a_base_of_factors(tmp_path: Path, family: str) -> None:
    """Factors are multiplied out and the update added: layers with fewer neurons get zeros in it too."""
    base = case(tmp_path / "source", family, MIX).write(tmp_path / "base")
    adapter, ids = write_lora(tmp_path, base, "adapter"), some_ids()
    tlt("fold", adapter, "-o", "out")
    decoder = decoder_of(base)
    plain = decoder(ids)
    decoder.adapter = lora_beside(decoder)
    assert far(plain, decoder(ids)) > WRONG
    assert far(stock_logits(tmp_path / "out", ids).double(), decoder(ids)) < BOUND
    assert not Path("out/modeling_tlt.py").exists()


def test_the_base_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As named, from where the user stands; from the adapter's folder; beside it; or where --base says."""
    make_checkpoint(tmp_path / "there" / "base", "llama")
    monkeypatch.chdir(tmp_path / "there")
    write_lora(tmp_path / "there", Path("base"), "adapter")
    assert json.loads(Path("adapter/adapter_config.json").read_text())["base_model_name_or_path"] == "base"
    tlt("fold", "adapter", "--dry-run")
    monkeypatch.chdir(tmp_path)
    tlt("fold", "there/adapter", "--dry-run")
    shutil.move("there/base", "there/adapter/base")
    tlt("fold", "there/adapter", "--dry-run")
    shutil.move("there/adapter/base", "moved")
    words = tlt("fold", "there/adapter", "--dry-run", code=1)
    assert (
        words
        == "there/adapter: its base cannot be opened: base: no such file or folder; name another place: --base SRC"
    )
    tlt("fold", "there/adapter", "--dry-run", "--base", "moved")
    make_checkpoint(tmp_path / "other", "llama", seed=1)
    digests = [opened(tmp_path / name).checkpoint.digest() for name in ("moved", "other")]
    words = tlt("fold", "there/adapter", "--dry-run", "--base", "other", code=1)
    assert words == (
        f"there/adapter: was made for a base with the sha256 {digests[0]}, but other has {digests[1]}; name its own "
        "base: --base SRC"
    )
    assert "--base goes with an adapter, and moved is none" in tlt("fold", "moved", "--base", "other", code=2)


def test_an_adapter_of_peft_needs_no_digest(tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base", "qwen2")
    peft_around(base).save_pretrained(tmp_path / "adapter")
    other = make_checkpoint(tmp_path / "other", "qwen2", seed=1)
    tlt("fold", "adapter", "-o", "one")
    tlt("fold", "adapter", "-o", "two", "--base", other)
    config = json.loads(Path("adapter/adapter_config.json").read_text())
    Path("adapter/adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": None}))
    assert "does not say what it adapts; name its base: --base SRC" in tlt("fold", "adapter", "-o", "three", code=1)


def test_commands_take_an_adapter_for_a_model(tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base", "llama", vocab_size=300)
    adapter = write_lora(tmp_path, base, "adapter", torch.float32)
    Path("text.txt").write_text("Es war einmal ein Modell. " * 30)
    tlt("fold", "adapter", "-o", "folded")
    models = json.loads(tlt("eval", "adapter", "folded", "base", "--data", "text.txt", "--json"))["models"]
    beside, folded, without = (model["nll"] for model in models)
    assert math.isclose(beside, folded, rel_tol=1e-5)
    assert not math.isclose(beside, without, rel_tol=1e-3)
    assert [model["source"] for model in models] == ["adapter", "folded", "base"]
    assert models[0]["base"] == str(base)
    streamed = json.loads(tlt("eval", "adapter", "--data", "text.txt", "--stream", "--json"))
    assert math.isclose(streamed["nll"], beside, rel_tol=1e-6)
    said = [
        tlt("generate", name, "--prompt", "Es", "--max-tokens", "12", "--temperature", "0")
        for name in ("adapter", "folded", "base")
    ]
    assert said[0] == said[1] != said[2]
    data = json.loads(tlt("inspect", "adapter", "--json"))
    assert data["adapter"]["base"] == str(base)
    assert set(data["adapter"]["ranks"].values()) == {4}
    assert "lora_A" in tlt("inspect", "adapter")
    assert tlt("grow", "adapter", "--to-dim", "64", code=1) == (
        "adapter is a LoRA, and a model is wanted: fold it into its base first, `tlt fold SRC`"
    )
    assert adapter_of(str(adapter)) is not None
    assert adapter_of(str(base)) is None
    assert "--toml, --family and --axis go with its base" in tlt("inspect", "adapter", "--toml", code=2)


def test_the_inputs_are_never_the_output(tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base", "llama")
    adapter = write_lora(tmp_path, base, "adapter")
    for target in (base, adapter, adapter / "out"):
        assert "the input" in tlt("fold", adapter, "-o", target, "--force", code=1)
    tlt("fold", adapter, "-o", "out.safetensors")
    report = json.loads(tlt("inspect", "out.safetensors", "--json"))
    assert report["lineage"]["parents"][0]["sha256"] == opened(base).checkpoint.digest()
    assert report["lineage"]["details"]["adapter"]["kind"] == "LoRA"
