"""The web server of `higgs-prepare review`, on 127.0.0.1, by the standard library.

In: a `Review`. Out: answers to GET / (the page), /api/segments, /clip/ID, and to POST /api/decide.

Guarantees: a page of another origin, another Host, or one without this server's token decides nothing
(tests/test_prepare_review.py).
"""

from __future__ import annotations

import hmac
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from higgs_tune.preprocess.html import SECURITY_HEADERS
from higgs_tune.preprocess.prepare.report import MEDIA_TYPE
from higgs_tune.preprocess.prepare.review import Refused, Review
from higgs_tune.shards.durable import to_json
from higgs_tune.shards.errors import UserError

HOST = "127.0.0.1"
MAX_BODY = 4 << 20  # bytes


class _Handler(BaseHTTPRequestHandler):
    """Answers one connection; drops a client that stays silent."""

    protocol_version = "HTTP/1.1"
    timeout = 30

    @property
    def review(self) -> Review:
        return self._server.review

    @property
    def _server(self) -> ReviewServer:
        assert isinstance(self.server, ReviewServer)
        return self.server

    def do_GET(self) -> None:
        self._answer(self._get)

    def do_POST(self) -> None:
        self._answer(self._post)

    def log_message(self, format: str, *args: Any) -> None:
        """Only errors of the server itself are worth a line; http.server prints their tracebacks."""

    def _answer(self, work: Any) -> None:
        try:
            self._check()
            kind, body, status = *work(), HTTPStatus.OK
        except Refused as refused:
            kind, body, status = "text/plain; charset=utf-8", f"{refused}\n".encode(), refused.status
            self.close_connection = True  # a body that was not read would be taken for the next request
        except UserError as error:
            kind, body, status = "text/plain; charset=utf-8", f"{error}\n".encode(), HTTPStatus.INTERNAL_SERVER_ERROR
        self.send_response(status)
        for name, value in {**SECURITY_HEADERS, "Content-Type": kind, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def _check(self) -> None:
        """Refuse requests that our page does not send."""
        host = self.headers.get("Host", "")
        if host not in self._server.hosts:
            raise Refused(HTTPStatus.MISDIRECTED_REQUEST)
        if self.headers.get("Origin", f"http://{host}") != f"http://{host}":
            raise Refused(HTTPStatus.FORBIDDEN)
        if self.headers.get("Sec-Fetch-Site", "none") not in ("none", "same-origin"):
            raise Refused(HTTPStatus.FORBIDDEN)

    def _get(self) -> tuple[str, bytes]:
        review, target = self.review, urlsplit(self.path)
        if target.path == "/":
            return "text/html; charset=utf-8", "".join(review.page()).encode()
        if target.path == "/api/segments":
            query = {name: values[-1] for name, values in parse_qs(target.query).items()}
            return "application/json", to_json(review.list(query))
        if target.path.startswith("/clip/"):
            return MEDIA_TYPE, review.clip(unquote(target.path.removeprefix("/clip/")))
        raise Refused(HTTPStatus.NOT_FOUND)

    def _post(self) -> tuple[str, bytes]:
        if self.path != "/api/decide":
            raise Refused(HTTPStatus.NOT_FOUND)
        token = self.headers.get("X-Token", "").encode("utf-8", "replace")
        if not hmac.compare_digest(token, self.review.token.encode()):
            raise Refused(HTTPStatus.FORBIDDEN, "load the page again")
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or self.headers.get_content_type() != "application/json":
            raise Refused(HTTPStatus.BAD_REQUEST)
        if int(length) > MAX_BODY:
            raise Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
        return "application/json", to_json(self.review.decide(self.rfile.read(int(length))))


class ReviewServer(ThreadingHTTPServer):
    """The server of one prepared folder."""

    daemon_threads = True

    def __init__(self, review: Review, port: int) -> None:
        super().__init__((HOST, port), _Handler)
        self.review, self.port = review, self.socket.getsockname()[1]
        self.hosts = {f"{name}:{self.port}" for name in (HOST, "localhost")}


def open_review(folder: Path, port: int) -> ReviewServer:
    """A server that listens but does not answer yet. port: 0 for any free one.

    Raises:
        UserError: the folder is no prepared one, or the port is taken.
    """
    review = Review(folder)
    try:
        return ReviewServer(review, port)
    except (OSError, OverflowError) as error:
        raise UserError(f"cannot listen: {error}", where=f"{HOST}:{port}", hint="Give another --port, or 0.") from error
