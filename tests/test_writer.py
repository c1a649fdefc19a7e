"""Writing is the identity, whole or not at all, and gives the same bytes however many threads or processes do it."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from family_zoo import make_checkpoint, some_ids, stock_logits
from safetensors import safe_open
from safetensors.torch import save_file

from tlt_cli.checkpoint import files, filling, staging
from tlt_cli.checkpoint.cast import safetensors_dtype
from tlt_cli.checkpoint.planned import PlannedTensor, Tensors
from tlt_cli.checkpoint.reader import Checkpoint, open_checkpoint
from tlt_cli.checkpoint.record import companions
from tlt_cli.checkpoint.writer import Written, parse_size, plan_files, write
from tlt_cli.errors import TltError, UsageError

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
OTHERS = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool]


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    return torch.randint(0, 2, shape, generator=generator).to(dtype)


def every_dtype() -> dict[str, torch.Tensor]:
    tensors = {f"t.{dtype}": random_tensor((7, 5), dtype, seed) for seed, dtype in enumerate([*FLOATS, *OTHERS])}
    return {**tensors, "scalar": torch.tensor(3.5), "empty": torch.zeros(0, 4), "vector": torch.arange(11.0)}


def copies(source: Checkpoint) -> list[PlannedTensor]:
    return [PlannedTensor(info.name, info.shape, info.dtype, info.name) for info in source.tensors.values()]


def doubled(source: Checkpoint, dtype: str | None = None, factor: float = 2.0) -> list[PlannedTensor]:
    """Every tensor times `factor`, two rows at a time."""

    def compute(name: str) -> Callable[[Tensors], Iterator[torch.Tensor]]:
        def blocks(values: Tensors) -> Iterator[torch.Tensor]:
            whole = values.read(name).float() * factor
            yield from (torch.split(whole, 2) if whole.dim() else (whole,))

        return blocks

    return [
        PlannedTensor(info.name, info.shape, dtype or info.dtype, info.name, compute(info.name), 1000)
        for info in source.tensors.values()
    ]


def save(path: Path, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any] | None = None) -> Checkpoint:
    """A folder with one weight file."""
    path.mkdir()
    save_file(dict(tensors), path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps(config or {"hidden_size": 5}))
    return open_checkpoint(path)


def put(output: Path, source: Checkpoint, tensors: list[PlannedTensor] | None = None, **options: Any) -> Written:
    config = options.pop("config", source.config or {})
    return write(output, tensors or copies(source), source, config=config, metadata={}, **options)


def contents(path: Path) -> dict[str, bytes]:
    if path.is_file():
        return {"": path.read_bytes()}
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in path.rglob("*") if file.is_file()}


@pytest.fixture
def source(tmp_path: Path) -> Checkpoint:
    tensors = {f"w{number}": random_tensor((10, 8 + number), torch.float32, number) for number in range(9)}
    return save(tmp_path / "source", tensors)


@pytest.mark.parametrize("name", ["out", "out.safetensors", "out.st", "new/deep/out"])
def test_write_then_read_is_the_identity(tmp_path: Path, name: str) -> None:
    tensors = every_dtype()
    source = save(tmp_path / "source", tensors)
    written = put(tmp_path / name, source)
    again = open_checkpoint(tmp_path / name)
    assert again.config == source.config
    assert {key: (info.dtype, info.shape) for key, info in again.tensors.items()} == {
        key: (info.dtype, info.shape) for key, info in source.tensors.items()
    }
    for key, tensor in tensors.items():
        assert torch.equal(again.read(key).view(tensor.dtype), tensor), key
    assert written.parameters == sum(tensor.numel() for tensor in tensors.values())
    assert written.bytes == sum(map(len, contents(tmp_path / name).values()))
    assert set(written.files) == (set(contents(tmp_path / name)) if written.path.is_dir() else {written.path.name})
    assert list(tmp_path.glob("**/*.partial*")) == []


def test_bytes_are_those_of_safetensors(tmp_path: Path) -> None:
    source = save(tmp_path / "source", every_dtype())
    put(tmp_path / "out", source)
    theirs = (tmp_path / "source" / "model.safetensors").read_bytes()
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == theirs
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as opened:
        assert set(opened.keys()) == set(source.tensors)


@pytest.mark.parametrize("dtype", FLOATS)
def test_casts_and_computed_tensors_are_rounded_once(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {f"t.{source}": random_tensor((7, 5), source, seed) for seed, source in enumerate(FLOATS)}
    source = save(tmp_path / "source", tensors)
    target = safetensors_dtype(dtype)
    cast = [PlannedTensor(name, (7, 5), target, name) for name in tensors]
    put(tmp_path / "cast", source, cast)
    put(tmp_path / "doubled", source, doubled(source, target))
    for name, tensor in tensors.items():
        got = open_checkpoint(tmp_path / "cast").read(name)
        assert torch.equal(got.double(), tensor.to(dtype).double()), name
        got = open_checkpoint(tmp_path / "doubled").read(name)
        assert torch.equal(got.double(), (tensor.float() * 2).to(dtype).double()), name


@pytest.mark.parametrize("limit", [None, 700, 10_000])
def test_same_bytes_whatever_jobs_is(tmp_path: Path, source: Checkpoint, limit: int | None) -> None:
    for jobs in (1, 2, 7):
        put(tmp_path / f"out{jobs}", source, doubled(source), max_shard_size=limit, jobs=jobs)
    assert contents(tmp_path / "out1") == contents(tmp_path / "out2") == contents(tmp_path / "out7")


def test_memory_of_the_work_in_flight_is_bounded(tmp_path: Path, source: Checkpoint) -> None:
    running: list[str] = []
    seen: list[set[str]] = []

    def plan(name: str, work: int) -> PlannedTensor:
        info = source.tensors[name]

        def blocks(values: Tensors) -> Iterator[torch.Tensor]:
            running.append(name)
            time.sleep(0.01)
            seen.append(set(running))
            yield values.read(name)
            running.remove(name)

        return PlannedTensor(name, info.shape, info.dtype, name, blocks, work)

    budget = 4 * filling._BUDGET_PER_JOB
    put(tmp_path / "small", source, [plan(name, budget // 4) for name in source.tensors], jobs=4)
    assert max(map(len, seen)) > 1  # else the next line says nothing
    seen.clear()
    put(tmp_path / "large", source, [plan(name, budget + 1) for name in source.tensors], jobs=4)
    assert max(map(len, seen)) == 1


def test_threads_of_torch_are_as_before(tmp_path: Path, source: Checkpoint) -> None:
    before = torch.get_num_threads()
    inside = []

    def look(values: Tensors) -> Iterator[torch.Tensor]:
        inside.append(torch.get_num_threads())
        yield values.read("w0")

    put(tmp_path / "out", source, [PlannedTensor("w0", (10, 8), "F32", "w0", look)], jobs=2)
    assert (inside, torch.get_num_threads()) == ([1], before)


def test_shards_by_size(tmp_path: Path, source: Checkpoint) -> None:
    put(tmp_path / "out", source, max_shard_size=1000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    opened = open_checkpoint(tmp_path / "out")
    sizes = {shard: sum(t.nbytes for t in opened.tensors.values() if t.file == shard) for shard in opened.shards}
    assert max(sizes.values()) <= 1000
    assert min(left + right for left, right in zip(list(sizes.values()), list(sizes.values())[1:], strict=False)) > 1000
    count = len(opened.shards)
    assert opened.shards == tuple(f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1))
    total = sum(info.nbytes for info in source.tensors.values())
    assert index["metadata"] == {"total_size": total, "total_parameters": total // 4}
    assert index["weight_map"] == {name: info.file for name, info in opened.tensors.items()}
    # One tensor larger than the limit gets a file of its own.
    put(tmp_path / "tiny", source, max_shard_size=1)
    assert len(open_checkpoint(tmp_path / "tiny").shards) == len(source.tensors)


def test_sharded_like_the_input(tmp_path: Path, source: Checkpoint) -> None:
    put(tmp_path / "sharded", source, max_shard_size=1000)
    sharded = open_checkpoint(tmp_path / "sharded")
    extra = PlannedTensor("w0.bias", (4,), "F32", "", lambda _: iter([torch.zeros(4)]))
    planned = doubled(sharded)
    put(tmp_path / "again", sharded, [planned[0], extra, *planned[1:]])
    again = open_checkpoint(tmp_path / "again")
    assert {name: info.file for name, info in again.tensors.items() if name != "w0.bias"} == {
        name: info.file for name, info in sharded.tensors.items()
    }
    assert again.tensors["w0.bias"].file == again.tensors[planned[0].name].file


@pytest.mark.parametrize(("name", "limit"), [("out", None), ("out", 1000), ("out.safetensors", None)])
def test_the_plan_knows_every_header_before_the_work(
    tmp_path: Path, source: Checkpoint, name: str, limit: int | None
) -> None:
    output, tensors = tmp_path / name, doubled(source)
    options: dict[str, Any] = {"metadata": {"tlt": "{}"}, "config": {"hidden_size": 5}, "max_shard_size": limit}
    layout = plan_files(output, tensors, source, **options)
    assert not output.exists()
    written = write(output, tensors, source, **options)
    assert layout.bytes == written.bytes
    for shard in layout.shards:
        raw = (output / shard.name if output.is_dir() else output).read_bytes()
        assert raw.startswith(shard.header)
        assert len(raw) == shard.size
    other = plan_files(output, tensors, source, **{**options, "metadata": {"tlt": "[]"}})
    assert other.shards[0].header != layout.shards[0].header


def test_a_folder_is_what_transformers_loads_and_keeps_its_companions(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "model", "llama")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "parts").mkdir()
    (folder / "parts" / "a.txt").write_text("a")
    source = open_checkpoint(folder)
    put(tmp_path / "out", source, files={**companions(source), "README.md": b"card"}, max_shard_size=10_000)
    ids = some_ids()
    assert torch.equal(stock_logits(tmp_path / "out", ids), stock_logits(folder, ids))
    found = contents(tmp_path / "out")
    assert found["parts/a.txt"] == b"a"
    assert found["README.md"] == b"card"
    assert found["generation_config.json"] == (folder / "generation_config.json").read_bytes()
    assert transformers.AutoConfig.from_pretrained(tmp_path / "out").hidden_size == 32


def test_config_keeps_the_order_of_its_keys(tmp_path: Path, source: Checkpoint) -> None:
    put(tmp_path / "out", source, config={"z": 1, "a": [{"é": None}]})
    text = (tmp_path / "out" / "config.json").read_text()
    assert list(json.loads(text)) == ["z", "a"]
    assert text == json.dumps({"z": 1, "a": [{"é": None}]}, indent=2) + "\n"


def test_progress_reaches_the_total(tmp_path: Path, source: Checkpoint) -> None:
    told: list[tuple[int, int]] = []
    put(tmp_path / "out", source, doubled(source), progress=lambda done, total: told.append((done, total)))
    total = sum(info.nbytes for info in source.tensors.values())
    assert told == sorted(told)
    assert told[-1] == (total, total)


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5_000_000_000), ("500MB", 500_000_000), ("1_000_000", 1_000_000), ("2GiB", 2 << 30), ("1.5 kb", 1500)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1", "0", "1e9", "5 XB", "five", "1.2.3", "5iB", "nan"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(TltError, match="not a size"):
        parse_size(text)


# What is refused, before any work and with nothing left.


def nothing_left(tmp_path: Path) -> bool:
    return sorted(path.name for path in tmp_path.iterdir()) == ["source"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite(tmp_path: Path, value: float) -> None:
    weights = random_tensor((9, 4), torch.bfloat16)
    weights[5, 2] = value
    source = save(tmp_path / "source", {"good": torch.ones(3, 3), "bad": weights})
    for tensors in (doubled(source), [PlannedTensor("bad", (9, 4), "F32", "bad")]):
        with pytest.raises(TltError, match="bad holds 1 NaN or infinite values of 36"):
            put(tmp_path / "out", source, tensors)
        assert nothing_left(tmp_path)
    put(tmp_path / "out", source)  # copies are not looked at


@pytest.mark.parametrize(("dtype", "fits", "too_large"), [
    ("F16", 65519.0, 65520.0), ("F8_E4M3", 463.0, 465.0), ("F8_E5M2", 61439.0, 61441.0), ("BF16", 3.389e38, 3.4e38),
])  # fmt: skip
def test_numbers_beyond_the_dtype(tmp_path: Path, dtype: str, fits: float, too_large: float) -> None:
    source = save(tmp_path / "source", {"w": torch.tensor([[1.0, fits]]), "v": torch.tensor([[1.0, -too_large]])})
    with pytest.raises(TltError, match=rf"v: .* does not fit {dtype}"):
        put(tmp_path / "out", source, [PlannedTensor("v", (1, 2), dtype, "v")])
    assert nothing_left(tmp_path)
    put(tmp_path / "out", source, [PlannedTensor("w", (1, 2), dtype, "w")])
    assert open_checkpoint(tmp_path / "out").read("w").float().isfinite().all()


@pytest.mark.parametrize("rows", [3, 5, 11])
def test_a_wrong_number_of_rows_is_a_bug(tmp_path: Path, source: Checkpoint, rows: int) -> None:
    def blocks(values: Tensors) -> Iterator[torch.Tensor]:
        yield torch.zeros(rows, 8)

    with pytest.raises(AssertionError):
        put(tmp_path / "out", source, [PlannedTensor("w", (10, 8), "F32", "w0", blocks)])
    assert nothing_left(tmp_path)


def test_outputs_that_are_refused(tmp_path: Path, source: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "source")
    alone = open_checkpoint(tmp_path / "source" / "model.safetensors")
    for output in ("source", "source/inside", "link", "link/inside", "."):
        with pytest.raises(TltError, match="the input"):
            put(tmp_path / output, source, force=True)
    with pytest.raises(TltError, match="the input"):
        put(tmp_path / "source" / "model.safetensors", alone, force=True)
    with pytest.raises(TltError, match="the input"):
        put(tmp_path / "source", alone, force=True)
    (tmp_path / "link").unlink()
    (tmp_path / "source").rename(tmp_path / "out.partial")
    with pytest.raises(TltError, match="the input"):
        put(tmp_path / "out", open_checkpoint(tmp_path / "out.partial"), force=True)
    (tmp_path / "out.partial").rename(tmp_path / "source")
    with pytest.raises(UsageError, match=r"no \.bin files"):
        put(tmp_path / "out.bin", source)
    with pytest.raises(UsageError, match="cannot be sharded"):
        put(tmp_path / "out.safetensors", source, max_shard_size=1000)
    assert nothing_left(tmp_path)
    here = tmp_path / "here"
    put(here, source)
    (here / "below").mkdir()
    monkeypatch.chdir(here / "below")
    for current in (here, Path(".."), Path()):
        with pytest.raises(TltError, match="is the current folder or holds it"):
            put(current, source, force=True)
    assert (here / "model.safetensors").is_file()


@pytest.mark.parametrize("name", ["out", "out.safetensors"])
def test_what_exists_is_replaced_only_by_force(tmp_path: Path, source: Checkpoint, name: str) -> None:
    put(tmp_path / name, source)
    before = contents(tmp_path / name)
    with pytest.raises(TltError, match="exists already; pass --force"):
        put(tmp_path / name, source, doubled(source))
    assert contents(tmp_path / name) == before
    put(tmp_path / name, source, doubled(source), force=True)
    assert contents(tmp_path / name) != before
    assert {path.name for path in tmp_path.iterdir()} == {"source", name}


def test_force_replaces_no_folder_but_a_checkpoint(tmp_path: Path, source: Checkpoint) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("dear")
    with pytest.raises(TltError, match="no checkpoint in it"):
        put(tmp_path / "home", source, force=True)
    (tmp_path / "empty").mkdir()
    put(tmp_path / "empty", source, force=True)
    (tmp_path / "file").write_text("x")
    put(tmp_path / "file", source, force=True)
    assert (tmp_path / "file").is_dir()
    (tmp_path / "theirs.partial").mkdir()
    (tmp_path / "theirs.partial" / "letter.txt").write_text("dear")
    with pytest.raises(TltError, match="is in the way"):
        put(tmp_path / "theirs", source)
    assert (tmp_path / "theirs.partial" / "letter.txt").is_file()


@pytest.mark.parametrize("existing", [False, True])
def test_without_an_exchange_of_names(
    tmp_path: Path, source: Checkpoint, monkeypatch: pytest.MonkeyPatch, existing: bool
) -> None:
    monkeypatch.setattr(staging, "_rename", staging._rename_elsewhere)
    if existing:
        put(tmp_path / "out", source)
    put(tmp_path / "out", source, doubled(source), force=existing)
    put(tmp_path / "other", source, doubled(source))
    assert contents(tmp_path / "out") == contents(tmp_path / "other")
    assert {path.name for path in tmp_path.iterdir()} == {"source", "out", "other"}


def test_an_output_that_was_moved_aside_by_a_killed_run_comes_back(tmp_path: Path, source: Checkpoint) -> None:
    put(tmp_path / "out", source)
    before = contents(tmp_path / "out")
    stage = staging.Stage(tmp_path / "out")
    stage.folder.mkdir()
    (tmp_path / "out").rename(stage.aside)
    with pytest.raises(RuntimeError, match="stop here"):
        put(tmp_path / "out", source, doubled(source), check=raising(RuntimeError("stop here")))
    assert contents(tmp_path / "out") == before


def test_two_runs_do_not_share_a_stage(tmp_path: Path, source: Checkpoint) -> None:
    def second(path: Path) -> None:
        with pytest.raises(TltError, match="another run is writing it"):
            put(tmp_path / "out", source)

    put(tmp_path / "out", source, check=second)
    assert open_checkpoint(tmp_path / "out").digest() == source.digest()


def raising(error: BaseException) -> Callable[..., Any]:
    def function(*_: object, **__: object) -> None:
        raise error

    return function


@pytest.mark.parametrize("error", [TltError("not the same function"), KeyboardInterrupt(), RuntimeError("bug")])
@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("where", ["check", "progress"])
def test_whatever_is_raised_leaves_what_was(
    tmp_path: Path, source: Checkpoint, error: BaseException, existing: bool, where: str
) -> None:
    if existing:
        put(tmp_path / "out", source)
    before = contents(tmp_path / "out")
    with pytest.raises(type(error)):
        put(tmp_path / "out", source, doubled(source), force=existing, **{where: raising(error)})
    assert contents(tmp_path / "out") == before
    assert {path.name for path in tmp_path.iterdir()} == ({"source", "out"} if existing else {"source"})


@pytest.mark.parametrize("name", ["out", "out.safetensors", "deep/out"])
def test_check_sees_the_whole_output_before_it_has_its_name(tmp_path: Path, source: Checkpoint, name: str) -> None:
    seen: list[str] = []

    def check(path: Path) -> None:
        assert not (tmp_path / name).exists()
        staged = open_checkpoint(path)
        assert staged.config == source.config
        seen.append(staged.digest())

    put(tmp_path / name, source, check=check)
    assert seen == [open_checkpoint(tmp_path / name).digest()]


@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite", "copy_file_range", "fsync"])
def test_a_full_disk_is_one_line(
    tmp_path: Path, source: Checkpoint, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    monkeypatch.setattr(os, call, raising(OSError(errno.ENOSPC, "No space left on device")))
    tensors = [*copies(source)[:4], *doubled(source)[4:]]
    with pytest.raises(TltError, match="the disk is full"):
        put(tmp_path / "new" / "out", source, tensors)
    assert nothing_left(tmp_path)


def test_too_little_room_is_said_before_the_work(
    tmp_path: Path, source: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = put(tmp_path / "out", source).bytes
    usage = shutil.disk_usage(tmp_path)._replace(free=wanted - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(TltError, match=f"take {wanted:,} bytes, but .* has {wanted - 1:,} free"):
        put(tmp_path / "more", source, doubled(source), progress=raising(AssertionError("it worked")))
    assert {path.name for path in tmp_path.iterdir()} == {"source", "out"}
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=wanted))
    put(tmp_path / "more", source)


def test_a_disk_that_cannot_do_it_the_fast_way(
    tmp_path: Path, source: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "copy_file_range", raising(OSError(errno.EXDEV, "Invalid cross-device link")))
    monkeypatch.setattr(os, "posix_fallocate", raising(OSError(errno.EOPNOTSUPP, "Operation not supported")))
    monkeypatch.setattr(files, "_COPY_BLOCK", 100)
    monkeypatch.setattr(files, "_WRITE_BLOCK", 64)
    put(tmp_path / "out", source)
    assert open_checkpoint(tmp_path / "out").digest() == source.digest()


def test_a_source_that_is_cut_short_meanwhile(tmp_path: Path, source: Checkpoint) -> None:
    path = tmp_path / "source" / "model.safetensors"
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(TltError, match="was cut short since it was opened"):
        put(tmp_path / "out", source)
    assert nothing_left(tmp_path)


# A kill at any moment.

_WRITER = """
import sys
from pathlib import Path
from tlt_cli.checkpoint.planned import PlannedTensor
from tlt_cli.checkpoint.reader import open_checkpoint
from tlt_cli.checkpoint.writer import write
source = open_checkpoint(sys.argv[1])
same = [PlannedTensor(info.name, info.shape, info.dtype, info.name) for info in source.tensors.values()]
print("ready", flush=True)
write(Path(sys.argv[2]), same, source, config=source.config, metadata={}, max_shard_size=1_000_000,
      force=sys.argv[3] == "force")
"""


@pytest.mark.parametrize("existing", [False, True])
def test_a_kill_leaves_the_old_output_or_the_new_one(tmp_path: Path, existing: bool) -> None:
    tensors = {f"w{number}": random_tensor((500, 500), torch.float32, number) for number in range(8)}
    source = save(tmp_path / "source", tensors)
    put(tmp_path / "new", source, max_shard_size=1_000_000)
    old, output = save(tmp_path / "old", {"w0": torch.zeros(3)}), tmp_path / "out"
    put(tmp_path / "old out", old)
    new_contents, old_contents = contents(tmp_path / "new"), contents(tmp_path / "old out") if existing else {}
    draw = random.Random(0)
    outcomes = []
    took = 0.03
    for _ in range(10):
        if existing:
            put(output, old, force=True)
        command = [sys.executable, "-c", _WRITER, str(tmp_path / "source"), str(output), "force" if existing else ""]
        process = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        start = time.perf_counter()
        try:
            process.wait(timeout=draw.uniform(0, took))
            took = time.perf_counter() - start
        except subprocess.TimeoutExpired:
            took *= 1.3
        process.kill()
        process.wait()
        process.stdout.close()
        found = contents(output)
        assert found in (old_contents, new_contents)
        outcomes.append(process.returncode)
        if not existing and found:
            shutil.rmtree(output)
    put(output, source, max_shard_size=1_000_000, force=existing)
    assert contents(output) == new_contents
    assert {path.name for path in tmp_path.iterdir()} <= {"source", "new", "old", "old out", "out"}
    assert -signal.SIGKILL in outcomes  # else nothing was tried


def test_copying_needs_no_torch(tmp_path: Path, source: Checkpoint) -> None:
    look = "print('torch' in sys.modules)"
    for change, needed in (("", "False"), ("info.dtype, info.name", "True")):
        code = _WRITER.replace(change, "'F16', info.name") if change else _WRITER
        output = tmp_path / needed
        command = [sys.executable, "-c", code + look, str(tmp_path / "source"), str(output), ""]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert said.split() == ["ready", needed]


_KILL_BEFORE = """
import os, shutil, signal, sys
from tlt_cli.checkpoint import staging
left = int(sys.argv[4])
def counted(function):
    def call(*arguments, **options):
        global left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **options)
    return call
for name in ("posix_fallocate", "pwrite", "copy_file_range", "fsync"):
    setattr(os, name, counted(getattr(os, name)))
staging._rename = counted(staging._rename)
shutil.rmtree = counted(shutil.rmtree)
if "in place" in sys.argv:  # the well-known wrong way: clear the place, then build there
    shutil.rmtree(sys.argv[2], ignore_errors=True)
    staging.Stage.path = property(lambda stage: stage.output)
    staging.Stage.commit = lambda stage, force: None
"""


def outputs_of_kills(tmp_path: Path, source: Checkpoint, old: Checkpoint | None, way: str) -> list[dict[str, bytes]]:
    """What lies at the output after a kill before the first, second, ... call that changes the disk."""
    output, found = tmp_path / "out", []
    for calls in range(100):
        if output.exists():
            shutil.rmtree(output)
        if old is not None:
            put(output, old)
        command = [sys.executable, "-c", _KILL_BEFORE + _WRITER, str(tmp_path / "source"), str(output)]
        ended = subprocess.run([*command, "force", str(calls), way], stdout=subprocess.DEVNULL, check=False)
        found.append(contents(output))
        if ended.returncode == 0:
            return found
        assert ended.returncode == -signal.SIGKILL
    raise AssertionError("it never ended")


@pytest.mark.parametrize("existing", [False, True])
def test_a_kill_before_any_step(tmp_path: Path, existing: bool) -> None:
    source = save(tmp_path / "source", {f"w{number}": random_tensor((500, 500), torch.float32) for number in range(2)})
    old = save(tmp_path / "old", {"w0": torch.zeros(3)}) if existing else None
    put(tmp_path / "new", source, max_shard_size=1_000_000)
    after, before = contents(tmp_path / "new"), {}
    if old is not None:
        put(tmp_path / "old out", old)
        before = contents(tmp_path / "old out")
    found = outputs_of_kills(tmp_path, source, old, "staged")
    renamed = found.index(after)
    assert found == [before] * renamed + [after] * (len(found) - renamed)
    assert 10 < renamed < len(found) - 1  # a kill behind the rename was among them
    if existing:
        naive = outputs_of_kills(tmp_path, source, old, "in place")
        assert any(state not in (before, after) for state in naive)


def test_an_interrupt_leaves_nothing(tmp_path: Path, source: Checkpoint) -> None:
    code = _WRITER.replace("force=", "check=lambda _: (print('staged', flush=True), time.sleep(60)), force=")
    command = [sys.executable, "-c", "import time" + code, str(tmp_path / "source"), str(tmp_path / "out"), ""]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert [process.stdout.readline() for _ in range(2)] == ["ready\n", "staged\n"]
    assert (tmp_path / "out.partial").exists()
    process.send_signal(signal.SIGINT)
    _, said = process.communicate()
    assert "KeyboardInterrupt" in said
    assert nothing_left(tmp_path)


# Several processes.

_RANK = """
import os, sys
from pathlib import Path
from tlt_cli.checkpoint.planned import PlannedTensor
from tlt_cli.checkpoint.reader import open_checkpoint
from tlt_cli.checkpoint.writer import write
source = open_checkpoint(sys.argv[1])
cast = [PlannedTensor(info.name, info.shape, "F16", info.name) for info in source.tensors.values()]
def progress(done, total):
    if os.environ["RANK"] == sys.argv[3]:
        raise ValueError("rank out of luck")
written = write(Path(sys.argv[2]), cast, source, config=source.config, metadata={}, progress=progress,
                max_shard_size=1000)
print(len(written.files), written.bytes)
"""


def run_ranks(source: Path, output: Path, *, failing: int = -1) -> list[tuple[int, str, str]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(2):
        environment = {
            **os.environ, "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GLOO_SOCKET_IFNAME": "lo",
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        }  # fmt: skip
        command = [sys.executable, "-c", _RANK, str(source), str(output), str(failing)]
        processes.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
    said = [process.communicate(timeout=120) for process in processes]
    return [(process.returncode, *texts) for process, texts in zip(processes, said, strict=True)]


def test_two_processes_write_what_one_does(tmp_path: Path, source: Checkpoint) -> None:
    cast = [PlannedTensor(info.name, info.shape, "F16", info.name) for info in source.tensors.values()]
    alone = put(tmp_path / "one", source, cast, max_shard_size=1000)
    for code, said, wrong in run_ranks(tmp_path / "source", tmp_path / "two"):
        assert code == 0, wrong
        assert said.split() == [str(len(alone.files)), str(alone.bytes)]
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    assert len(open_checkpoint(tmp_path / "two").shards) > 2


@pytest.mark.parametrize("failing", [0, 1])
def test_one_failing_process_fails_all_and_leaves_nothing(tmp_path: Path, source: Checkpoint, failing: int) -> None:
    ended = run_ranks(tmp_path / "source", tmp_path / "two", failing=failing)
    assert [code for code, _, _ in ended] == [1, 1]
    assert "ValueError: rank out of luck" in ended[failing][2]
    assert f"TltError: rank {failing} of 2 failed, so nothing was written: rank out of luck" in ended[1 - failing][2]
    assert nothing_left(tmp_path)
