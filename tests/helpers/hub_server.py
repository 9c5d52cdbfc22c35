"""A local stand-in for the Hub's HTTP interface: enough of it for huggingface_hub to create, upload and download."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "1" * 40


class HubServer:
    """Repositories in memory: `files` by (repository, path).

    Attributes:
        url: its address. token: the one that it knows. fail: paths whose requests fail, by a part of them.
    """

    def __init__(self, token: str) -> None:
        self.token, self.files, self.objects = token, dict[tuple[str, str], bytes](), dict[str, bytes]()
        self.repositories: set[str] = set()
        self.fail = ""
        self.url = ""

    def commit(self, repository: str, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                self.files[repository, value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.files[repository, value["path"]] = self.objects[value["oid"]]


@contextmanager
def hub_server(token: str = "hf_local") -> Iterator[HubServer]:
    """A server on loopback within the block."""
    hub = HubServer(token)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _answer(self, value: Any = None, *, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in ({"Content-Length": str(len(data))} | (headers or {})).items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        data = b""
        while size := int(self.rfile.readline(), 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def _refused(self) -> bool:
        known = self.headers.get("Authorization") == f"Bearer {self.hub.token}" or self.path.startswith("/upload/")
        if not known:
            self._answer({"error": "Invalid username or password."}, status=401)
        elif self.hub.fail and self.hub.fail in self.path:
            self._answer({"error": "out of order"}, status=403)
        return not known or bool(self.hub.fail and self.hub.fail in self.path)

    def do_GET(self) -> None:
        if self._refused():
            return
        parts = self.path.strip("/").split("/")
        if self.path.startswith("/api/whoami-v2"):
            self._answer({"name": "owner", "type": "user", "orgs": []})
        elif parts[:2] == ["api", "models"] and "/".join(parts[2:4]) in self.hub.repositories:
            repository = "/".join(parts[2:4])
            names = [{"rfilename": path} for owner, path in self.hub.files if owner == repository]
            self._answer({"id": repository, "sha": COMMIT, "siblings": names, "private": False, "tags": [],
                          "downloads": 0, "likes": 0})  # fmt: skip
        elif len(parts) > 4 and parts[2] == "resolve":
            data = self.hub.files.get(("/".join(parts[:2]), "/".join(parts[4:])))
            etag = hashlib.sha256(data or b"").hexdigest()
            headers = {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT}
            missing = {"X-Error-Code": "EntryNotFound"}
            self._answer(data or b"", status=200 if data is not None else 404, headers=headers if data else missing)
        else:
            self._answer({"error": "Repository not found"}, status=404, headers={"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET

    def do_POST(self) -> None:
        body = self._body()
        if self._refused():
            return
        parts = self.path.strip("/").split("/")
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            repository = "/".join(filter(None, (asked.get("organization"), asked["name"])))
            self.hub.repositories.add(repository)
            self._answer({"url": f"{self.hub.url}/{repository}", "name": repository, "id": "1"})
        elif self.path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            for entry in objects:
                entry["actions"] = {"upload": {"href": f"{self.hub.url}/upload/{entry['oid']}"}}
            self._answer({"transfer": "basic", "objects": objects})
        elif "preupload" in parts:
            modes = [
                {"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular",
                 "shouldIgnore": False, "oid": None}
                for f in json.loads(body)["files"]
            ]  # fmt: skip
            self._answer({"files": modes})
        elif "commit" in parts:
            repository = "/".join(parts[2:4])
            self.hub.commit(repository, [json.loads(line) for line in body.splitlines() if line.strip()])
            self._answer(
                {"commitUrl": f"{self.hub.url}/{repository}/commit/{COMMIT}", "commitOid": COMMIT, "success": True}
            )
        elif self.path == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
        else:
            self._answer({}, status=404)

    def do_PUT(self) -> None:
        self.hub.objects[self.path.rpartition("/")[2]] = self._body()
        self._answer({})
