"""A small Hugging Face Hub on 127.0.0.1: the requests that huggingface_hub makes, in memory.

Repositories have branches of commits; a commit is the whole tree, path -> bytes. What a test wants
to go wrong is set on the server: `private`, `gated`, `cut`, `broken`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_of_the_tests"  # of the one user who may read and write everything
Tree = dict[str, bytes]


@dataclass
class Repository:
    """branches: name -> commit; commits: commit -> its files."""

    private: bool = False
    gated: bool = False
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Tree] = field(default_factory=dict)

    def commit(self, branch: str, tree: Tree) -> str:
        content = repr((len(self.commits), sorted(tree.items()))).encode()
        name = hashlib.sha1(content).hexdigest()
        self.commits[name], self.branches[branch] = dict(tree), name
        return name

    def resolve(self, revision: str) -> str | None:
        name = self.branches.get(revision, revision)
        return name if name in self.commits else None


class Hub(ThreadingHTTPServer):
    """A hub that answers in threads.

    cut: path -> how many bytes of it are sent before the connection is closed.
    broken: the status that every request is answered with.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}  # SHA-256 -> content, as git LFS stores it
        self.cut: dict[str, int] = {}
        self.broken: int | None = None
        self.sent: list[str] = []  # paths of the files whose content was asked for
        self.written: list[str] = []  # POST requests

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def make(
        self, repo_id: str, tree: Tree, *, private: bool = False, gated: bool = False
    ) -> Repository:
        repository = self.repositories[repo_id] = Repository(private, gated)
        repository.commit("main", tree)
        return repository


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A hub that answers until the block ends."""
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()


class _Refused(Exception):
    def __init__(self, status: int, code: str, message: str, url: str = "") -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.url = status, code, message, url


class _Handler(BaseHTTPRequestHandler):
    server: Hub  # pyright: ignore[reportIncompatibleVariableOverride]
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer(_READ)

    do_HEAD = do_GET  # noqa: N815

    def do_POST(self) -> None:
        self.body = self._read_body()
        self.server.written.append(urlsplit(self.path).path)
        self._answer(_WRITE)

    do_PUT = do_POST  # noqa: N815

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _answer(self, routes: dict[str, Any]) -> None:
        path = urlsplit(self.path).path
        try:
            if self.server.broken is not None:
                raise _Refused(self.server.broken, "", "out of order")
            for pattern, method in routes.items():
                if match := re.fullmatch(pattern, path):
                    return method(self, *(unquote(part or "") for part in match.groups()))
            raise _Refused(404, "NotImplemented", f"no such page: {path}")
        except _Refused as refused:
            headers = {"X-Error-Code": refused.code, "X-Error-Message": refused.message}
            self._send(refused.status, json.dumps({"url": refused.url}).encode(), headers)

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, content: Any) -> None:
        self._send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    @property
    def _known(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    @property
    def _not_allowed(self) -> int:
        return 403 if "Authorization" in self.headers else 401

    def _repository(self, repo_id: str) -> Repository:
        """As the real hub: who is not known is not told whether a repository exists."""
        repository = self.server.repositories.get(repo_id)
        if repository is None or (repository.private and not self._known):
            raise _Refused(404 if self._known else 401, "RepoNotFound", "Repository not found")
        return repository

    def _tree(self, repo_id: str, revision: str) -> tuple[str, Tree]:
        repository = self._repository(repo_id)
        if (commit := repository.resolve(revision)) is None:
            raise _Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit, repository.commits[commit]

    def _writer(self) -> None:
        if not self._known:
            raise _Refused(self._not_allowed, "", "You may not write here.")

    def info(self, repo_id: str, revision: str) -> None:
        commit, tree = self._tree(repo_id, revision or "main")
        repository = self._repository(repo_id)
        siblings = [{"rfilename": path} for path in tree]
        self._json(
            {"id": repo_id, "sha": commit, "private": repository.private, "siblings": siblings}
        )

    def list_tree(self, repo_id: str, revision: str) -> None:
        _, tree = self._tree(repo_id, revision)
        self._json(
            [
                {"type": "file", "path": path, "size": len(content), "oid": _blob(content)}
                for path, content in tree.items()
            ]
        )

    def resolve(self, repo_id: str, revision: str, path: str) -> None:
        commit, tree = self._tree(repo_id, revision)
        if self._repository(repo_id).gated and not self._known:
            raise _Refused(self._not_allowed, "GatedRepo", "Access is restricted.")
        if path not in tree:
            raise _Refused(404, "EntryNotFound", f"no {path}")
        content = tree[path]
        headers = {"ETag": f'"{_blob(content)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if self.command == "HEAD":
            self._send(200, content, headers)
        else:
            self.server.sent.append(path)
            self._send_range(path, content, headers)

    def _send_range(self, path: str, content: bytes, headers: dict[str, str]) -> None:
        asked = re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(asked[1]) if asked else 0
        if asked:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        headers["Content-Length"] = str(len(content) - start)
        self.close_connection = path in self.server.cut
        end = self.server.cut.get(path, len(content))
        self._send(206 if asked else 200, content[start:end], headers)

    def create(self) -> None:
        self._writer()
        asked = json.loads(self.body)
        repo_id = f"{asked['organization']}/{asked['name']}"
        url = f"{self.server.url}/{repo_id}"
        if repo_id in self.server.repositories:
            raise _Refused(409, "", "You already created this model repo", url)
        self.server.make(repo_id, {".gitattributes": b""}, private=is_private(asked))
        self._json({"url": url})

    def branch(self, repo_id: str, name: str) -> None:
        self._writer()
        repository = self._repository(repo_id)
        if name in repository.branches:
            raise _Refused(409, "", "Reference already exists")
        repository.branches[name] = repository.branches["main"]
        self._json({})

    def preupload(self, repo_id: str, revision: str) -> None:
        self._writer()
        self._tree(repo_id, revision)
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(self.body)["files"]
        ]
        self._json({"files": files})

    def batch(self, repo_id: str) -> None:
        self._writer()
        objects = json.loads(self.body)["objects"]
        for entry in objects:
            entry["actions"] = {"upload": {"href": f"{self.server.url}/large/{entry['oid']}"}}
        self._json({"transfer": "basic", "objects": objects})

    def large(self, name: str) -> None:
        assert hashlib.sha256(self.body).hexdigest() == name
        self.server.large[name] = self.body
        self._json({})

    def commit(self, repo_id: str, revision: str) -> None:
        self._writer()
        commit, tree = self._tree(repo_id, revision)
        if revision not in self._repository(repo_id).branches:
            raise _Refused(400, "", f"{commit} is no branch")
        tree = dict(tree)
        for line in self.body.splitlines():
            self._apply(tree, **json.loads(line))
        name = self._repository(repo_id).commit(revision, tree)
        url = f"{self.server.url}/{repo_id}/commit/{name}"
        self._json({"commitUrl": url, "commitOid": name, "success": True})

    def _apply(self, tree: Tree, key: str, value: dict[str, Any]) -> None:
        if key == "file":
            tree[value["path"]] = base64.b64decode(value["content"])
        elif key == "lfsFile":
            tree[value["path"]] = self.server.large[value["oid"]]
        elif key == "deletedFile":
            del tree[value["path"]]

    def validate(self) -> None:
        self._json({"warnings": [], "errors": []})


def is_private(asked: dict[str, Any]) -> bool:
    """Of a request to make a repository; clients of different versions say it differently."""
    return asked.get("visibility") == "private" or bool(asked.get("private"))


def _blob(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


_ID = "([^/]+/[^/]+)"
_READ = {
    rf"/api/models/{_ID}(?:/revision/([^/]+))?": _Handler.info,
    rf"/api/models/{_ID}/tree/([^/]+)": _Handler.list_tree,
    rf"/{_ID}/resolve/([^/]+)/(.+)": _Handler.resolve,
}
_WRITE = {
    "/api/repos/create": _Handler.create,
    "/api/validate-yaml": _Handler.validate,
    rf"/api/models/{_ID}/branch/([^/]+)": _Handler.branch,
    rf"/api/models/{_ID}/preupload/([^/]+)": _Handler.preupload,
    rf"/api/models/{_ID}/commit/([^/]+)": _Handler.commit,
    rf"/{_ID}\.git/info/lfs/objects/batch": _Handler.batch,
    r"/large/([0-9a-f]+)": _Handler.large,
}
