"""Checkpoints on the hub, tried against a hub on loopback: kilobytes for headers, plain lines for refusals."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hub_server import Hub, commit_of, serving
from safetensors.torch import save_file

from tlt_cli.checkpoint import record
from tlt_cli.checkpoint.hub_address import Address, parse_uri
from tlt_cli.checkpoint.reader import open_checkpoint
from tlt_cli.checkpoint.writer import plan_files
from tlt_cli.errors import TltError

CARD = "---\nlicense: mit\nlanguage: en\ntags: [story]\n---\n# A model\n"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    with serving(monkeypatch, tmp_path / "home") as served:
        yield served


def tensors(seed: int = 0, rows: int = 1000) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {f"layer.{number}.weight": torch.randn(rows, 500, generator=generator) for number in range(2)}


def single(folder: Path, seed: int = 0) -> Path:
    """4 MB of weights in one file, with what commonly lies beside them."""
    folder.mkdir()
    save_file(tensors(seed), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text('{"model_type": "llama", "hidden_size": 500}')
    (folder / "README.md").write_text(CARD)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"pickle" * 100_000)
    (folder / "extra").mkdir()
    (folder / "extra" / "words.txt").write_text("a b")
    return folder


def sharded(folder: Path) -> Path:
    folder.mkdir()
    weight_map = {}
    for number, (name, tensor) in enumerate(tensors().items(), 1):
        shard = f"model-{number:05}-of-00002.safetensors"
        save_file({name: tensor}, folder / shard, metadata={"format": "pt"})
        weight_map[name] = shard
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text("{}")
    return folder


@pytest.mark.parametrize("make", [single, sharded])
def test_headers_alone_move_kilobytes(hub: Hub, tmp_path: Path, make: object) -> None:
    folder = make(tmp_path / "repo")  # type: ignore[operator]
    commit = hub.add("org/model", folder)
    remote = open_checkpoint("org/model", values=False)
    local = open_checkpoint(folder)
    assert remote.tensors == local.tensors
    assert (remote.config, remote.metadata, remote.shards) == (local.config, local.metadata, local.shards)
    assert remote.card == local.card
    assert (remote.repository, remote.revision, remote.location) == ("org/model", commit, None)
    assert remote.digest() == local.digest()
    assert hub.sent < 250_000 < sum(info.nbytes for info in local.tensors.values()) / 10
    with pytest.raises(TltError, match="only its headers were read"):
        remote.read("layer.0.weight")


def test_no_more_is_read_from_a_server_that_ignores_ranges(hub: Hub, tmp_path: Path) -> None:
    folder = single(tmp_path / "repo")
    hub.add("org/model", folder)
    hub.ignores_ranges = True
    assert open_checkpoint("org/model", values=False).tensors == open_checkpoint(folder).tensors


def test_a_header_longer_than_the_first_request(hub: Hub, tmp_path: Path) -> None:
    folder = tmp_path / "repo"
    folder.mkdir()
    save_file({f"tensor.{number:06}": torch.zeros(1) for number in range(4000)}, folder / "model.safetensors")
    hub.add("org/model", folder)
    assert open_checkpoint("org/model", values=False).tensors == open_checkpoint(folder).tensors


@pytest.mark.parametrize("make", [single, sharded])
def test_values_are_those_of_the_repository(hub: Hub, tmp_path: Path, make: object) -> None:
    folder = make(tmp_path / "repo")  # type: ignore[operator]
    commit = hub.add("org/model", folder)
    remote, local = open_checkpoint("hf://org/model"), open_checkpoint(folder)
    assert remote.tensors == local.tensors
    for name in local.tensors:
        assert torch.equal(remote.read(name), local.read(name))
    assert (remote.repository, remote.revision, remote.source) == ("org/model", commit, "hf://org/model")
    assert record.companions(remote).keys() == record.companions(local).keys()
    assert all(path.is_file() for path in record.companions(remote).values())
    assert remote.digest() == local.digest()
    assert not any("pytorch_model.bin" in request for request in hub.requests)


def test_offline_uses_what_was_fetched(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    folder = single(tmp_path / "repo")
    commit = hub.add("org/model", folder)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(TltError, match="HF_HUB_OFFLINE is set"):
        open_checkpoint("org/model")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    open_checkpoint("org/model")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    before = len(hub.requests)
    kept = open_checkpoint("org/model")
    assert (kept.revision, kept.digest()) == (commit, open_checkpoint(folder).digest())
    assert len(hub.requests) == before


def test_revisions(hub: Hub, tmp_path: Path) -> None:
    first, second = single(tmp_path / "first", seed=1), single(tmp_path / "second", seed=2)
    hub.add("org/model", first)
    commit = hub.add("org/model", second, revision="refs/pr/7")
    digests = [open_checkpoint(folder).digest() for folder in (first, second)]
    assert digests[0] != digests[1]
    for address, digest in {
        "org/model": digests[0],
        "org/model@refs/pr/7": digests[1],
        f"hf://org/model@{commit}": digests[1],
        f"{hub.endpoint}/org/model": digests[0],
        f"{hub.endpoint}/org/model/tree/{commit}": digests[1],
        f"{hub.endpoint}/org/model/blob/{commit}/model.safetensors": digests[1],
    }.items():
        for values in (False, True):
            opened = open_checkpoint(address, values=values)
            assert opened.digest() == digest, address
            assert opened.revision in (commit, commit_of(first))


def test_one_file_of_several(hub: Hub, tmp_path: Path) -> None:
    folder = single(tmp_path / "repo")
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    save_file({"other": torch.ones(3)}, folder / "b.safetensors")
    hub.add("org/model", folder)
    with pytest.raises(TltError, match=r"2 weight files \(a.safetensors, b.safetensors\)"):
        open_checkpoint("org/model", values=False)
    for values in (False, True):
        opened = open_checkpoint("hf://org/model/b.safetensors", values=values)
        assert (list(opened.tensors), opened.config) == (["other"], {"model_type": "llama", "hidden_size": 500})
    with pytest.raises(TltError, match="no such file in the repository"):
        open_checkpoint("hf://org/model/c.safetensors", values=False)


def refused(address: str, *, values: bool) -> str:
    with pytest.raises(TltError) as caught:
        open_checkpoint(address, values=values)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("values", [False, True])
def test_refusals_are_one_line_that_says_what_to_do(hub: Hub, tmp_path: Path, values: bool) -> None:
    folder = single(tmp_path / "repo")
    hub.add("org/model", folder)
    hub.add("org/gated", folder)
    hub.gated.add("org/gated")
    pickles = tmp_path / "pickles"
    pickles.mkdir()
    (pickles / "pytorch_model.bin").write_bytes(b"x")
    hub.add("org/pickles", pickles)
    cut = single(tmp_path / "cut")
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:-1])
    hub.add("org/cut", cut)
    assert "no such model" in refused("org/nothing", values=values)
    assert "no revision 'v9'" in refused("org/model@v9", values=values)
    assert f"accept its terms at {hub.endpoint}/org/gated" in refused("org/gated", values=values)
    assert "only pickle weights" in refused("org/pickles", values=values)
    assert "was cut short" in refused("org/cut", values=values)
    assert "not the address of a model" in refused("hf://datasets/org/words", values=values)
    assert "not an address of" in refused("https://example.com/org/model", values=values)
    hub.broken = True
    assert "answered 503" in refused("org/model", values=values)


def test_no_network(tmp_path: Path) -> None:
    environment = {
        **os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "",
    }  # fmt: skip
    code = "from tlt_cli.checkpoint.reader import open_checkpoint; open_checkpoint('org/model')"
    ended = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    last = ended.stderr.strip().splitlines()[-1]
    assert "org/model: cannot reach http://127.0.0.1:9" in last
    assert "check the network" in last


def test_addresses() -> None:
    assert parse_uri("hf://org/name") == Address("org/name")
    assert parse_uri("hf://models/org/na.me@v1.0/") == Address("org/na.me", "v1.0")
    assert parse_uri("hf://org/name@refs/pr/3/x.safetensors") == Address("org/name", "refs/pr/3", "x.safetensors")
    assert parse_uri("hf://org/name@feature/x") == Address("org/name", "feature/x")
    assert parse_uri("hf://org/name@refs%2Fpr%2F3") == Address("org/name", "refs/pr/3")
    assert parse_uri("https://huggingface.co/org/name/resolve/main/sub/x.st?download=true") == Address(
        "org/name", "main", "sub/x.st"
    )
    for wrong in ("hf://name", "hf://", "hf://org/name/x.bin", "https://huggingface.co/spaces/org/name", "http://["):
        with pytest.raises(TltError):
            parse_uri(wrong)


def test_lineage_and_card_name_the_repository(hub: Hub, tmp_path: Path) -> None:
    commit = hub.add("org/model", single(tmp_path / "repo"))
    source = open_checkpoint("org/model", values=False)
    lineage = record.lineage(source, operation="grow", command="tlt grow org/model --to-dim 512", details={})
    assert lineage["parents"] == [{"source": "org/model", "sha256": source.digest(), "revision": commit}]
    card = record.model_card(source, lineage, changes=[("hidden", "128", "512")], notes=["a note"])
    front = card.split("---")[1]
    for line in (
        "base_model: org/model",
        "base_model_relation: finetune",
        "license: mit",
        "language: en",
        "- story",
    ):
        assert line in front
    assert "```\ntlt grow org/model --to-dim 512\n```" in card
    assert "| hidden | 128 | 512 |" in card
    assert str(tmp_path) not in card + json.dumps(lineage)
    # A dry run knows its header from the headers alone.
    layout = plan_files(tmp_path / "out", (), source, metadata=record.metadata(lineage), config={})
    assert lineage["parents"][0]["sha256"].encode() in layout.shards[0].header


@pytest.mark.parametrize("card", ["---\nlicense: [\n---\n", "---\n- a list\n---\n", "---\n{1: 2}\n---\n"])
def test_a_broken_card_is_said_and_not_carried_over(hub: Hub, tmp_path: Path, card: str) -> None:
    folder = single(tmp_path / "repo")
    (folder / "README.md").write_text(card)
    source = open_checkpoint(folder)
    lineage = record.lineage(source, operation="grow", command="tlt grow", details={})
    assert "card of the source could not be read" in record.model_card(source, lineage, changes=[])
    (folder / "README.md").write_text(CARD)
    assert "could not be read" not in record.model_card(open_checkpoint(folder), lineage, changes=[])


def test_lineage_keeps_its_history_flat_and_in_order(tmp_path: Path) -> None:
    folder = single(tmp_path / "repo")
    weights = tensors()
    for operation in ("grow", "factor", "fold"):
        source = open_checkpoint(folder)
        lineage = record.lineage(source, operation=operation, command=f"tlt {operation}", details={"n": 1})
        save_file(weights, folder / "model.safetensors", metadata=record.metadata(lineage))
    found = open_checkpoint(folder).lineage
    assert found is not None
    assert [entry["operation"] for entry in found["history"]] == ["grow", "factor"]
    assert found["operation"] == "fold"
    assert all("history" not in entry for entry in found["history"])
    assert len({entry["parents"][0]["sha256"] for entry in [*found["history"], found]}) == 3
