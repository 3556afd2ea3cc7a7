"""A Hub on the loopback: the HTTP protocol of data sets, with real content, counts and accidents.

It speaks what `huggingface_hub` and `datasets` need: who am I, create, tree, preupload, LFS (in one
part and in several), commit, resolve. Contents that arrived whole are kept, named by a commit or
not; what was cut off is forgotten. So does the real one.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from tests.hub_repository import Entry, Refused, Repository

TOKEN = "hf_" + "loopbackSECRET"
LARGE = (".parquet", ".lance", ".jpg", ".png")  # what .gitattributes of a data set sends to LFS
BLOCK = 8192


class HubServer:
    """Start with `with HubServer() as hub:`; address is `hub.url`.

    Args:
        part_bytes: LFS files above are sent in parts of that size; None: always in one.
        account: what /api/whoami-v2 says.
    """

    def __init__(self, part_bytes: int | None = None, role: str = "write") -> None:
        self.part_bytes = part_bytes
        self.account: dict[str, Any] = {
            "type": "user",
            "name": "user",
            "orgs": [{"name": "club"}],
            "auth": {"accessToken": {"role": role}},
        }
        self.repositories: dict[str, Repository] = {}
        self.storage: dict[str, bytes] = {}
        self.parts: dict[str, bytes] = {}
        self.lock = threading.RLock()
        self.requests: list[str] = []  # "METHOD path"
        self.bytes_received = 0  # in PUT bodies, whole or not
        self.ranges: list[tuple[str, int, int]] = []  # what was sent of files: path, start, end
        self.has_storage = False  # whether large files are handed out by another address
        self.sent_to_storage: list[dict[str, str]] = []  # headers of what was asked there
        self.signature = "signedSECRET"
        self.knows_parts = True
        self.retry_after = ""  # said with every refusal
        self.moments = 0
        self.on_moment: Callable[[int], None] = lambda moment: None
        self.answer: Callable[[str, str], int | None] = lambda method, path: None
        self.cut: Callable[[str, int], bool] = lambda path, received: False
        self.cut_answer: Callable[[str], bool] = lambda path: False  # in its middle
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.server.handle_error = lambda *_: None  # type: ignore[method-assign]
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def moment(self) -> None:
        """Called at every request, block and answer: the points where something may happen."""
        with self.lock:
            self.moments += 1
            self.on_moment(self.moments)

    def files(self, repo: str) -> dict[str, bytes]:
        return {name: entry.content for name, entry in self.repositories[repo].files.items()}

    def puts(self) -> list[str]:
        return [request for request in self.requests if request.startswith("PUT ")]

    # --- one method for each route; each returns JSON -------------------------------------------

    def repository(self, repo: str) -> Repository:
        if repo not in self.repositories:
            raise Refused(404, "Repository not found", "RepoNotFound")
        return self.repositories[repo]

    def create(self, asked: dict[str, Any]) -> dict[str, Any]:
        name = f"{asked.get('organization') or self.account['name']}/{asked['name']}"
        if name in self.repositories:
            raise Refused(409, "You already created this dataset repo")
        private = bool(asked.get("private")) or asked.get("visibility") == "private"
        self.repositories[name] = made = Repository(private)
        made.commit("initial commit", {".gitattributes": Entry(b"*.parquet filter=lfs\n", False)})
        kind = "datasets/" if asked.get("type") == "dataset" else ""
        return {"url": f"{self.url}/{kind}{name}", "id": name}

    def info(self, repo: str, revision: str = "main") -> dict[str, Any]:
        found = self.repository(repo)
        if (files := found.at(revision)) is None:
            raise Refused(404, "Invalid rev id", "RevisionNotFound")
        sha = found.head if revision == "main" else revision
        siblings = [{"rfilename": name} for name in files]
        return {
            "_id": "1",
            "id": repo,
            "sha": sha,
            "private": found.private,
            "siblings": siblings,
            "tags": [],
            "downloads": 0,
            "lastModified": "2026-01-01T00:00:00.000Z",
        }

    def tree(self, repo: str, revision: str, folder: str, recursive: bool) -> list[dict[str, Any]]:
        files = self.repository(repo).at(revision)
        if files is None:
            raise Refused(404, "Invalid rev id", "RevisionNotFound")
        start = f"{folder}/" if folder else ""
        inside = {name: entry for name, entry in files.items() if name.startswith(start)}
        if folder and not inside:
            raise Refused(404, f"{folder} does not exist", "EntryNotFound")
        found, folders = [], set()
        for name, entry in sorted(inside.items()):
            parts = name.removeprefix(start).split("/")
            folders |= {start + "/".join(parts[:depth]) for depth in range(1, len(parts))}
            if recursive or len(parts) == 1:
                found.append(entry.describe(name))
        if not recursive:
            folders = {name for name in folders if "/" not in name.removeprefix(start)}
        return found + [
            {"type": "directory", "path": n, "oid": "0" * 40, "size": 0} for n in folders
        ]

    def paths_info(self, repo: str, revision: str, paths: list[str]) -> list[dict[str, Any]]:
        files = self.repository(repo).at(revision) or {}
        found = [files[path].describe(path) for path in paths if path in files]
        folders = [p for p in paths if any(name.startswith(f"{p}/") for name in files)]
        return found + [{"type": "directory", "path": p, "oid": "0" * 40} for p in folders]

    def preupload(self, repo: str, asked: dict[str, Any]) -> dict[str, Any]:
        there = self.repository(repo).files
        ignored = there[".gitignore"].content.decode().split() if ".gitignore" in there else []
        answers = []
        for file in asked["files"]:
            name = file["path"]
            is_large = name.endswith(LARGE) or file["size"] > 10_000_000
            entry = there.get(name)
            oid = entry and (
                hashlib.sha256(entry.content).hexdigest() if entry.is_large else entry.git_id()
            )
            answers.append(
                {
                    "path": name,
                    "uploadMode": "lfs" if is_large else "regular",
                    "shouldIgnore": name in ignored,
                    "oid": oid,
                }
            )
        return {"files": answers}

    def batch(self, asked: dict[str, Any]) -> dict[str, Any]:
        return {"transfer": "basic", "objects": [self._object(o) for o in asked["objects"]]}

    def _object(self, asked: dict[str, Any]) -> dict[str, Any]:
        oid, size = asked["oid"], asked["size"]
        found: dict[str, Any] = {"oid": oid, "size": size}
        if oid in self.storage:
            return found
        upload: dict[str, Any] = {"href": f"{self.url}/store/{oid}?Signature=signedSECRET"}
        if self.part_bytes and size > self.part_bytes:
            num_parts = -(-size // self.part_bytes)
            upload = {"href": f"{self.url}/complete/{oid}", "header": {}}
            upload["header"] = {
                str(n): f"{self.url}/part/{oid}/{n}" for n in range(1, num_parts + 1)
            }
            upload["header"]["chunk_size"] = str(self.part_bytes)
        return found | {"actions": {"upload": upload}}

    def store(self, oid: str, content: bytes) -> None:
        if hashlib.sha256(content).hexdigest() != oid:
            raise Refused(400, f"content is not {oid}")
        self.storage[oid] = content

    def complete(self, oid: str, asked: dict[str, Any]) -> dict[str, Any]:
        self.store(oid, b"".join(self.parts[f"{oid}/{p['partNumber']}"] for p in asked["parts"]))
        return {}

    def commit(self, repo: str, lines: list[dict[str, Any]]) -> dict[str, Any]:
        found, header = self.repository(repo), lines[0]["value"]
        if header.get("parentCommit") not in (None, found.head):
            raise Refused(412, "A commit has happened since. Please refresh and try again.")
        files = dict(found.files)
        for line in lines[1:]:
            key, value = line["key"], line["value"]
            if key == "file":
                files[value["path"]] = Entry(base64.b64decode(value["content"]), False)
            elif key == "lfsFile":
                if value["oid"] not in self.storage:
                    raise Refused(400, f"LFS pointer {value['oid']} points to no file")
                files[value["path"]] = Entry(self.storage[value["oid"]], True)
            elif value["path"] not in files:
                raise Refused(404, "A file with this name doesn't exist", "EntryNotFound")
            else:
                del files[value["path"]]
        oid = found.commit(header["summary"], files)
        return {
            "success": True,
            "commitOid": oid,
            "commitUrl": f"{self.url}/datasets/{repo}/commit/{oid}",
        }


def _handler(hub: HubServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # else each answer waits 40 ms

        def log_message(self, *_: object) -> None:
            """Nothing on the screen."""

        def do_GET(self) -> None:
            self._answer()

        do_HEAD = do_POST = do_PUT = do_GET

        def _answer(self) -> None:
            url = urlsplit(self.path)
            path, query = unquote(url.path), parse_qs(url.query)
            hub.requests.append(f"{self.command} {path}")
            hub.moment()
            try:
                body = self._body(path)
                if body is None:  # cut off
                    self.close_connection = True
                    return
                status = hub.answer(self.command, path)
                if status:
                    raise Refused(status, "the loopback Hub is told to refuse")
                if path.startswith("/datasets/") and "/resolve/" in path:
                    self._file(path)
                    return
                if path.startswith("/storage/"):
                    self._stored(path, query)
                    return
                if not path.startswith(("/store/", "/part/", "/complete/")):
                    self._authorize()
                with hub.lock:
                    answer = self._route(path.strip("/").split("/"), query, body)
                self._send(200, json.dumps(answer).encode(), {"ETag": '"part"'})
            except Refused as refused:
                if path.startswith(("/store/", "/part/")):  # the storage gives no reasons
                    self._send(refused.status, b"<Error/>", {})
                    return
                headers = {"X-Error-Code": refused.code, "X-Error-Message": refused.message}
                headers["Retry-After"] = hub.retry_after
                text = json.dumps({"error": refused.message}).encode()
                self._send(refused.status, text, {k: v for k, v in headers.items() if v})

        def _authorize(self) -> None:
            if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                raise Refused(401, "Invalid credentials in Authorization header")

        def _body(self, path: str) -> bytes | None:
            left, received, blocks = int(self.headers.get("Content-Length") or 0), 0, []
            while left:
                block = self.rfile.read(min(left, BLOCK))
                if not block:
                    return None
                blocks.append(block)
                left, received = left - len(block), received + len(block)
                if self.command == "PUT":
                    with hub.lock:
                        hub.bytes_received += len(block)
                hub.moment()
                with hub.lock:  # what is told to cut so often may count
                    is_cut = hub.cut(path, received)
                if is_cut:
                    return None
            return b"".join(blocks)

        def _route(self, parts: list[str], query: dict[str, list[str]], body: bytes) -> Any:
            repo = "/".join(parts[2:4])
            match [self.command, *parts]:
                case ["GET", "api", "whoami-v2"]:
                    return hub.account
                case ["POST", "api", "validate-yaml"]:
                    assert json.loads(body)["content"].startswith("---\n")
                    return {"errors": [], "warnings": []}
                case ["POST", "api", "repos", "create"]:
                    return hub.create(json.loads(body))
                case ["GET", "api", "datasets" | "models", _, _]:
                    return hub.info(repo)
                case ["GET", "api", "datasets" | "models", _, _, "revision", revision]:
                    return hub.info(repo, revision)
                case ["GET", "api", "datasets" | "models", _, _, "tree", revision, *folder]:
                    recursive = query.get("recursive", ["false"])[0].lower() in ("true", "1")
                    return hub.tree(repo, revision, "/".join(folder), recursive)
                case ["POST", "api", "datasets" | "models", _, _, "paths-info", revision]:
                    asked = parse_qs(body.decode()) if body[:1] != b"{" else json.loads(body)
                    return hub.paths_info(repo, revision, asked["paths"])
                case ["POST", "api", "datasets" | "models", _, _, "preupload", "main"]:
                    return hub.preupload(repo, json.loads(body))
                case ["POST", "datasets", _, _, "info", "lfs", "objects", "batch"]:
                    return hub.batch(json.loads(body))
                case ["POST", _, _, "info", "lfs", "objects", "batch"]:  # of a model
                    return hub.batch(json.loads(body))
                case ["PUT", "store", oid]:
                    return hub.store(oid, body)
                case ["PUT", "part", oid, number]:
                    hub.parts[f"{oid}/{number}"] = body
                    return None
                case ["POST", "complete", oid]:
                    return hub.complete(oid, json.loads(body))
                case ["POST", "api", "datasets" | "models", _, _, "commit", "main"]:
                    return hub.commit(repo, [json.loads(line) for line in body.splitlines()])
            raise Refused(404, f"no route {self.command} /{'/'.join(parts)}")

        def _file(self, path: str) -> None:
            """HEAD or GET of one file, or of a range of it."""
            repo, _, rest = path.removeprefix("/datasets/").partition("/resolve/")
            revision, _, name = rest.partition("/")
            found = hub.repository(repo)
            if found.private:
                self._authorize()
            files = found.at(revision) or {}
            if name not in files:
                raise Refused(404, "Entry not found", "EntryNotFound")
            content = files[name].content
            headers = {
                "ETag": f'"{hashlib.sha256(content).hexdigest()}"',
                "X-Repo-Commit": found.head if revision == "main" else revision,
                "Accept-Ranges": "bytes",
            }
            if hub.has_storage and files[name].is_large and self.command == "GET":
                oid = hashlib.sha256(content).hexdigest()
                hub.storage[oid] = content
                place = f"http://localhost:{hub.server.server_port}/storage/{oid}/{name}"
                headers["Location"] = f"{place}?Signature={hub.signature}"
                self._send(302, b"", headers)
                return
            self._part(name, content, headers)

        def _stored(self, path: str, query: dict[str, list[str]]) -> None:
            """The other address: it knows signatures only."""
            hub.sent_to_storage.append(dict(self.headers))
            if query.get("Signature") != [hub.signature]:
                raise Refused(403, "Request has expired")
            oid, _, name = path.removeprefix("/storage/").partition("/")
            self._part(name, hub.storage[oid], {})

        def _part(self, name: str, content: bytes, headers: dict[str, str]) -> None:
            status, start, end = 200, 0, len(content) - 1
            if (wanted := self.headers.get("Range")) and hub.knows_parts:
                first, _, last = wanted.removeprefix("bytes=").partition("-")
                start, end = int(first), min(int(last or len(content) - 1), len(content) - 1)
                headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
                content, status = content[start : end + 1], 206
            if self.command == "GET":
                with hub.lock:
                    hub.ranges.append((name, start, end + 1))
            self._send(status, content, headers, is_cut=hub.cut_answer(name))

        def _send(
            self, status: int, content: bytes, headers: dict[str, str], *, is_cut: bool = False
        ) -> None:
            hub.moment()
            try:
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content[: len(content) // 2] if is_cut else content)
                if is_cut:
                    self.close_connection = True
                hub.moment()
            except OSError:
                self.close_connection = True  # the other side is gone

    return Handler
