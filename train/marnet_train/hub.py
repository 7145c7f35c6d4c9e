"""Checkpoints on the Hugging Face Hub, or on a server that speaks its protocol (HF_ENDPOINT).

Files are transferred by name, only those that a checkpoint has: none of them is ever unpickled, and
a pickle that lies beside them is not downloaded.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    constants,
    snapshot_download,
)
from huggingface_hub.errors import (  # HTTPError: of httpx or httpx2, whichever it uses
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # pyright: ignore[reportPrivateImportUsage]
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
    filter_repo_objects,
    validate_repo_id,
)

from marnet_sdk.errors import InvalidInput, MarnetError, NotFound

_IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
# Every file that a checkpoint may have, as the patterns of fnmatch.
FILES = (
    *("config.json", "model.safetensors", "baseline.safetensors", "preprocessor_config.json"),
    *("training.json", "metrics.jsonl", "README.md"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.txt", "vocab.json", "merges.txt"),
    "samples/metadata.jsonl",
    *(f"samples/*.{suffix}" for suffix in _IMAGES),
    *(f"samples/*.{suffix.upper()}" for suffix in _IMAGES),
)
_LOG_IN = "log in with `hf auth login`, or set HF_TOKEN to a token that may"


class HubError(MarnetError):
    """The hub refused, could not be reached, or a transfer broke off."""


def is_hub_id(text: str) -> bool:
    """Tell whether it reads as ORG/NAME. `./a/b`, `/a/b` and a name without organisation do not."""
    try:
        validate_repo_id(text)
    except HFValidationError:
        return False
    return "/" in text


def files_of(folder: Path) -> list[str]:
    """List the files below `folder` that belong to a checkpoint, as sorted relative POSIX paths."""
    found = (p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    return sorted(_ours(found))


def download(
    repo_id: str,
    *,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
) -> Path:
    """Download the checkpoint's files at a revision into the hub's cache.

    Only what is new is transferred. Where the hub cannot be reached, what was completely downloaded
    before for the same revision is used.

    Returns:
        The snapshot directory; its name is the commit.

    Raises:
        NotFound: there is no such repository (or it is private), or no such revision.
        HubError: it is gated, the hub cannot be reached, or the transfer broke off.
    """
    with _typed_errors(repo_id, revision, may="read it"), _bars_on_terminals():
        path = snapshot_download(
            repo_id,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            allow_patterns=list(FILES),
            library_name="marnet",
        )
    return Path(path)


def upload(
    folder: Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    message: str,
    token: str | None = None,
) -> CommitInfo:
    """Make a branch of a repository hold the checkpoint in `folder`, in one commit.

    Repository and branch are made if need be. Files of an older checkpoint that this one does not
    have are deleted in the same commit; files that are no part of a checkpoint stay.

    Args:
        private: of a repository that is made; None: what its owner has as default.
        revision: the branch; None: main.

    Raises:
        InvalidInput: `repo_id` is not ORG/NAME.
        NotFound, HubError: as of `download`; HubError also where `private` is asked for and the
            repository is public. Nothing was committed then.
    """
    if not is_hub_id(repo_id):
        raise InvalidInput(f"hub id: got {repo_id!r}, expected ORG/NAME, such as my-team/digits")
    api = HfApi(token=token, library_name="marnet")
    with _typed_errors(repo_id, revision, may="write to it"), _bars_on_terminals():
        api.create_repo(repo_id, private=private, exist_ok=True)
        if private:
            _check_private(api, repo_id)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        return api.create_commit(
            repo_id,
            _operations(api, folder, repo_id, revision),
            commit_message=message,
            revision=revision,
        )


def _check_private(api: HfApi, repo_id: str) -> None:
    """Refuse a public repository for a private upload: the hub leaves it as visible as it is."""
    if not api.repo_info(repo_id).private:
        raise HubError(
            f"{repo_id} exists and is public, private was asked for: nothing was uploaded; make it "
            "private in its settings on the hub, or choose another name"
        )


def _operations(
    api: HfApi, folder: Path, repo_id: str, revision: str | None
) -> list[CommitOperationAdd | CommitOperationDelete]:
    names = files_of(folder)
    old = set(_ours(api.list_repo_files(repo_id, revision=revision))) - set(names)
    return [
        *(CommitOperationDelete(name) for name in sorted(old)),
        *(CommitOperationAdd(name, folder / name) for name in names),
    ]


def _ours(names: Iterator[str] | list[str]) -> Iterator[str]:
    return iter(filter_repo_objects(names, allow_patterns=list(FILES)))


@contextmanager
def _bars_on_terminals() -> Iterator[None]:
    """Show no progress bars where standard error is a file or a pipe."""
    if sys.stderr.isatty() or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


@contextmanager
def _typed_errors(repo_id: str, revision: str | None, may: str) -> Iterator[None]:
    """Turn what the hub's client raises into errors that say what to do."""
    hub = constants.ENDPOINT
    try:
        yield
    except GatedRepoError as error:
        raise HubError(
            f"{repo_id} is gated: ask for access at {hub}/{repo_id}, then {_LOG_IN} {may}"
        ) from error
    except RepositoryNotFoundError as error:
        raise NotFound(
            f"{repo_id}: no such folder here, and no such repository on {hub} for you; check the "
            f"spelling, or, if it is private, {_LOG_IN} {may}"
        ) from error
    except RevisionNotFoundError as error:
        raise NotFound(
            f"{repo_id} has no revision {revision!r}; expected a branch, a tag or a commit: see "
            f"{hub}/{repo_id}/commits/main"
        ) from error
    except LocalEntryNotFoundError as error:
        raise HubError(
            f"{repo_id}: no such folder here, {hub} did not answer as expected "
            f"({_first_line(error.__cause__ or error)}) and no complete copy is in the cache; "
            "check the network, HF_ENDPOINT and HF_HUB_OFFLINE, or name a folder"
        ) from error
    except HfHubHTTPError as error:
        raise HubError(_refusal(error, repo_id, may)) from error
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        raise HubError(
            f"{repo_id}: the transfer from or to {hub} failed ({_first_line(error)}); check the "
            "network and the space on the disk, and run it again"
        ) from error


def _refusal(error: HfHubHTTPError, repo_id: str, may: str) -> str:
    status = error.response.status_code
    said = error.server_message or _first_line(error)
    if status in (401, 403):
        return f"{repo_id}: {constants.ENDPOINT} refused ({status}: {said}); {_LOG_IN} {may}"
    return f"{repo_id}: {constants.ENDPOINT} answered {status} ({said}); try again later"


def _first_line(error: BaseException) -> str:
    """Say what went wrong; of an error that only says that something did, say its cause."""
    if isinstance(error, RuntimeError) and error.__cause__ is not None:
        error = error.__cause__
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__
