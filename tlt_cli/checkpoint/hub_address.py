"""The repository, revision and file that an address of the hub names."""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import unquote

from huggingface_hub import constants

from tlt_cli.errors import TltError

_HOSTS = ("huggingface.co", "hf.co", "www.huggingface.co")
_PAGE = re.compile(r"https?://(?P<host>[^/?#]+)/(?P<path>[^?#]*)")
_FILE = r"[^@]+\.(?:safetensors|st)"
_URI = re.compile(
    r"hf://(?:models/)?(?P<id>[\w.-]+/[\w.-]+)"
    rf"(?:@(?P<revision>refs/(?:pr|convert)/[^/@]+|[^@]+?))?(?:/(?P<file>{_FILE}))?/*"
)


@dataclass(frozen=True)
class Address:
    """A repository, at a branch, tag or commit (None: its main branch); `file` where one weight file is meant."""

    id: str
    revision: str | None = None
    file: str | None = None

    def __str__(self) -> str:
        return self.id + (f"@{self.revision}" if self.revision else "") + (f"/{self.file}" if self.file else "")


def parse_uri(uri: str) -> Address:
    """The repository that an `hf://` address or a URL of the hub names; TltError if it names none.

    >>> parse_uri("hf://org/name@v1")
    Address(id='org/name', revision='v1', file=None)
    """
    text = uri
    if (page := _PAGE.match(uri)) is not None:
        if page[0].startswith(f"{constants.ENDPOINT}/"):
            path = page[0].removeprefix(f"{constants.ENDPOINT}/")
        elif page["host"] in _HOSTS:
            path = page["path"]
        else:
            raise TltError(f"{uri}: not an address of {constants.ENDPOINT}; wanted org/name, or hf://org/name@revision")
        text = "hf://" + re.sub(r"\A([^/]+/[^/]+)/(?:tree|blob|resolve|raw)/", r"\1@", path)
    match = _URI.fullmatch(text)
    if match is None:
        raise TltError(
            f"{uri}: not the address of a model; wanted hf://org/name, hf://org/name@revision, "
            "or either with /FILE.safetensors behind it"
        )
    revision, file = match["revision"], match["file"]
    return Address(match["id"], unquote(revision) if revision else None, unquote(file) if file else None)
