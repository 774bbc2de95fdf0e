"""A Hub on this machine, which huggingface_hub asks instead of the real one."""

import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest
from huggingface_hub import constants

from tli_engine.testing import save_tiny_model


class Request(NamedTuple):
    method: str
    path: str
    range: str | None


@dataclass
class FakeHub:
    """Serves folders as ``org/name``, one commit a revision; says what it was asked for."""

    url: str = ""
    repos: dict[str, dict[str, Path]] = field(default_factory=dict)
    log: list[Request] = field(default_factory=list)
    # by file: bytes after which the connection breaks, once each
    breaks: dict[str, list[int]] = field(default_factory=dict)
    # by file: what is sent instead of its content
    altered: dict[str, bytes] = field(default_factory=dict)
    # by path prefix: status and X-Error-Code; methods it applies to
    errors: dict[str, tuple[int, str, str]] = field(default_factory=dict)

    def commit(self, repo: str, revision: str) -> str:
        return hashlib.sha1(f"{repo} {revision}".encode()).hexdigest()

    def folder(self, repo: str, revision: str) -> Path | None:
        for name, folder in self.repos[repo].items():
            if revision in (name, self.commit(repo, name)):
                return folder
        return None

    def asked(self, method: str) -> list[str]:
        """Names of the files that were asked for, in order."""
        return [
            r.path.rpartition("/")[2]
            for r in self.log
            if r.method == method and "/resolve/" in r.path
        ]

    def shards(self, method: str = "GET") -> list[str]:
        return [name for name in self.asked(method) if name.endswith(".safetensors")]


class HubServer(ThreadingHTTPServer):
    """A server on loopback, on a port of the system's choice."""

    def __init__(self, hub: FakeHub) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.hub = hub
        hub.url = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        hub, path = self.server.hub, unquote(urlsplit(self.path).path)
        hub.log.append(Request(self.command, path, self.headers.get("Range")))
        for prefix, (status, code, methods) in hub.errors.items():
            if path.startswith(prefix) and self.command in methods:
                self.send(status, b"no", {"X-Error-Code": code} if code else {})
                return
        api = path.startswith("/api/models/")
        parts = path.removeprefix("/api/models").removeprefix("/datasets").strip("/").split("/")
        repo = "/".join(parts[:2])
        if repo not in hub.repos:
            self.send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
            return
        verb, rest = (parts[2] if parts[2:] else "revision"), parts[3:]
        revision, file = ("/".join(rest) or "main", "") if api else split(hub, repo, rest)
        folder = hub.folder(repo, revision)
        if folder is None:
            self.send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            return
        name = next(n for n in hub.repos[repo] if hub.folder(repo, n) == folder)
        commit = hub.commit(repo, name)
        if verb == "revision":
            self.send_json({"id": repo, "sha": commit, "siblings": []})
        elif verb == "tree":
            self.send_json([entry(p) for p in sorted(folder.iterdir())])
        else:
            self.send_file(folder / file, {"X-Repo-Commit": commit})

    def send_file(self, path: Path, headers: dict[str, str]) -> None:
        hub = self.server.hub
        if not path.is_file():
            self.send(404, b"", headers | {"X-Error-Code": "EntryNotFound"})
            return
        content = path.read_bytes()
        headers |= {"ETag": f'"{etag(path, content)}"', "Accept-Ranges": "bytes"}
        if self.command == "GET":
            content = hub.altered.get(path.name, content)
        total, start, status = len(content), 0, 200
        wanted = self.headers.get("Range")
        if wanted is not None:
            start, status = int(wanted.removeprefix("bytes=").rstrip("-")), 206
            headers["Content-Range"] = f"bytes {start}-{total - 1}/{total}"
        breaks = hub.breaks.get(path.name, []) if self.command == "GET" else []
        self.send(status, content[start:], headers, breaks.pop(0) if breaks else None)

    def send_json(self, value: Any) -> None:
        self.send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def send(
        self, status: int, body: bytes, headers: dict[str, str], sent: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:sent])
        if sent is not None:
            self.close_connection = True


def split(hub: FakeHub, repo: str, parts: list[str]) -> tuple[str, str]:
    """Revision and file; either may hold slashes, a revision is one of the repository's."""
    for end in range(1, len(parts)):
        if hub.folder(repo, "/".join(parts[:end])) is not None:
            return "/".join(parts[:end]), "/".join(parts[end:])
    return "/".join(parts[:-1]), parts[-1]


def etag(path: Path, content: bytes) -> str:
    """As the Hub: SHA-256 of what it stores as large files, a git object's SHA-1 of others."""
    if path.suffix in (".safetensors", ".parquet"):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def entry(path: Path) -> dict[str, Any]:
    content = path.read_bytes()
    found = {"type": "file", "path": path.name, "size": len(content), "oid": "0" * 40}
    if path.suffix == ".safetensors":
        lfs = {"oid": etag(path, content), "size": len(content), "pointerSize": 130}
        return found | {"lfs": lfs}
    return found


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four blocks in shards of 40 kB, and files that are none of our business."""
    folder = save_tiny_model(
        tmp_path_factory.mktemp("hub") / "tiny", "llama", max_shard_size=40_000
    )
    for name in ("README.md", "pytorch_model.bin", "modeling_tiny.py", "model.onnx"):
        (folder / name).write_text("not to be fetched")
    return folder


@pytest.fixture(scope="session")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("hub") / "single", "llama", seed=1)


@pytest.fixture
def hub(
    model: Path, single: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[FakeHub]:
    """A Hub that the client asks instead of the real one, and an empty cache."""
    hub = FakeHub(repos={"org/tiny": {"main": model}, "org/single": {"main": single}})
    server = HubServer(hub)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    # what HF_ENDPOINT, HF_HUB_CACHE and HF_HUB_OFFLINE set when the client is imported
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    # bytes that a broken connection leaves are kept by the chunk, of 10 MB
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    # it waits before it tries again
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    huggingface_hub.close_session()
    yield hub
    huggingface_hub.close_session()
    server.shutdown()
    server.server_close()
    thread.join()
