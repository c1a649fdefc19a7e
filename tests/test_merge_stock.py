"""`tlt merge --layout stock`: a dense model that stock transformers loads, near the mean of its models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from factored import apart
from family_zoo import make_checkpoint, some_ids, stock_logits
from growing import opened
from merging import made, merged, weights_of
from safetensors.torch import save_file
from typer.testing import CliRunner

from tlt_cli.calibration.stock_gains import stock_gains
from tlt_cli.checkpoint.together import together
from tlt_cli.checkpoint.writer import write
from tlt_cli.cli import app
from tlt_cli.errors import TltError
from tlt_cli.families import fit
from tlt_cli.model.decoder import Decoder
from tlt_cli.surgery import stock_layout as stock_module
from tlt_cli.surgery.merge import Source
from tlt_cli.surgery.plan import Plan
from tlt_cli.surgery.stock_layout import check_head_norms, stock_layout
from tlt_cli.surgery.verify import planned_decoder, sample_tokens

BOUND = 1e-5
WRONG = 1e-1
RMS = pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "smollm3", "gemma2", "gemma3"])
both_ways = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])


def variant(family: str, **own: Any) -> dict[str, Any]:
    """Keys of config.json without the cap of the logits that no stock model of several can hold."""
    return {**({"final_logit_softcapping": None} if family == "gemma2" else {}), **own}


def sources_of(folders: list[Path]) -> list[Source]:
    return [Source(part.fitted, part.dtypes, part.folder.name, "0" * 64) for part in map(opened, folders)]


def written(folders: list[Path], target: Path, weights: list[float] | None = None, gains: Any = None) -> Plan:
    plan = stock_layout(sources_of(folders), weights, gains)
    values = together([opened(folder).checkpoint for folder in folders])
    write(target, plan.tensors, values, config=plan.config, metadata={"format": "pt"}, jobs=1)
    return plan


def planned(folders: list[Path], gains: Any = None) -> Decoder:
    plan = stock_layout(sources_of(folders), None, gains)
    values = together([opened(folder).checkpoint for folder in folders])
    family = opened(folders[0]).fitted.family
    return planned_decoder(plan, fit(plan.shapes, plan.config, family=family), values, dtype=torch.float32)


def changed(folder: Path, fragment: str, change: Any) -> None:
    """The checkpoint with every tensor of that name changed."""
    tensors = {name: change(value) if fragment in name else value for name, value in weights_of(folder).items()}
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "model.safetensors",
              {"format": "pt"})  # fmt: skip


@RMS
@both_ways
@torch.no_grad()
def test_equal_models_are_exact(tmp_path: Path, family: str, tied: bool) -> None:
    """Where all have the same size of stream at every token one norm is each one's: twice a model, and the same model
    with heads, neurons and channels in any order, are that model, whatever the shares."""
    part = make_checkpoint(tmp_path / "part", family, tied, **variant(family))
    plan = written([part, part, part], tmp_path / "dense", [0.5, 0.3, 0.2])
    logits = stock_logits(tmp_path / "dense", some_ids())
    assert apart(logits, stock_logits(part, some_ids())) <= BOUND
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    assert config["hidden_size"] == 3 * 32 and "auto_map" not in config and not plan.exact
    assert type(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense")).__module__.startswith(
        "transformers.models."
    )


@RMS
@both_ways
@torch.no_grad()
def test_calibrated_gains_come_nearer(tmp_path: Path, family: str, tied: bool) -> None:
    """Of a loud and a quiet model the stock norm hears the loud one; constant gains give some of the other back,
    never all: the ratio differs by token."""
    parts = [make_checkpoint(tmp_path / f"part{at}", family, tied, seed=at, **variant(family)) for at in range(2)]
    changed(parts[0], "embed_tokens", lambda value: 3 * value)
    if family in ("qwen3", "gemma3"):
        for name in ("q_norm", "k_norm"):
            for folder in parts:
                changed(folder, name, torch.zeros_like if family == "gemma3" else torch.ones_like)
    ids = some_ids(batch=8, seed=5)
    wanted = sum(stock_logits(part, some_ids()) for part in parts) / 2
    gains = stock_gains(planned(parts), ids, 2)
    written(parts, tmp_path / "plain")
    written(parts, tmp_path / "calibrated", gains=gains)
    plain, calibrated = (stock_logits(tmp_path / name, some_ids()) for name in ("plain", "calibrated"))
    errors = [float((found - wanted).pow(2).mean().sqrt() / wanted.std()) for found in (plain, calibrated)]
    assert errors[0] > WRONG and errors[1] < 0.9 * errors[0], errors


@torch.no_grad()
def test_gains_are_sequential_and_exact_for_a_constant_ratio(tmp_path: Path) -> None:
    """A model beside itself with louder stream weights: the ratio is the same at every token, and gains undo it."""
    parts = [make_checkpoint(tmp_path / f"part{at}", "llama", seed=3, rms_norm_eps=1e-12) for at in range(2)]
    for fragment in ("embed_tokens", "o_proj", "down_proj"):
        changed(parts[1], fragment, lambda value: 5 * value)  # its norms undo it: the same function
    one = stock_logits(parts[0], some_ids())
    assert apart(stock_logits(parts[1], some_ids()), one) <= BOUND
    written(parts, tmp_path / "plain")
    assert apart(stock_logits(tmp_path / "plain", some_ids()), one) >= WRONG
    written(parts, tmp_path / "calibrated", gains=stock_gains(planned(parts), some_ids(seed=7), 2))
    assert apart(stock_logits(tmp_path / "calibrated", some_ids()), one) <= BOUND


@pytest.mark.parametrize(
    ("family", "second", "match"),
    [
        ("llama", {"hidden_size": 48}, "hidden=32 and part1 hidden=48: a stock model has one for all"),
        ("llama", {"intermediate_size": 40}, "ffn=48 and part1 ffn=40"),
        ("llama", {"rope_theta": 500.0}, "ropes="),
        ("llama", {"rms_norm_eps": 1e-2}, "epsilon="),
        ("llama", {"num_hidden_layers": 2}, "layers=3 and part1 layers=2"),
        ("gpt2", {}, "LayerNorm"),
        ("gemma2", {}, "caps its logits"),
    ],
)
def test_what_a_stock_model_cannot_hold(tmp_path: Path, family: str, second: dict[str, Any], match: str) -> None:
    parts = made(tmp_path, family, False, [{}, second])
    with pytest.raises(TltError, match=match) as error:
        stock_layout(sources_of([part.folder for part in parts]))
    assert "\n" not in str(error.value)


def test_tables_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few rows at a time where a file has the table as it is; one that lies beside others is read whole, once."""
    parts = [make_checkpoint(tmp_path / f"part{at}", "llama", seed=at) for at in range(3)]
    merged(tmp_path / "merged", [opened(part) for part in parts[:2]])
    monkeypatch.setattr(stock_module, "_ROWS", 10 * 3 * 32)  # ten rows of three models
    sources = [tmp_path / "merged", parts[2]]
    (table,) = [one for one in stock_layout(sources_of(sources)).tensors if "embed_tokens" in one.name]
    values, read = together([opened(folder).checkpoint for folder in sources]), list[tuple[str, int]]()

    class Seen:
        """What reads, and remembers how many rows of what."""

        def read(self, name: str) -> torch.Tensor:
            raise AssertionError(f"{name} is read as a whole")

        def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
            read.append((name[:2], stop - start))
            return values.read_rows(name, start, stop)

    assert table.compute is not None
    whole = torch.cat(list(table.compute(Seen())))
    assert torch.equal(whole, torch.cat([weights_of(part)["model.embed_tokens.weight"] for part in parts], dim=1))
    assert read.count(("1:", 1)) == 2 and sorted(read)[2:] == [("2:", 7), *[("2:", 10)] * 9]
    (plain,) = [one for one in stock_layout(sources_of(parts)).tensors if "embed_tokens" in one.name]
    assert (plain.work, table.work) == (16 * 10 * 3 * 32, 16 * 97 * 3 * 32)


def test_gains_of_heads_must_agree(tmp_path: Path) -> None:
    folders = [make_checkpoint(tmp_path / f"part{at}", "qwen3", seed=at) for at in range(2)]
    values = together([opened(folder).checkpoint for folder in folders])
    with pytest.raises(TltError, match=r"[qk]_norm\.weight differs"):
        check_head_norms(sources_of(folders), values)
    check_head_norms(sources_of([folders[0]] * 2), together([opened(folders[0]).checkpoint] * 2))


def test_as_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The damage stands in the table, in the JSON and on the card; with text its perplexities and less of it."""
    monkeypatch.setenv("_TYPER_FORCE_DISABLE_TERMINAL", "1")
    monkeypatch.chdir(tmp_path)
    for at in range(2):
        make_checkpoint(tmp_path / f"part{at}", "llama", seed=at, vocab_size=300)
    changed(tmp_path / "part0", "embed_tokens", lambda value: 3 * value)
    (tmp_path / "t.txt").write_text("Es waren einmal zwei kleine Modelle, die rechneten wie eines. " * 60)

    def report(*more: str) -> Any:
        result = CliRunner().invoke(app, ["merge", "part0", "part1", "--layout", "stock", *more, "--json"])
        assert result.exit_code == 0, result.stderr
        return json.loads(result.stdout), result.stderr

    plain, said = report("-o", "plain")
    assert "KL from the mean, random" in said and plain["damage"]["random"]["kl"] > 0.01
    assert plain["verification"]["relative"] <= plain["verification"]["bound"] and not plain["exact"]
    fitted, _ = report("-o", "fitted", "--calibration", "t.txt")
    assert fitted["damage"]["random"]["kl"] < plain["damage"]["random"]["kl"]
    assert set(fitted["damage"]["text"]["perplexity"]) == {"mean", "stock"}
    assert fitted["command"] == "tlt merge part0 part1 --layout stock --calibration t.txt"
    card = (tmp_path / "fitted" / "README.md").read_text()
    assert "is not the mean of their logits" in card and "perplexity, text" in card
    assert not list((tmp_path / "fitted").glob("*.py"))
    ids = sample_tokens(opened(tmp_path / "part0").fitted)
    wanted = sum(stock_logits(tmp_path / f"part{at}", ids) for at in range(2)) / 2
    lost = apart(stock_logits(tmp_path / "fitted", ids), wanted)
    assert lost == pytest.approx(fitted["damage"]["random"]["relative"], rel=1e-3), "as transformers measures it"
    before = (tmp_path / "fitted" / "model.safetensors").read_bytes()
    report("-o", "fitted", "--calibration", "t.txt", "--force")
    assert (tmp_path / "fitted" / "model.safetensors").read_bytes() == before
    dry, said = report("-o", "dry", "--dry-run")
    assert "damage" not in dry and "found when it is written" in said
    for wrong, match in (
        (["--layout", "dense"], "expected grouped or stock"),
        (["--calibration", "t.txt"], "--layout stock"),
        (["--layout", "stock", "--vocab", "union"], "one vocabulary"),
    ):
        result = CliRunner().invoke(app, ["merge", "part0", "part1", *wrong, "-o", "no"])
        assert result.exit_code == 2 and match in result.stderr
