"""A small hub on this machine: repositories by name, answered as the real one answers huggingface_hub."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import unquote, urlsplit

Files = dict[str, bytes]


@dataclass
class Repo:
    commits: dict[str, Files] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)  # branch or tag -> commit
    gated: bool = False

    def commit(self, files: Files, ref: str = "main") -> str:
        """Files as the newest commit of `ref`; its hash."""
        content = repr((sorted(files.items()), len(self.commits)))
        commit = hashlib.sha1(content.encode()).hexdigest()
        self.commits[commit] = files
        self.refs[ref] = commit
        return commit

    def at(self, revision: str) -> str | None:
        return self.refs.get(revision, revision if revision in self.commits else None)


class Hub:
    """Repositories by `models/owner/name` or `datasets/owner/name`, and every request so far."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.requests: list[str] = []  # "GET /api/models/..."
        self.tokens: set[str | None] = set()
        self.url = ""
        self.broken = False  # then it answers 503

    def repo(self, name: str) -> Repo:
        return self.repos.setdefault(name, Repo())

    def downloads(self) -> list[str]:
        """The files that were sent."""
        return sorted(
            r.partition("/resolve/")[2].partition("/")[2]
            for r in self.requests
            if r.startswith("GET /") and "/resolve/" in r
        )

    @contextmanager
    def serving(self) -> Iterator[Hub]:
        server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        self.url = f"http://127.0.0.1:{server.server_address[1]}"
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def log_message(self, format: str, *args: object) -> None: ...

    def _answer(self, *, body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        self.hub.tokens.add(self.headers.get("Authorization"))
        parts = path.removeprefix("/").split("/")
        if self.hub.broken:
            return self._send(503, b"")
        if parts[0] == "api":
            return self._api("/".join(parts[1:4]), parts[4:])
        if parts[0] != "datasets":
            parts = ["models", *parts]
        return self._file("/".join(parts[:3]), parts[4], "/".join(parts[5:]), body=body)

    def _api(self, name: str, rest: list[str]) -> None:
        repo = self.hub.repos.get(name)
        if repo is None:
            return self._send(401, b"", error="RepoNotFound")
        action, revision = (rest[0], "/".join(rest[1:])) if rest else ("revision", "main")
        commit = repo.at(revision)
        if commit is None:
            return self._send(404, b"", error="RevisionNotFound")
        if action == "tree":
            listed = [
                {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for path, content in repo.commits[commit].items()
            ]
            return self._send(200, json.dumps(listed).encode(), commit=commit)
        info = {
            "id": name.partition("/")[2],
            "sha": commit,
            "siblings": [{"rfilename": f} for f in repo.commits[commit]],
        }
        return self._send(200, json.dumps(info).encode(), commit=commit)

    def _file(self, name: str, revision: str, path: str, *, body: bool) -> None:
        repo = self.hub.repos.get(name)
        if repo is None:
            return self._send(401, b"", error="RepoNotFound")
        if repo.gated:
            return self._send(401, b"", error="GatedRepo")
        commit = repo.at(revision)
        content = None if commit is None else repo.commits[commit].get(path)
        if content is None:
            return self._send(404, b"", error="EntryNotFound", commit=commit)
        return self._send(200, content, commit=commit, etag=hashlib.sha1(content).hexdigest(), body=body)

    def _send(
        self,
        status: int,
        content: bytes,
        *,
        commit: str | None = None,
        etag: str = "",
        error: str = "",
        body: bool = True,
    ) -> None:
        self.send_response(status)
        headers = {"X-Repo-Commit": commit, "ETag": f'"{etag}"' if etag else None, "X-Error-Code": error or None}
        for key, value in headers.items():
            if value is not None:
                self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body and self.command != "HEAD":
            self.wfile.write(content)
