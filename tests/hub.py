"""A Hub on this machine: models of folders, by id, as huggingface_hub asks for them."""

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
from unittest import mock

from huggingface_hub import constants

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """What it has, and what it was asked for.

    Attributes:
        models: folder by id; each has the branch main, at COMMIT.
        files: that were sent, as ``id/file``.
        asked: how many questions there were.
        address: where it is.
    """

    models: dict[str, Path] = field(default_factory=dict)
    files: list[str] = field(default_factory=list)
    asked: int = 0
    address: str = ""

    def answer(self, path: str, *, sends: bool) -> tuple[int, dict[str, str], bytes]:
        """Code, headers and body, which is sent or not."""
        self.asked += 1
        path = path.partition("?")[0]
        api = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(revision|tree)/([^/]+)", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        match = api or file
        folder = self.models.get(match[1]) if match else None
        if match is None or folder is None:
            return 404, {"X-Error-Code": "RepoNotFound"}, b""
        if (api[3] if api else match[2]) not in ("main", COMMIT):
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        if api:
            files = sorted(one for one in folder.rglob("*") if one.is_file())
            names = [str(one.relative_to(folder)) for one in files]
            if api[2] == "revision":
                siblings = [{"rfilename": name} for name in names]
                return 200, {}, json.dumps({"id": match[1], "sha": COMMIT, "siblings": siblings}).encode()
            entries = zip(files, names, strict=True)
            tree = [
                {"type": "file", "path": name, "size": one.stat().st_size, "oid": etag(one)} for one, name in entries
            ]
            return 200, {}, json.dumps(tree).encode()
        source = folder / match[3]
        if not source.is_file():
            return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}, b""
        self.files += [f"{match[1]}/{match[3]}"] * sends
        return 200, {"ETag": f'"{etag(source)}"', "X-Repo-Commit": COMMIT}, source.read_bytes()


def etag(file: Path) -> str:
    """What the Hub calls a file: weights by their SHA-256."""
    kind = hashlib.sha256 if file.suffix in (".safetensors", ".bin") else hashlib.sha1
    return kind(file.read_bytes()).hexdigest()


@contextmanager
def serving(cache: Path) -> Iterator[Hub]:
    """A Hub that huggingface_hub asks within this block, with this folder for its cache."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            sends = self.command == "GET"
            code, headers, body = hub.answer(self.path, sends=sends)
            self.send_response(code)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if sends:
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    url = f"{hub.address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    with (
        mock.patch.object(constants, "HF_HUB_CACHE", str(cache)),
        mock.patch.object(constants, "HF_HUB_OFFLINE", False),
        mock.patch.object(constants, "ENDPOINT", hub.address),
        mock.patch.object(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url),
    ):
        yield hub
    server.shutdown()
    server.server_close()
