"""A hub on loopback: what huggingface_hub asks of the real one, answered from folders, with every byte counted."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

_LARGE = (".safetensors", ".st", ".bin")  # kept by LFS: listed with their sha256


@dataclass
class Hub:
    """Repositories by id and revision; `sent` counts the bytes of all bodies, `requests` holds "METHOD /path" lines."""

    repositories: dict[str, dict[str, Path]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    broken: bool = False
    ignores_ranges: bool = False
    sent: int = 0
    requests: list[str] = field(default_factory=list)
    endpoint: str = ""

    def add(self, repository: str, folder: Path, revision: str = "main") -> str:
        """Serve `folder` as a revision; returns its commit."""
        self.repositories.setdefault(repository, {})[revision] = folder
        return commit_of(folder)


def commit_of(folder: Path) -> str:
    """40 hex digits that stand for a commit."""
    return hashlib.sha1(str(folder).encode()).hexdigest()


@contextmanager
def serving(monkeypatch: pytest.MonkeyPatch, home: Path) -> Iterator[Hub]:
    """A hub of this process's own, and huggingface_hub pointed at it with an empty cache in `home`."""
    from huggingface_hub import constants

    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self._send(404, b"", {})

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _answer(self) -> None:
        path = urlsplit(self.path).path
        self.hub.requests.append(f"{self.command} {path}")
        if self.hub.broken:
            self._send(503, b"", {})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+?)(?:/(revision|tree)/([^/]+))?/?", path):
            self._listing(match[1], match[2], unquote(match[3] or "main"))
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._file(match[1], unquote(match[2]), unquote(match[3]))
        else:
            self._send(404, b"", {})

    def _folder(self, repository: str, revision: str) -> Path | None:
        """The folder, or None once the refusal has been sent."""
        revisions = self.hub.repositories.get(repository)
        if revisions is None:
            self._refuse(401, "RepoNotFound", "Repository not found")
            return None
        for name, folder in revisions.items():
            if revision in (name, commit_of(folder)):
                return folder
        self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return None

    def _listing(self, repository: str, kind: str | None, revision: str) -> None:
        folder = self._folder(repository, revision)
        if folder is None:
            return
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        if kind == "tree":
            self._send_json([_tree_entry(path, folder) for path in files])
        else:
            siblings = [_sibling(path, folder) for path in files]
            self._send_json({"id": repository, "sha": commit_of(folder), "siblings": siblings, "tags": []})

    def _file(self, repository: str, revision: str, name: str) -> None:
        folder = self._folder(repository, revision)
        if folder is None:
            return
        if repository in self.hub.gated:
            self._refuse(403, "GatedRepo", "Access to this model is restricted")
            return
        path = folder / name
        headers = {"X-Repo-Commit": commit_of(folder)}
        if not path.is_file():
            self._refuse(404, "EntryNotFound", "Entry not found", headers)
            return
        body = path.read_bytes()
        digest = hashlib.sha256(body).hexdigest()
        headers |= {"ETag": f'"{digest}"', "X-Linked-Size": str(len(body)), "X-Linked-ETag": f'"{digest}"'}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted is None or self.hub.ignores_ranges:
            self._send(200, body, headers)
            return
        first, last = int(wanted[1]), min(int(wanted[2] or len(body)), len(body) - 1)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(body)}"
        self._send(206, body[first : last + 1], headers)

    def _refuse(self, status: int, code: str, message: str, headers: dict[str, str] | None = None) -> None:
        self._send(status, b"", {**(headers or {}), "X-Error-Code": code, "X-Error-Message": message})

    def _send_json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        try:
            for start in range(0, len(body), 1 << 16):
                self.wfile.write(body[start : start + (1 << 16)])
                self.hub.sent += len(body[start : start + (1 << 16)])
        except OSError:
            self.close_connection = True  # the reader had enough


def _large(path: Path) -> dict[str, Any] | None:
    if path.suffix not in _LARGE:
        return None
    return {"sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "size": path.stat().st_size, "pointerSize": 130}


def _sibling(path: Path, folder: Path) -> dict[str, Any]:
    entry = {"rfilename": path.relative_to(folder).as_posix(), "size": path.stat().st_size, "blobId": "0" * 40}
    large = _large(path)
    return entry if large is None else {**entry, "lfs": large}


def _tree_entry(path: Path, folder: Path) -> dict[str, Any]:
    digest = hashlib.sha1(path.read_bytes()).hexdigest()
    size = path.stat().st_size
    entry = {"type": "file", "path": path.relative_to(folder).as_posix(), "size": size, "oid": digest}
    large = _large(path)
    return entry if large is None else {**entry, "lfs": {**large, "oid": large["sha256"]}}
