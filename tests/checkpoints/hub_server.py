"""A Hugging Face Hub on the loopback address: enough of its HTTP API for downloads, and ways to misbehave."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import threading
import time
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

RESOLVE = re.compile(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
MODEL = re.compile(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/?]+))?(?:\?.*)?")


@dataclasses.dataclass
class Repository:
    """One version of a model's files; ``needs`` is the token without which it is hidden, or gated."""

    files: Mapping[str, bytes]
    commit: str = "1" * 40
    needs: str | None = None
    gated: bool = False


class HubServer(ThreadingHTTPServer):
    """Serves ``repositories``.

    ``cut_short`` names files of which only half arrives, ``silent`` makes it never answer, ``failing`` is a status that
    it answers everything with.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, Repository] = {}
        self.requests: list[tuple[str, str]] = []
        self.cut_short: set[str] = set()
        self.silent = False
        self.failing: int | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def fetched(self) -> set[str]:
        """The files that were asked for by GET."""
        return {match[3] for method, path in self.requests if method == "GET" and (match := RESOLVE.fullmatch(path))}

    def add(self, name: str, folder: Path, **facts: object) -> Repository:
        files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        self.repositories[name] = Repository(files, **facts)  # type: ignore[arg-type]
        return self.repositories[name]

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up, as some tests have it do, is no news: it would stand in another test's output."""

    def __enter__(self) -> HubServer:
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def log_message(self, *_: object) -> None:
        pass

    def answer(self) -> None:
        hub = self.server
        hub.requests.append((self.command, self.path))
        if hub.silent:
            time.sleep(30)
        if hub.failing:
            return self.refuse(hub.failing, "")
        if match := MODEL.fullmatch(self.path):
            return self.describe(match[1], match[2])
        if match := RESOLVE.fullmatch(self.path):
            return self.give(*match.groups())
        return self.refuse(404, "")

    def repository(self, name: str, revision: str | None) -> Repository | None:
        found = self.server.repositories.get(name)
        given = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if found is None or (found.needs and not found.gated and given != found.needs):
            self.refuse(401 if not given else 404, "RepoNotFound")
        elif found.gated and given != found.needs:
            self.refuse(401 if not given else 403, "GatedRepo")
        elif revision not in (None, "main", found.commit):
            self.refuse(404, "RevisionNotFound")
        else:
            return found
        return None

    def describe(self, name: str, revision: str | None) -> None:
        found = self.server.repositories.get(name)
        if found and found.gated:  # the Hub shows the list of a gated repository's files to everyone
            pass
        elif self.repository(name, revision) is None:
            return
        assert found is not None
        siblings = [{"rfilename": file} for file in found.files]
        body = json.dumps({"id": name, "modelId": name, "sha": found.commit, "siblings": siblings, "tags": []}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def give(self, name: str, revision: str, file: str) -> None:
        found = self.repository(name, revision)
        if found is None:
            return
        if file not in found.files:
            self.refuse(404, "EntryNotFound", found.commit)
            return
        body = found.files[file]
        start = 0
        if match := re.fullmatch(r"bytes=(\d+)-.*", self.headers.get("Range") or ""):
            start = int(match[1])
        self.send_response(206 if start else 200)
        self.send_header("X-Repo-Commit", found.commit)
        self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(body) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        self.end_headers()
        if self.command == "GET":
            piece = body[start:]
            if file in self.server.cut_short:
                self.close_connection = True
                piece = piece[: len(piece) // 2]
            self.wfile.write(piece)

    def refuse(self, status: int, code: str, commit: str = "") -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", code)
        if commit:
            self.send_header("X-Repo-Commit", commit)
        self.send_header("Content-Length", "0")
        self.end_headers()
