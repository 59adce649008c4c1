"""What a refusal of the Hugging Face hub means to a user, and what helps against it."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

Kind = Literal["model", "dataset"]

_BUSY = (429, 500, 502, 503, 504)
_TOKENS = "https://huggingface.co/settings/tokens"
_LOG_IN = "run `hf auth login`, or set HF_TOKEN to a token of " + _TOKENS


def ask_hub(repository: str, file: str, *, revision: str | None = None, kind: Kind = "model") -> None:
    """Asks the hub once, without repeating, whether it gives `file` of `repository`; fetches nothing.

    A hub that is busy is no refusal: the fetch that follows is repeated by the hub's client.

    Raises:
        one of `hub_errors()`: it does not; `hub_reason` puts each in words.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError

    try:
        get_hf_file_metadata(hf_hub_url(repository, file, revision=revision, repo_type=kind))
    except HfHubHTTPError as error:
        if error.response.status_code not in _BUSY:
            raise


def weight_files(repository: str, revision: str | None = None) -> dict[str, int]:
    """Path and bytes of each file of safetensors that `repository` has in its folders, as the hub lists them.

    Raises:
        one of `hub_errors()`.
    """
    from huggingface_hub import HfApi

    listed = HfApi().model_info(repository, revision=revision, files_metadata=True).siblings or []
    sizes = {file.rfilename: file.size or 0 for file in listed}
    return {name: size for name, size in sizes.items() if "/" in name and name.endswith(".safetensors")}


def hub_errors(*more: type[Exception]) -> tuple[type[Exception], ...]:
    """What the hub's client raises: of its HTTP library, of its cache, where the hub may not be asked; and `more`."""
    from huggingface_hub import errors

    return errors.HTTPError, errors.OfflineModeIsEnabled, OSError, *more  # type: ignore[attr-defined]


def hub_reason(
    repository: str, error: BaseException, *, revision: str | None = None, kind: Kind = "model"
) -> str | None:
    """Why the hub did not give `repository`, and the way out; None where `error` is not of the hub.

    The libraries wrap what the hub said: `error` is searched from its first cause on.
    """
    asked = _Asked(repository, revision, kind)
    for cause in _causes(error):
        if reason := _reason(asked, cause):
            return reason
    return None


@contextmanager
def quiet_hub() -> Iterator[None]:
    """Within it the hub's client does not tell of each request that it repeats: the error at the end says it once."""
    logger = logging.getLogger("huggingface_hub.utils._http")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@dataclass(frozen=True)
class _Asked:
    """What the hub was asked for."""

    repository: str
    revision: str | None
    kind: Kind

    @property
    def page(self) -> str:
        """The address of the repository's page."""
        from huggingface_hub import constants

        return f"{constants.ENDPOINT}/{'datasets/' if self.kind == 'dataset' else ''}{self.repository}"

    @property
    def download(self) -> str:
        """The command that fetches it."""
        return f"hf download {self.repository}" + (" --repo-type dataset" if self.kind == "dataset" else "")


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error and what it came from, the first cause first."""
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    return reversed(chain)


def _reason(asked: _Asked, error: BaseException) -> str | None:
    from huggingface_hub import constants, errors

    is_absent = isinstance(error, errors.LocalEntryNotFoundError)
    if isinstance(error, errors.OfflineModeIsEnabled) or (is_absent and constants.is_offline_mode()):
        return _offline(asked)
    if isinstance(error, errors.RemoteEntryNotFoundError):
        return None  # the repository is there, and who asked knows what a file that it lacks means
    if isinstance(error, errors.HfHubHTTPError):
        return _refused(asked, error) or _by_status(asked, error)
    return _unreached(asked, error) if _is_no_network(error) else None


def _is_no_network(error: BaseException) -> bool:
    """By name: the HTTP library of the hub's client was httpx and is httpx2."""
    names = {kind.__name__ for kind in type(error).__mro__}
    return bool(names & {"TransportError", "ConnectionError", "TimeoutError"})


def _offline(asked: _Asked) -> str:
    from huggingface_hub import constants

    name = next((n for n in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE") if os.environ.get(n)), "HF_HUB_OFFLINE")
    return (
        f"not in the hub's cache ({constants.HF_HUB_CACHE}), and {name} forbids to ask the hub; "
        f"unset it, or run `{asked.download}` where there is a network"
    )


def _refused(asked: _Asked, error: HfHubHTTPError) -> str | None:
    """The hub said why."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return _gated(asked)
    if isinstance(error, errors.DisabledRepoError):
        return "the hub has disabled this repository; take another, or a copy in a folder"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"the repository is on the hub, but has no branch, tag or commit {asked.revision!r}"
    if error.response.status_code == 401 and "credentials" in error.response.headers.get("X-Error-Message", ""):
        origin = "HF_TOKEN" if os.environ.get("HF_TOKEN") else "`hf auth login`"
        return f"the hub does not know the token that {origin} set: it is mistyped, revoked or expired; {_LOG_IN}"
    return None


def _gated(asked: _Asked) -> str:
    if not _has_token():
        return f"gated, and you are not logged in; accept its licence at {asked.page}, then {_LOG_IN}"
    return (
        "gated, and the account of your token has no access; accept the licence at "
        f"{asked.page} as the account that `hf auth whoami` names. A fine-grained token needs the permission to read "
        "public gated repositories"
    )


def _by_status(asked: _Asked, error: HfHubHTTPError) -> str:
    """The hub said no more than a number."""
    status = error.response.status_code
    if status in (401, 404):
        private = "that your token may not read" if _has_token() else "that needs a login"
        return f"no such repository on the hub, or a private one {private}; check the name at {asked.page}"
    if status == 403:
        return f"the hub forbids it to your token (status 403); give it the permission at {_TOKENS}"
    if status == 429:
        return "the hub had too many requests from here (status 429); wait some minutes, or log in for a higher limit"
    return f"the hub answers with an error of its own (status {status}); try again later"


def _unreached(asked: _Asked, error: BaseException) -> str:
    from huggingface_hub import constants

    detail = (str(error).strip() or type(error).__name__).splitlines()[0]
    return (
        f"not on this machine, and {constants.ENDPOINT} was not reached ({detail}); check the network and HTTPS_PROXY, "
        f"or run `{asked.download}` where there is a network and copy the folder here"
    )


def _has_token() -> bool:
    from huggingface_hub import get_token

    return get_token() is not None
