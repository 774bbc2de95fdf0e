"""A model on the Hugging Face Hub: only the files that are asked for are downloaded."""

from pathlib import Path

from tli_engine.data.downloads import download, explained

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
        raise explained(repo, e) from None


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
    name, revision = split_revision(repo)
    return download(repo, name, file, commit or revision)


def is_cached(repo: str, file: str, commit: str) -> bool:
    """Whether a file of a commit is in the cache."""
    from huggingface_hub import try_to_load_from_cache

    name, _ = split_revision(repo)
    return isinstance(try_to_load_from_cache(name, file, revision=commit), str)


def file_bytes(repo: str, file: str, commit: str) -> int | None:
    """Bytes of a file, which the Hub is asked for; ``None`` where it does not say."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    name, _ = split_revision(repo)
    try:
        return get_hf_file_metadata(hf_hub_url(name, file, revision=commit)).size
    except Exception as e:
        # what has no explanation is no failure of the network
        if explained(repo, e) is e:
            raise
        return None


def split_revision(repo: str) -> tuple[str, str | None]:
    """``organisation/name@revision`` to its parts."""
    name, _, revision = repo.partition("@")
    return name, revision or None
