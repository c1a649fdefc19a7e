"""Whatever the hub answers, or the way to it refuses, as one line that says what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from tlt_cli.checkpoint.hub_address import Address
from tlt_cli.errors import TltError

# Every other error of its HTTP library, which was httpx and is httpx2 now.
_TRANSPORT_ERROR: type[Exception] = HfHubHTTPError.__bases__[0]


@contextmanager
def plain_errors(address: Address) -> Iterator[None]:
    """Turns every error of huggingface_hub into a TltError that names `address`."""
    try:
        yield
    except GatedRepoError as error:
        page = f"{constants.ENDPOINT}/{address.id}"
        raise TltError(
            f"{address}: gated; accept its terms at {page}, then run hf auth login or set HF_TOKEN"
        ) from error
    except RevisionNotFoundError as error:
        raise TltError(
            f"{address}: the repository has no revision {address.revision!r}; see its branches and tags on "
            f"{constants.ENDPOINT}/{address.id}/tree/main"
        ) from error
    except RepositoryNotFoundError as error:
        raise TltError(
            f"{address}: no such model on {constants.ENDPOINT}, or a private one; check the name, "
            "or run hf auth login or set HF_TOKEN (a local path must exist)"
        ) from error
    except (OfflineModeIsEnabled, LocalEntryNotFoundError) as error:
        offline = constants.HF_HUB_OFFLINE
        reason = "HF_HUB_OFFLINE is set and it is not in the cache; unset it" if offline else _unreachable(error)
        raise TltError(f"{address}: {reason}") from error
    except EntryNotFoundError as error:
        raise TltError(f"{address}: a file of it is gone from the hub ({_first_line(error)}); run it again") from error
    except HFValidationError as error:
        raise TltError(f"{address}: not a repository's name: {_first_line(error)}") from error
    except HfHubHTTPError as error:
        code = error.response.status_code
        advice = "check HF_TOKEN" if code in (401, 403) else "try again later"
        raise TltError(f"{address}: {constants.ENDPOINT} answered {code}; {advice}: {_first_line(error)}") from error
    except _TRANSPORT_ERROR as error:
        raise TltError(f"{address}: {_unreachable(error)}") from error
    except OSError as error:
        raise TltError(
            f"{address}: cannot keep it in the cache {constants.HF_HUB_CACHE}: {_first_line(error)}"
        ) from error


def _unreachable(error: Exception) -> str:
    return (
        f"cannot reach {constants.ENDPOINT} ({_first_line(error)}); check the network, "
        "or set HF_HUB_OFFLINE=1 to use what is in the cache"
    )


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
