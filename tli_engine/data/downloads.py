"""Files of the Hugging Face Hub, one at a time, into its client's cache."""

import errno
import hashlib
import os
import sys
from pathlib import Path
from typing import Literal

from tli_engine.errors import UserError

Kind = Literal["model", "dataset"]


def download(
    repo: str,
    name: str,
    file: str,
    revision: str | None,
    kind: Kind = "model",
) -> Path | None:
    """Download one file, unless it is in the cache; ``None`` if there is none of that name.

    Args:
        repo: What errors call the repository.
        name: ``organisation/name``.
        file: Its path in the repository.
        revision: Branch, tag or commit; ``None`` for the main branch.
        kind: Of the repository.

    Raises:
        UserError: No such repository, no access, no network, no space, or the file's SHA-256 is not
            the Hub's.
    """
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    cached = try_to_load_from_cache(name, file, revision=revision, repo_type=kind)
    large = file.endswith((".safetensors", ".parquet"))
    if cached is None and large and not sys.stderr.isatty():
        # on a terminal the client draws a bar, in bytes
        print(f"downloading {repo}: {file}", file=sys.stderr, flush=True)
    try:
        path = Path(hf_hub_download(name, file, revision=revision, repo_type=kind))
    except LocalEntryNotFoundError as e:
        # offline; the cache also notes which files the Hub does not have
        if cached is not None and not isinstance(cached, str):
            return None
        raise explained(f"{repo}: {file}", e, kind) from None
    except EntryNotFoundError:
        return None
    except Exception as e:
        raise explained(f"{repo}: {file}", e, kind) from None
    if not isinstance(cached, str):
        _check_digest(repo, path)
    return path


def _check_digest(repo: str, path: Path) -> None:
    """Large files go by their SHA-256 in the cache's blobs; hold what arrived against it."""
    if not path.is_symlink():
        return
    # one step only: the blob may itself be a link, into a store that goes by another hash
    blob = path.parent / os.readlink(path)
    if len(blob.name) != 64:
        return
    with blob.open("rb") as f:
        digest = hashlib.file_digest(f, "sha256").hexdigest()
    if digest != blob.name:
        for part in (path.resolve(), blob, path):
            part.unlink(missing_ok=True)
        raise UserError(f"{repo}: {path.name} arrived with a wrong SHA-256 and was removed; retry")


def explained(what: str, error: Exception, kind: Kind = "model") -> Exception:
    """Turn what the Hub's client raises into a line for the user; other errors stay."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return UserError(
            f"{what}: access must be granted on the Hub; then log in with `hf auth login`"
        )
    if isinstance(error, errors.RepositoryNotFoundError | errors.HFValidationError):
        nowhere = ", neither a local folder nor on the Hub" if kind == "model" else " on the Hub"
        return UserError(
            f"{what}: no such {kind}{nowhere}; if it is private, log in with `hf auth login`"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return UserError(f"{what}: no such revision on the Hub")
    if isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
        return UserError(f"{what}: not in the local cache, and the Hub cannot be reached")
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return UserError(f"{what}: the disk is full; set HF_HOME to a folder with more space")
    # HTTPError of httpx or httpx2, by the client's version
    http_error = errors.HfHubHTTPError.__bases__[0]
    if isinstance(error, (OSError, http_error)):
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        return UserError(f"{what}: the download failed: {reason}; run again, whole files are kept")
    return error
