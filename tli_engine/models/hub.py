"""A model on the Hugging Face Hub: only the files that are asked for are downloaded."""

import errno
import hashlib
from pathlib import Path

from tli_engine.errors import UserError

# what a tokenizer may consist of; weights are fetched shard by shard
_SMALL = [
    *("config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json"),
    *("vocab*", "merges*", "chat_template*", "*.model"),
]


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


def fetch_file(repo: str, file: str) -> Path | None:
    """Download one file, resuming where an earlier try broke off; ``None`` if there is none.

    Raises:
        UserError: As :func:`fetch_folder`, or the file's SHA-256 is not the Hub's.
    """
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    name, revision = split_revision(repo)
    cached = try_to_load_from_cache(name, file, revision=revision)
    try:
        path = Path(hf_hub_download(name, file, revision=revision))
    except LocalEntryNotFoundError as e:
        raise _explained(repo, e) from None
    except EntryNotFoundError:
        return None
    except Exception as e:
        raise _explained(repo, e) from None
    if not isinstance(cached, str):
        _check_digest(repo, path)
    return path


def split_revision(repo: str) -> tuple[str, str | None]:
    """``organisation/name@revision`` to its parts."""
    name, _, revision = repo.partition("@")
    return name, revision or None


def _check_digest(repo: str, path: Path) -> None:
    """Large files lie in the cache under their SHA-256; hold what arrived against it."""
    blob = path.resolve()
    if len(blob.name) != 64:
        return
    with blob.open("rb") as f:
        digest = hashlib.file_digest(f, "sha256").hexdigest()
    if digest != blob.name:
        blob.unlink()
        path.unlink(missing_ok=True)
        raise UserError(f"{repo}: {path.name} arrived with a wrong SHA-256 and was removed; retry")


def _explained(repo: str, error: Exception) -> Exception:
    """Turn what the Hub's client raises into a line for the user; other errors stay."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return UserError(
            f"{repo}: access must be granted on the Hub; then log in with `hf auth login`"
        )
    if isinstance(error, errors.RepositoryNotFoundError | errors.HFValidationError):
        return UserError(f"{repo}: no such model, neither a local folder nor on the Hub")
    if isinstance(error, errors.RevisionNotFoundError):
        return UserError(f"{repo}: no such revision on the Hub")
    if isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
        return UserError(f"{repo}: not in the local cache, and the Hub cannot be reached")
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return UserError(f"{repo}: the disk is full; set HF_HOME to a folder with more space")
    if isinstance(error, errors.HfHubHTTPError | ConnectionError | TimeoutError):
        reason = str(error).splitlines()[0]
        return UserError(f"{repo}: the download failed: {reason}; run again, it resumes")
    return error
