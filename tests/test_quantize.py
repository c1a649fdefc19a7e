"""Factors as 8-bit integers: what the codes say is what every reader computes and what is reported."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from factored import FULL, MIX, WAYS, Case, apart, case, modules_cache, remote  # noqa: F401
from family_zoo import ZOO, make_checkpoint, some_ids, stock_logits
from growing import opened
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from tlt_cli.checkpoint.writer import write
from tlt_cli.cli import app
from tlt_cli.errors import TltError
from tlt_cli.model.weights import load_checkpoint
from tlt_cli.surgery.fold import fold
from tlt_cli.surgery.lowrank import factored_plan
from tlt_cli.surgery.quantize import LARGEST, Codes, quantized, rounded

BOUND = 2e-5
TEXT = "".join(f"{n} little words, {n * n % 97} of them said twice; " for n in range(400))
everywhere = pytest.mark.parametrize("family", ZOO)
both_ways = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
pytestmark = pytest.mark.usefixtures("modules_cache")
SLOT = "model.layers.2.self_attn.q_proj"


def coded(folder: Path, made: Case) -> Path:
    """The case with its factors as codes."""
    source, factors = made.source, made.factors.__getitem__
    plan = factored_plan(source.fitted, source.dtypes, made.factored, factors, ffn=made.kept, bits=8)
    return replace(made, plan=plan).write(folder)


def products(folder: Path, made: Case) -> Case:
    """The case with the products that the file's own codes make, each of them multiplied out here."""
    stored = load_file(folder / "model.safetensors")
    found = {}
    for one in made.factored:
        slot, owner = one.matrix.name, one.shared_with or one.matrix.name
        a, b = (
            stored[f"{name}.weight"].double() * stored[f"{name}.scale"].double()[:, None]
            for name in (f"{owner}.lowrank_a", f"{slot}.lowrank_b")
        )
        size, product = len(made.products[one.matrix]), b @ a
        if f"{slot}.lowrank_rows" in stored:
            rows, whole = stored[f"{slot}.lowrank_rows"], torch.empty(size, a.shape[1], dtype=torch.float64)
            start = json.loads((folder / "config.json").read_text())["lowrank"]["pivoted"][slot][0]
            others = [row for row in range(size) if row not in rows.tolist()]
            whole[rows], whole[others] = a[start : start + len(rows)], product
            product = whole
        found[one.matrix] = product.T if one.matrix.role == "embedding" and one.matrix.transposed else product
    return replace(made, products=found)


def loaded(folder: Path, **options: Any) -> Any:
    source = opened(folder)
    return load_checkpoint(source.checkpoint, source.fitted, **options)


def changed(folder: Path, tensors: Mapping[str, Tensor | None]) -> None:
    """The file with these tensors in it, or (None) without them."""
    file = folder / "model.safetensors"
    kept = {name: tensor for name, tensor in load_file(file).items() if name not in tensors}
    save_file({**kept, **{n: t for n, t in tensors.items() if t is not None}}, file, {"format": "pt"})


def folded(folder: Path, source: Path) -> Path:
    made = opened(source)
    plan = fold(made.fitted, made.dtypes)
    write(folder, plan.tensors, made.checkpoint, config=plan.config, metadata={"format": "pt"}, jobs=1)
    return folder


def tlt(*arguments: str | Path) -> Any:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], prog_name="tlt")
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def report_of(*arguments: str | Path) -> dict[str, Any]:
    result = tlt(*arguments, "--json", "-q")
    assert result.exit_code == 0, result.stderr
    report: dict[str, Any] = json.loads(result.stdout)
    return report


# --- rounding -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_no_entry_is_off_by_more_than_half_a_code(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    matrix = torch.randn(40, 30, generator=generator) * torch.logspace(-1, 4, 40)[:, None]
    matrix[7] = 0.0
    made = rounded(matrix, dtype)
    assert made.codes.dtype == torch.int8 and made.scale.dtype == dtype and bool((made.codes != -128).all())
    most = made.codes.int().abs().amax(1)
    assert most[7] == 0 and bool((most[torch.arange(40) != 7] >= LARGEST - 1).all()), "a row does not use its codes"
    clipped = torch.finfo(dtype).eps * matrix.abs().amax(1, keepdim=True)  # where the scale itself was rounded down
    assert bool(((made.values() - matrix).abs() <= 0.5001 * made.scale.double()[:, None] + clipped).all())


def noise(a: Tensor, b: Tensor, made: tuple[Codes, Codes], moment: Tensor, *, pivoted: bool = False) -> float:
    """The squared distance from b @ a in the metric, and of the rows that pivots keep."""
    right, left = (one.values() for one in made)
    off = b @ a - left @ right
    found = float(((off @ moment) * off).sum())
    return found + float((((a - right) @ moment) * (a - right)).sum()) if pivoted else found


@pytest.mark.parametrize("pivoted", [False, True])
@pytest.mark.parametrize("kind", ["whole", "singular", "diagonal", "none"])
def test_refitting_halves_what_rounding_costs(kind: str, pivoted: bool) -> None:
    generator = torch.Generator().manual_seed(2)
    a, b = (torch.randn(*size, generator=generator, dtype=torch.float64) for size in ((12, 50), (60, 12)))
    seen = torch.randn(50 if kind == "whole" else 6, 50, generator=generator, dtype=torch.float64)
    moment = seen.T @ seen / len(seen)
    given = {"whole": moment, "singular": moment, "diagonal": moment.diagonal(), "none": None}[kind]
    meant = torch.eye(50, dtype=torch.float64) if given is None else torch.diag(given) if given.dim() == 1 else given
    plain = noise(a, b, (rounded(a), rounded(b)), meant, pivoted=pivoted)
    found = noise(a, b, quantized(a, b, inputs=given, pivoted=pivoted), meant, pivoted=pivoted)
    assert found < (0.9 if pivoted else 0.75) * plain
    assert noise(a, b, quantized(a, b, pivoted=pivoted), meant, pivoted=pivoted) < 2 * plain
    if kind == "singular":
        blind = noise(a, b, quantized(a, b, pivoted=pivoted), meant, pivoted=pivoted)
        assert found < 0.9 * blind, "the metric made no difference"


def test_unlike_columns_share_the_range_of_a_row() -> None:
    """The columns of b may be of any length: what is rounded is b with columns alike, for the scales of a are free."""
    generator = torch.Generator().manual_seed(3)
    a, b = (torch.randn(*size, generator=generator, dtype=torch.float64) for size in ((10, 30), (40, 10)))
    lengths, meant = torch.logspace(-6, 2, 10, dtype=torch.float64), torch.eye(30, dtype=torch.float64)
    uneven, wide = a / lengths[:, None], b * lengths
    found = noise(uneven, wide, quantized(uneven, wide), meant)
    assert found == pytest.approx(noise(a, b, quantized(a, b), meant), rel=0.2)
    assert noise(uneven, wide, (rounded(uneven), rounded(wide)), meant) > 100 * found


@pytest.mark.parametrize("pivoted", [False, True])
def test_factors_of_nothing(pivoted: bool) -> None:
    for a, b in ((torch.zeros(3, 8), torch.zeros(9, 3)), (torch.ones(3, 8), torch.zeros(9, 3))):
        for moment in (None, torch.zeros(8, 8)):
            right, left = quantized(a, b, inputs=moment, pivoted=pivoted)
            assert bool((left.values() @ right.values()).isfinite().all())
            assert not (left.values() @ right.values()).any()


# --- what is computed -----------------------------------------------------------------------------------------


@everywhere
@both_ways
@torch.no_grad()
def test_every_reader_computes_what_the_codes_say(tmp_path: Path, family: str, tied: bool) -> None:
    """Law 6: folded = dense = decoder, in memory and streamed, = the code in the folder."""
    made = case(tmp_path / "source", family, MIX, tied=tied)
    folder, ids = coded(tmp_path / "coded", made), some_ids()
    stored = load_file(folder / "model.safetensors")
    for name, tensor in stored.items():
        if ".lowrank_" in name and not name.endswith("rows"):
            assert tensor.dtype == (torch.int8 if name.endswith(".weight") else torch.float32), name
    dense = stock_logits(products(folder, made).dense(tmp_path / "dense"), ids)
    decoder = loaded(folder)
    whole = decoder(ids)
    assert apart(whole, dense) <= BOUND
    assert apart(loaded(folder, stream=True)(ids), dense) <= BOUND
    assert apart(remote(folder)(ids).logits, dense) <= BOUND
    assert apart(stock_logits(folded(tmp_path / "plain", folder), ids), dense) <= BOUND
    assert 100 * BOUND < apart(dense, stock_logits(made.dense(tmp_path / "floats"), ids)) < 0.5
    cache = decoder.new_cache()
    pieces = [decoder(ids[:, :11], cache), *(decoder(ids[:, t : t + 1], cache) for t in range(11, ids.shape[1]))]
    assert apart(torch.cat(pieces, dim=1), whole) <= BOUND
    wrong = next(name for name in stored if name.endswith(".lowrank_b.scale"))
    changed(folder, {wrong: stored[wrong].flip(0)})
    for logits in (loaded(folder)(ids), remote(folder)(ids).logits):
        assert apart(logits, dense) > 100 * BOUND, "scales in another order must show"


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@torch.no_grad()
def test_every_way_of_storing(tmp_path: Path, family: str, way: str) -> None:
    made = case(tmp_path / "source", family, WAYS[way])
    folder, ids = coded(tmp_path / "coded", made), some_ids()
    dense = stock_logits(products(folder, made).dense(tmp_path / "dense"), ids)
    assert apart(remote(folder)(ids).logits, dense) <= BOUND
    assert apart(loaded(folder, stream=True)(ids), dense) <= BOUND
    assert apart(stock_logits(folded(tmp_path / "plain", folder), ids), dense) <= BOUND


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
@both_ways
@torch.no_grad()
def test_embeddings_and_heads(tmp_path: Path, family: str, tied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tlt_cli.model.decoder.HEAD_ROWS", 40)
    only = ["*.wte" if family == "gpt2" else "*.embed_tokens", *([] if tied else ["lm_head"])]
    made = case(tmp_path / "source", family, WAYS["plain"], tied=tied, only=only)
    folder, ids = coded(tmp_path / "coded", made), some_ids()
    dense = stock_logits(folded(tmp_path / "plain", folder), ids)
    assert apart(dense, stock_logits(made.dense(tmp_path / "floats"), ids)) < 0.5
    for logits in (loaded(folder)(ids), loaded(folder, stream=True)(ids), remote(folder)(ids).logits):
        assert apart(logits, dense) <= BOUND


@torch.no_grad()
def test_full_rank_is_the_model_up_to_rounding(tmp_path: Path) -> None:
    made = case(tmp_path / "source", "llama", FULL)
    ids = some_ids()
    assert apart(loaded(coded(tmp_path / "coded", made))(ids), stock_logits(tmp_path / "source", ids)) < 0.2


# --- what refuses ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    {
        f"{SLOT}.lowrank_b.scale": None,
        "model.layers.0.mlp.up_proj.lowrank_a.scale": None,
        f"{SLOT}.lowrank_a.scale": torch.ones(5),
        "model.layers.1.self_attn.q_proj.lowrank_a.scale": torch.ones(24),  # its factor is another one's
        "model.layers.0.input_layernorm.scale": torch.ones(32),
    }.items(),
)
def test_scales_that_do_not_fit_are_named(tmp_path: Path, name: str, value: Tensor | None) -> None:
    folder = coded(tmp_path / "coded", case(tmp_path / "source", "llama", MIX))
    loaded(folder)
    changed(folder, {name: value})
    with pytest.raises(TltError) as ours:
        loaded(folder)
    assert name in str(ours.value)
    with pytest.raises((ValueError, RuntimeError)):
        remote(folder)


@pytest.mark.parametrize("stream", [True, False])
def test_codes_that_are_none(tmp_path: Path, stream: bool) -> None:
    folder = coded(tmp_path / "coded", case(tmp_path / "source", "llama", MIX))
    name = f"{SLOT}.lowrank_b.weight"
    changed(folder, {name: load_file(folder / "model.safetensors")[name].float()})
    with pytest.raises(TltError, match=r"q_proj\.lowrank_b\.weight is stored as float32, .* int8"):
        loaded(folder, stream=stream)(some_ids())


@pytest.mark.parametrize(
    ("bits", "says"), [(4, "lowrank.bits must be 8"), (True, "bits"), (None, "scale is in the file")]
)
def test_bits_that_config_json_cannot_say(tmp_path: Path, bits: Any, says: str) -> None:
    folder = coded(tmp_path / "coded", case(tmp_path / "source", "llama", MIX))
    config = json.loads((folder / "config.json").read_text())
    assert config["lowrank"]["bits"] == 8
    config["lowrank"] = {**config["lowrank"], "bits": bits}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(TltError, match=says):
        loaded(folder)


# --- training and transformers --------------------------------------------------------------------------------


def test_scales_learn_and_codes_stay(tmp_path: Path) -> None:
    folder = coded(tmp_path / "coded", case(tmp_path / "source", "llama", MIX))
    decoder = loaded(folder)
    buffers = dict(decoder.named_buffers())
    codes = {name for name in decoder.stored if name.endswith((".lowrank_a.weight", ".lowrank_b.weight"))}
    assert codes and codes <= buffers.keys() and all(buffers[name].dtype == torch.int8 for name in codes)
    decoder(some_ids()).square().mean().backward()
    scales = 0
    for name, parameter in decoder.named_parameters():
        assert parameter.is_floating_point() and parameter.grad is not None, name
        if name.endswith(".scale") and parameter.numel():
            scales += 1
            assert parameter.grad.abs().sum() > 0, name
    assert scales > len(codes) / 2


def test_it_is_saved_and_read_again_in_transformers(tmp_path: Path) -> None:
    folder, ids = coded(tmp_path / "coded", case(tmp_path / "source", "llama", MIX)), some_ids()
    model = remote(folder)
    model(ids, labels=ids).loss.backward()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.sub_((0.1 if name.endswith("scale") else 0.0) * parameter.grad)
        expected = model(ids).logits
        assert apart(expected, remote(folder)(ids).logits) > 100 * BOUND
        model.save_pretrained(tmp_path / "saved")
        assert torch.equal(remote(tmp_path / "saved")(ids).logits, expected)
        assert apart(loaded(tmp_path / "saved")(ids), expected) <= BOUND
        half = remote(folder, dtype=torch.bfloat16)
        assert dict(half.named_buffers())[f"{SLOT}.lowrank_b.weight"].dtype == torch.int8
        assert apart(half(ids).logits.float(), remote(folder)(ids).logits) < 0.5


# --- the command ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_checkpoint(tmp_path_factory.mktemp("model") / "llama", "llama", vocab_size=256)
    (folder.parent / "text.txt").write_text(TEXT)
    return folder


@pytest.mark.parametrize("method", ["svd", "weighted", "fisher", "kfac", "activation", "whiten"])
def test_bytes_and_errors_are_those_of_the_file(llama: Path, tmp_path: Path, method: str) -> None:
    text: list[str | Path] = [] if method == "svd" else ["--calibration", llama.parent / "text.txt", "--context", "48"]
    words: list[str | Path] = ["factor", llama, "--rank", "6", "--method", method, "--refine", "none", *text]
    report = report_of(*words, "--bits", "8", "-o", tmp_path / "coded")
    floats = report_of(*words, "-o", tmp_path / "floats")
    source, stored = load_file(llama / "model.safetensors"), load_file(tmp_path / "coded" / "model.safetensors")
    size = sum(tensor.nbytes for tensor in stored.values())
    assert report["bits"] == 8 and "--bits 8" in report["command"]
    assert report["tensor_bytes"] == {"from": sum(tensor.nbytes for tensor in source.values()), "to": size}
    assert sum(tensor["bytes"] for tensor in report["tensors"]) == size < floats["tensor_bytes"]["to"]
    lost = total = 0.0
    for slot, rank in report["ranks"].items():
        weight = source[f"{slot}.weight"].double()
        written = weight
        if rank is not None:
            a, b = (
                stored[f"{slot}.{kind}.weight"].double() * stored[f"{slot}.{kind}.scale"].double()[:, None]
                for kind in ("lowrank_a", "lowrank_b")
            )
            written = b @ a
        error = float((weight - written).norm() / weight.norm())
        assert report["verification"]["errors"][slot] == pytest.approx(error, rel=1e-6, abs=1e-12), slot
        lost, total = lost + float((weight - written).norm() ** 2), total + float(weight.norm() ** 2)
    assert report["verification"]["error"] == pytest.approx((lost / total) ** 0.5, rel=1e-6)
    assert 1e-4 < report["verification"]["rounding"] < 0.02
    assert report["verification"]["error"] != floats["verification"]["error"]


def test_the_same_command_gives_the_same_bytes_and_a_dry_run_says_which(llama: Path, tmp_path: Path) -> None:
    words: list[str | Path] = ["factor", llama, "--keep", "0.5", "--bits", "8"]
    dry = report_of(*words, "-o", tmp_path / "one", "--dry-run")
    one, two = (report_of(*words, "-o", tmp_path / name) for name in ("one", "two"))
    assert dry["tensors"] == one["tensors"] and dry["tensor_bytes"] == one["tensor_bytes"] == two["tensor_bytes"]
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert first == second


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@torch.no_grad()
def test_scales_are_in_the_dtype_that_is_written(llama: Path, tmp_path: Path, dtype: str) -> None:
    words: list[str | Path] = ["--rank", "6", "--bits", "8", "--dtype", dtype]
    report = report_of("factor", llama, *words, "-o", tmp_path / "coded")
    stored = load_file(tmp_path / "coded" / "model.safetensors")
    kinds = {str(tensor.dtype).removeprefix("torch.") for name, tensor in stored.items() if ".lowrank_" in name}
    assert kinds == {"int8", dtype}
    full = report_of("factor", llama, *words[:4], "-o", tmp_path / "full")
    assert report["verification"]["rounding"] < 1.2 * full["verification"]["rounding"], "codes of other scales"
    plain = report_of("fold", tmp_path / "coded", "-o", tmp_path / "plain")
    assert {tensor["dtype"] for tensor in plain["tensors"]} == {{"bfloat16": "BF16", "float16": "F16"}[dtype]}


def test_the_calibrated_default(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shared and pivoted factors, neurons that go, tuned blocks."""
    monkeypatch.setattr("tlt_cli.cli.compressing.STEPS", 3)
    text: list[str | Path] = ["--calibration", llama.parent / "text.txt", "--context", "48"]
    report = report_of("factor", llama, "--keep", "0.5", *text, "--bits", "8", "-o", tmp_path / "coded")
    stored, found = load_file(tmp_path / "coded" / "model.safetensors"), report["verification"]
    assert any(name.endswith("lowrank_rows") for name in stored)
    assert report["tensor_bytes"]["to"] == sum(tensor.nbytes for tensor in stored.values())
    assert report["refine"] == "block" and 1e-4 < found["rounding"] < 0.03 and found["kl"] > 0
    report_of("fold", tmp_path / "coded", "-o", tmp_path / "plain")
    ids = some_ids(vocab=256)
    with torch.no_grad():
        plain = stock_logits(tmp_path / "plain", ids)
        assert apart(remote(tmp_path / "coded")(ids).logits, plain) <= 10 * BOUND
        assert apart(loaded(tmp_path / "coded")(ids), plain) <= 10 * BOUND
    shown = tlt("inspect", tmp_path / "coded", "--json")
    assert shown.exit_code == 0 and "I8" in shown.stdout
    read = report_of("eval", tmp_path / "coded", "--data", llama.parent / "text.txt", "--context", "48")
    same = report_of("eval", tmp_path / "plain", "--data", llama.parent / "text.txt", "--context", "48")
    assert read["perplexity"] == pytest.approx(same["perplexity"], rel=1e-4)


def test_codes_that_are_not_those_of_the_factors_are_not_written(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dropped(*arguments: Any, **options: Any) -> tuple[Codes, Codes]:
        right, left = quantized(*arguments, **options)
        return right, Codes(left.codes, torch.ones_like(left.scale))

    monkeypatch.setattr("tlt_cli.surgery.lowrank.quantized", dropped)
    monkeypatch.setattr("tlt_cli.cli.compressing.STEPS", 1)
    text: list[str | Path] = ["--calibration", llama.parent / "text.txt", "--context", "48"]
    ways: list[list[str | Path]] = [["--rank", "6"], ["--keep", "0.5", *text]]
    for words in ways:
        result = tlt("factor", llama, *words, "--bits", "8", "-o", tmp_path / "bad")
        assert result.exit_code == 1 and "verification failed" in result.stderr and not (tmp_path / "bad").exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--rank", "4", "--bits", "4"], "--bits 4"),
        (["--rank", "4", "--bits", "0"], "--bits 0"),
        (["--rank", "4", "--bits", "8", "--format", "dense"], "--format dense"),
        (["--rank-sweep", "--bits", "8"], "sweep"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(llama: Path, tmp_path: Path, words: list[str], says: str) -> None:
    output = [] if "--rank-sweep" in words else ["-o", str(tmp_path / "out")]
    result = tlt("factor", llama, *words, *output)
    assert result.exit_code == 2 and says in result.stderr and len(result.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("size", [1.0, 1e-4, 1e-6])
def test_scales_of_small_matrices_fit_into_float16(size: float) -> None:
    """Codes of a matrix of small numbers lose no more than those of a large one; the control takes scales as they come,
    all of the smallness in those of a's rows."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.linalg.qr(torch.randn(60, 6, generator=generator))[0].T, torch.randn(50, 6, generator=generator)
    whole = size * b.double() @ a.double()
    right, left = quantized(size * a, b, dtype=torch.float16)
    lost = float((whole - left.values() @ right.values()).norm() / whole.norm())
    assert lost <= 0.015
    plain = rounded(size * a, torch.float16).values()
    assert (float((plain - size * a).norm() / (size * a).norm()) <= 0.015) == (size > 1e-6)
