"""What a training starts from: the model and what stands beside it, and the text as windows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tlt_cli.checkpoint.lazy import Checkpoint
from tlt_cli.checkpoint.record import source_name
from tlt_cli.checkpoint.strict_json import strict_json_object
from tlt_cli.cli.adapters import AdapterFolder
from tlt_cli.cli.console import Output
from tlt_cli.cli.measuring import USUAL_CONTEXT, positions
from tlt_cli.cli.opening import Source, opened, opened_with_adapter, tokenizer_for
from tlt_cli.cli.training_request import Request
from tlt_cli.errors import TltError, UsageError
from tlt_cli.families import Fit
from tlt_cli.model.decoder import Decoder
from tlt_cli.model.lora import Lora, updates
from tlt_cli.model.peft_read import PeftFolder
from tlt_cli.model.text import BYTES, EVERY_BYTE, NO_TEXT, Tokenizer, load_tokenizer, read_tokenizer
from tlt_cli.model.tree import Tree
from tlt_cli.model.tree_shape import SERVED, Shape
from tlt_cli.model.weights import load_checkpoint
from tlt_cli.training.corpus import Stream, read_streams
from tlt_cli.training.init import initial_config
from tlt_cli.training.nested import Inner
from tlt_cli.training.start import blank, new_decoder
from tlt_cli.training.windows import Windows, evaluation_windows, hold_out

TOKENIZER_CONFIG = "tokenizer_config.json"
_BATCH = 8  # windows per step where nothing is said
_INITIAL_CONTEXT = 256  # tokens per window of a model that has no positions yet


@dataclass(frozen=True, eq=False)
class Subject:
    """What is trained: the decoder in float32, its checkpoint (None: random weights), and the adapter beside it.

    `before` are the weights of an adapter that is trained on, `inner` the models inside that are trained too.
    """

    decoder: Decoder
    fitted: Fit
    config: Mapping[str, Any]
    tokenizer: Tokenizer
    files: Mapping[str, Path | bytes]
    source: Checkpoint | None = None
    adapter: Lora | Tree | None = None
    before: Checkpoint | None = None
    inner: tuple[tuple[Inner, ...], ...] = ()

    @property
    def name(self) -> str | None:
        """What the source is called, apart from where it lies."""
        named = self.before or self.source
        return None if named is None else source_name(named)

    @property
    def digests(self) -> list[str]:
        """The sha256 of what training starts from: of the model, and of an adapter that is trained on."""
        return [checkpoint.digest() for checkpoint in (self.source, self.before) if checkpoint is not None]


@dataclass(frozen=True, eq=False)
class Texts:
    """What is read: windows to train on, and by the name of its stream what is held out, [n, context]."""

    windows: Windows
    held: tuple[tuple[str, torch.Tensor], ...]
    context: int
    batch: int
    info: Mapping[str, Any]


def start(request: Request, *, device: torch.device, out: Output) -> Subject:
    """Open or make what is trained, on the device. Raises TltError for what cannot be trained."""
    if request.init is not None:
        return _from_nothing(request, device)
    assert request.source is not None
    found = opened_with_adapter(
        request.source, out=out, base=request.base, family=request.family, axes=request.axes
    )  # fmt: skip
    if found.adapter is not None:
        return _going_on(request, found, found.adapter, device=device, out=out)
    checkpoint, fitted = found.checkpoint, found.fit
    coded = [name for name, info in checkpoint.tensors.items() if info.dtype == "I8"]
    if coded and not (request.lora or request.lora_tree or request.only):
        raise TltError(
            f"{request.source}: {coded[0]} and others are 8-bit integers, which no gradient moves; fold them first, "
            "`tlt fold`, or train what stands beside them: --lora 8, or --only"
        )
    decoder = load_checkpoint(checkpoint, fitted, device=device)
    tokenizer = tokenizer_for(checkpoint, fitted.sizes["vocab"], request.tokenizer)
    if request.lora is not None:
        chosen = updates(decoder, rank=request.lora, alpha=request.alpha, targets=request.target, rslora=request.rslora)
        adapter: Lora | Tree | None = Lora(decoder, chosen, generator=torch.Generator().manual_seed(request.seed))
    elif request.lora_tree is not None:
        shape = Shape(
            depth=request.lora_tree, rank=request.rank, alpha=request.alpha, form=request.tree_nodes,
            route=request.route, targets=tuple(request.target),
        )  # fmt: skip
        adapter = Tree(decoder, shape, seed=request.seed)
    else:
        adapter = None
    decoder.adapter = adapter
    return Subject(decoder, fitted, dict(checkpoint.config or {}), tokenizer, {}, checkpoint, adapter)


def _going_on(request: Request, found: Source, folder: AdapterFolder, *, device: torch.device, out: Output) -> Subject:
    """An adapter to be trained on, as it was made: no option says of what rank it is, or where it stands."""
    given = next((name for name in ("lora", "lora_tree") if getattr(request, name) is not None), None)
    if given is not None:
        raise UsageError(
            f"--{given.replace('_', '-')} begins an adapter, and {request.source} is one already, a {folder.kind} that "
            "is trained on as it is; drop the option, or fold it into its base first"
        )
    request.check_beside_adapter()
    decoder = load_checkpoint(found.checkpoint, found.fit, device=device)
    adapter = folder.load(decoder, found.fit.family.prefix, dtype=torch.float32)
    assert isinstance(adapter, Lora | Tree)
    if isinstance(adapter, Tree):
        adapter.hard, adapter.schedule = False, SERVED
        adapter.train().requires_grad_(True)
        out.note(f"{request.source} goes on as it is served: each token takes one way")
    elif isinstance(folder, PeftFolder) and folder.dropout:
        out.note(f"{request.source}: its dropout of {folder.dropout:g} is not applied: tlt trains without")
    decoder.adapter = adapter
    tokenizer = tokenizer_for(found.checkpoint, found.fit.sizes["vocab"], request.tokenizer)
    return Subject(
        decoder, found.fit, dict(found.checkpoint.config or {}), tokenizer, {}, found.checkpoint, adapter,
        folder.tensors,
    )  # fmt: skip


def _from_nothing(request: Request, device: torch.device) -> Subject:
    assert request.init is not None
    tokenizer, files = _chosen_tokenizer(request)
    config = initial_config(
        request.init, vocab=tokenizer.vocab, context=request.context or _INITIAL_CONTEXT,
    )  # fmt: skip
    if config.get("eos_token_id") is None and (end := end_of_text(tokenizer, files)) is not None:
        config["eos_token_id"] = end
    fitted = blank(config)
    if fitted.sizes["vocab"] < tokenizer.vocab:
        raise UsageError(
            f"--init {request.init}: a vocabulary of {fitted.sizes['vocab']}, but the tokenizer has {tokenizer.vocab}"
        )
    return Subject(new_decoder(fitted, seed=request.seed).to(device), fitted, config, tokenizer, files)


def _chosen_tokenizer(request: Request) -> tuple[Tokenizer, dict[str, Path | bytes]]:
    """The tokenizer of a model that does not exist yet, bytes unless one is named, and the files that hold it."""
    if request.tokenizer is None:
        return Tokenizer("bytes", BYTES), {}
    path = Path(request.tokenizer).expanduser()
    if path.is_dir():
        found = sorted(
            file for file in path.iterdir() if "token" in file.name or file.name in ("vocab.json", "merges.txt")
        )
        tokenizer = load_tokenizer(found, 1 << 62, required=True)
        files: dict[str, Path | bytes] = {file.name: file for file in found}
    else:
        tokenizer, files = read_tokenizer(path, 1 << 62), {"tokenizer.json": path}
        beside = path.with_name(TOKENIZER_CONFIG)
        if path.name == "tokenizer.json" and beside.is_file():
            files[beside.name] = beside
    size = tokenizer.engine.get_vocab_size(with_added_tokens=True)
    return Tokenizer(tokenizer.name, size, tokenizer.engine), files


def end_of_text(tokenizer: Tokenizer, files: Mapping[str, Path | bytes]) -> int | None:
    """The id of the token that ends a text, where the tokenizer's files name one that it has."""
    path = files.get(TOKENIZER_CONFIG)
    if not isinstance(path, Path) or tokenizer.engine is None:
        return None
    try:
        named = strict_json_object(path.read_bytes(), str(path)).get("eos_token")
    except OSError as error:
        raise TltError(f"cannot read {path}: {error.strerror}") from error
    named = named.get("content") if isinstance(named, dict) else named
    found: int | None = tokenizer.engine.token_to_id(named) if isinstance(named, str) else None
    return found


def teacher(request: Request, subject: Subject, *, context: int, device: torch.device, out: Output) -> Decoder:
    """The model to learn from. Raises TltError where its tokens are others, or windows are too long for it."""
    assert request.distill is not None
    checkpoint, fitted = opened(request.distill, out=out)
    if fitted.sizes["vocab"] != subject.fitted.sizes["vocab"]:
        raise TltError(
            f"--distill {request.distill}: a vocabulary of {fitted.sizes['vocab']}, but the model that learns has "
            f"{subject.fitted.sizes['vocab']}; both must read the same tokens"
        )
    own, other = subject.tokenizer.engine, load_tokenizer(checkpoint.companions, fitted.sizes["vocab"]).engine
    if own is not None and other is not None and own.get_vocab() != other.get_vocab():
        raise TltError(
            f"--distill {request.distill}: its tokenizer has other tokens than {subject.tokenizer.name}; both models "
            "must read the same ones"
        )
    decoder = load_checkpoint(checkpoint, fitted, device=device)
    if decoder.longest is not None and context > decoder.longest:
        raise UsageError(f"--context {context} is more than the {decoder.longest} positions of {request.distill}")
    return decoder.requires_grad_(False)


def read_texts(request: Request, subject: Subject, *, out: Output) -> Texts:
    """The request's data as windows, with what is held out. Raises TltError for text that cannot be used."""
    tokenizer = subject.tokenizer
    if tokenizer.engine is None:
        out.note(EVERY_BYTE)
    if not request.data:
        out.note(NO_TEXT)
    end = _end(subject)
    with out.progress("reading the text") as progress:
        streams = read_streams(
            request.data, tokenizer, end=end, separator=request.separator, field=request.field, progress=progress
        )
        other = () if not request.eval_data else read_streams(
            request.eval_data, tokenizer, end=end, separator=request.separator, field=request.field
        )  # fmt: skip
    context = request.context or min(USUAL_CONTEXT, positions(subject.fitted))
    longest = subject.decoder.longest
    if longest is not None and context > longest:
        raise UsageError(f"--context {context} is more than the model's {longest} positions")
    made = subject.fitted.setting("max_position_embeddings")
    if subject.source is not None and longest is None and isinstance(made, int) and context > made:
        out.note(
            f"--context {context} is more than the {made} positions that the model was made for: how it reads beyond "
            "them is to be learned"
        )
    trained, held = (streams, other) if other else hold_out(streams, request.held_out)
    weights = request.weights
    windows = Windows(trained, context, request.seed, None if weights is None else tuple(weights))
    most = max(1, request.eval_tokens // (context * max(1, len(held))))
    batch = request.batch_size or _BATCH
    if request.batch_tokens is not None:
        batch = max(1, request.batch_tokens // context)
    info = {
        "streams": [stream_info(stream) for stream in streams], "tokenizer": Path(tokenizer.name).name,
        "context": context,
        "held_out": {"streams": [stream_info(stream) for stream in held], "tokens_at_most": request.eval_tokens},
    }  # fmt: skip
    found = tuple((_named(stream), evaluation_windows(stream, context, most)) for stream in held)
    return Texts(windows, found, context, batch, info)


def stream_info(stream: Stream) -> dict[str, Any]:
    """What is recorded of a stream: not where it lies."""
    return {**stream.info, "source": Path(stream.source).name}


def _named(stream: Stream) -> str:
    return Path(stream.source).stem or stream.source


def _end(subject: Subject) -> int | None:
    """The id that ends a text, where config.json says one."""
    stated = subject.config.get("eos_token_id")
    first = stated[0] if isinstance(stated, list) and stated else stated
    if isinstance(first, int) and not isinstance(first, bool) and 0 <= first < subject.tokenizer.vocab:
        return first
    return None
