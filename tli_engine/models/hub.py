"""A model on the Hugging Face Hub: only the files that are asked for are downloaded."""

import errno
import hashlib
import os
import sys
from pathlib import Path

from tli_engine.errors import UserError

# what a tokenizer may consist of
TOKENIZER_FILES = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json"),
    *("vocab*", "merges*", "chat_template*", "*.model"),
)
# weights are fetched shard by shard
_SMALL = ["config.json", "generation_config.json", *TOKENIZER_FILES]


def fetch_folder(repo: str) -> Path:
    """Download configuration and tokenizer; return the folder they lie in.

    Args:
        repo: ``organisation/name``, or ``organisation/name@revision``.

    Raises:
        UserError: No such model, no access, no network, no space.
    """
    from huggingface_hub import snapshot_download

    name, revision = split_revision(repo)
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=_SMALL))
    except Exception as e:
        raise _explained(repo, e) from None


def fetch_file(repo: str, file: str, *, commit: str | None = None) -> Path | None:
    """Download one file, unless it is in the cache; ``None`` if the model has none of that name.

    A connection that breaks is resumed where it broke. A file that a process leaves unfinished is
    begun anew by the next one: huggingface_hub 2 keeps whole files only.

    Args:
        repo: ``organisation/name``, or ``organisation/name@revision``.
        file: Name of the file.
        commit: Commit to take it from, in place of the revision.

    Raises:
        UserError: As :func:`fetch_folder`, or the file's SHA-256 is not the Hub's.
    """
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    name, revision = split_revision(repo)
    revision = commit or revision
    cached = try_to_load_from_cache(name, file, revision=revision)
    if cached is None and file.endswith(".safetensors") and not sys.stderr.isatty():
        # on a terminal the client draws a bar, in bytes
        print(f"downloading {repo}: {file}", file=sys.stderr, flush=True)
    try:
        path = Path(hf_hub_download(name, file, revision=revision))
    except LocalEntryNotFoundError as e:
        # offline; the cache also notes which files the Hub does not have
        if cached is not None and not isinstance(cached, str):
            return None
        raise _explained(f"{repo}: {file}", e) from None
    except EntryNotFoundError:
        return None
    except Exception as e:
        raise _explained(f"{repo}: {file}", e) from None
    if not isinstance(cached, str):
        _check_digest(repo, path)
    return path


def split_revision(repo: str) -> tuple[str, str | None]:
    """``organisation/name@revision`` to its parts."""
    name, _, revision = repo.partition("@")
    return name, revision or None


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


def _explained(what: str, error: Exception) -> Exception:
    """Turn what the Hub's client raises into a line for the user; other errors stay."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return UserError(
            f"{what}: access must be granted on the Hub; then log in with `hf auth login`"
        )
    if isinstance(error, errors.RepositoryNotFoundError | errors.HFValidationError):
        return UserError(
            f"{what}: no such model, neither a local folder nor on the Hub; if it is private, log "
            f"in with `hf auth login`"
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
