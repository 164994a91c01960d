"""A model hub on 127.0.0.1 that keeps files in memory: the routes of huggingface_hub that PEFT uses, and no more."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

Repositories = dict[str, dict[str, bytes]]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    repositories: Repositories
    private: set[str]
    unknown: list[str]

    def log_message(self, *args: object) -> None:
        pass

    def _answer(self, code: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(code)
        for name, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, value: object) -> None:
        self._answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _file(self, repo: str, path: str) -> None:
        files = self.repositories.get(repo)
        if files is None or path not in files:
            code = "RepoNotFound" if files is None else "EntryNotFound"
            return self._answer(404, headers={"X-Error-Code": code, "X-Error-Message": code, "X-Repo-Commit": "0" * 40})
        etag = hashlib.sha1(files[path]).hexdigest()
        return self._answer(200, files[path], {"ETag": f'"{etag}"', "X-Repo-Commit": "0" * 40})

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        if found := re.fullmatch(r"/([\w.-]+/[\w.-]+)/resolve/[^/]+/(.+)", path):
            return self._file(*found.groups())
        if found := re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+?)(/revision/[^/]+)?", path):
            files = self.repositories.get(found[1])
            if files is None:
                return self._answer(404, headers={"X-Error-Code": "RepoNotFound"})
            return self._json(
                {
                    "id": found[1],
                    "sha": "0" * 40,
                    "private": found[1] in self.private,
                    "siblings": [{"rfilename": name} for name in sorted(files)],
                }
            )
        if found := re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)/tree/[^/]+(/.*)?", path):
            files = self.repositories.get(found[1], {})
            return self._json(
                [{"type": "file", "path": n, "size": len(b), "oid": "0" * 40} for n, b in sorted(files.items())]
            )
        return self._refuse()

    do_HEAD = do_GET

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            repo = "/".join(filter(None, [asked.get("organization") or "user", asked["name"]]))
            if repo not in self.repositories and "private" in (
                asked.get("visibility"),
                asked.get("private") and "private",
            ):
                self.private.add(repo)
            self.repositories.setdefault(repo, {})
            return self._json({"url": f"{self.server.address}/{repo}", "id": repo})
        if self.path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if found := re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)/preupload/[^/]+", self.path):
            names = [file["path"] for file in json.loads(body)["files"]]
            return self._json({"files": [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]})
        if found := re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)/commit/[^/]+", self.path.split("?")[0]):
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    value = entry["value"]
                    self.repositories[found[1]][value["path"]] = base64.b64decode(value["content"])
            return self._json({"commitUrl": f"{self.server.address}/{found[1]}/commit/0", "commitOid": "0" * 40})
        return self._refuse()

    def _refuse(self) -> None:
        self.unknown.append(f"{self.command} {self.path}")
        self._answer(501)


@contextmanager
def fake_hub() -> Iterator[tuple[str, Repositories, list[str]]]:
    """Serves while inside: its address, its files, and the requests that it did not understand."""
    repositories: Repositories = {}
    unknown: list[str] = []
    handler = type("Handler", (_Handler,), {"repositories": repositories, "private": set(), "unknown": unknown})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.address = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield server.address, repositories, unknown
        finally:
            server.shutdown()
            thread.join()
