"""The web server of `higgs-inspect serve`: the page of the report for a set of any size, loaded on demand.

In: a shard set, its codec, perhaps a run folder. Out: a server on 127.0.0.1 that answers GET for the routes below.
Requests name samples, clips and a run's audio by number, never by path; the audio of a run is listed once, from files
inside of its folder after links are followed.

Guarantees: refuses a Host other than its own (a web site whose name points at 127.0.0.1), methods other than GET and
HEAD, bodies, and long targets or headers (tests/test_serve.py).
"""

from __future__ import annotations

import socket
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from higgs_tune.inspect.checkpoints import Checkpoints
from higgs_tune.inspect.stats import scan_samples
from higgs_tune.inspect.view import Segment, segments_of
from higgs_tune.inspect.web.charts import code_charts, data_charts
from higgs_tune.inspect.web.clips import MEDIA_TYPE, ogg, ogg_of_file
from higgs_tune.inspect.web.compare import runs_info
from higgs_tune.inspect.web.html import render
from higgs_tune.inspect.web.pages import damaged_row, detail, list_row, packed_codes, set_info
from higgs_tune.inspect.web.report import SCAN_SAMPLES
from higgs_tune.inspect.web.run import RunFolder
from higgs_tune.inspect.web.search import SampleSearch
from higgs_tune.preprocess.html import SECURITY_HEADERS
from higgs_tune.shards.durable import to_json
from higgs_tune.shards.errors import ShardError, UserError
from higgs_tune.shards.format import Sample
from higgs_tune.shards.reader import ShardSet
from werkzeug.exceptions import (
    BadRequest,
    HTTPException,
    MethodNotAllowed,
    MisdirectedRequest,
    NotFound,
    RequestEntityTooLarge,
    RequestHeaderFieldsTooLarge,
    RequestURITooLarge,
)
from werkzeug.routing import Map, Rule
from werkzeug.serving import BaseWSGIServer, WSGIRequestHandler, make_server
from werkzeug.wrappers import Request, Response

HOST = "127.0.0.1"
MAX_TARGET, MAX_HEADERS = 4096, 16_384  # characters
MAX_PAGE = 100  # samples
CLIPS_KEPT = 512
ROUTES = Map(
    [
        Rule("/", endpoint="page"),
        Rule("/api/charts", endpoint="charts"),
        Rule("/api/samples", endpoint="samples"),
        Rule("/api/sample/<int:row>", endpoint="sample"),
        Rule("/api/codes/<int:row>/<int:number>", endpoint="codes"),
        Rule("/api/clip/<int:row>/<int:number>", endpoint="clip"),
        Rule("/api/clip/run/<int:number>", endpoint="run_clip"),
    ]
)


def clip_id(row: int) -> Callable[[Segment], str]:
    """The names of a sample's clips on the page."""
    return lambda segment: f"{row}/{segment.number}"


class App:
    """The WSGI application.

    Args:
        shards: the set.
        checkpoints: its tokenizer and codec.
        runs: training runs to show; of several, a comparison.
        audio: there is a codec to decode with.
        port: of the server; requests must name it in their Host.
    """

    def __init__(
        self, shards: ShardSet, checkpoints: Checkpoints, runs: Sequence[RunFolder], *, audio: bool, port: int
    ) -> None:
        self.shards, self.checkpoints, self.runs, self.audio = shards, checkpoints, list(runs), audio
        self.hosts = {f"{name}:{port}" for name in (HOST, "localhost")}
        self.search = SampleSearch(shards)
        self._runs_info = runs_info(self.runs)  # lists their audio
        self._charts: dict[str, Any] | None = None
        self._clips: OrderedDict[bytes, bytes] = OrderedDict()  # by their codes
        self._reading, self._decoding, self._counting = threading.Lock(), threading.Lock(), threading.Lock()

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        request = Request(environ)
        try:
            self._check(request)
            endpoint, arguments = ROUTES.bind_to_environ(environ).match()
            response = getattr(self, endpoint)(request, **arguments)
        except HTTPException as error:
            response = Response(f"{error.code} {error.name}\n", status=error.code, mimetype="text/plain")
        except ShardError as error:  # damage in the data: the page shows what and where
            response = Response(f"{error}\n", status=500, mimetype="text/plain")
        except UserError as error:
            response = Response(f"{error}\n", status=400, mimetype="text/plain")
        response.headers.update(SECURITY_HEADERS)
        return response(environ, start_response)

    def _check(self, request: Request) -> None:
        """Refuse requests that our page does not send.

        Raises:
            HTTPException: another host, method, a body, or something too long.
        """
        if request.headers.get("Host") not in self.hosts:
            raise MisdirectedRequest
        if request.headers.get("Content-Length", "0") != "0" or "Transfer-Encoding" in request.headers:
            raise RequestEntityTooLarge
        if request.method not in ("GET", "HEAD"):
            raise MethodNotAllowed(["GET", "HEAD"])
        if len(request.environ.get("REQUEST_URI", "")) > MAX_TARGET:
            raise RequestURITooLarge
        if sum(len(name) + len(value) for name, value in request.headers.items()) > MAX_HEADERS:
            raise RequestHeaderFieldsTooLarge

    def _sample(self, row: int) -> Sample:
        """Raises NotFound beyond the set, ShardError where the sample is damaged."""
        if row >= len(self.shards):
            raise NotFound
        with self._reading:  # a set's open files belong to one thread at a time
            return self.shards.read(row)

    def _segment(self, row: int, number: int) -> Segment:
        segments = segments_of(self._sample(row), self.shards.special_ids)
        if number >= len(segments):
            raise NotFound
        return segments[number]

    # one method per endpoint

    def page(self, request: Request) -> Response:
        info = set_info(self.shards) | {
            "served": True,
            "audio": self.audio,
            "scanned": min(len(self.shards), SCAN_SAMPLES),
            **self._runs_info,
        }
        pieces = render(f"{info['name']}: samples", info, connect="'self'")
        return Response((piece.encode() for piece in pieces), mimetype="text/html")

    def charts(self, request: Request) -> Response:
        with self._counting:
            if self._charts is None:
                scanned = scan_samples(ShardSet(self.shards.location, self.shards.source.cache), SCAN_SAMPLES)
                self._charts = {"data": data_charts(self.shards, scanned), "codes": code_charts(scanned)}
        return _json(self._charts)

    def samples(self, request: Request) -> Response:
        query = request.args
        try:
            offset, count = int(query.get("offset", 0)), int(query.get("count", 25))
        except ValueError as error:
            raise BadRequest from error
        if offset < 0 or not 0 < count <= MAX_PAGE:
            raise BadRequest
        selection = (query.get("query", ""), query.get("split", ""), query.get("sort", "row"))
        rows, note = self.search.find(*selection, descending=query.get("descending") == "1")
        shown = [self._row(row) for row in rows[offset : offset + count].tolist()]
        return _json({"rows": shown, "total": len(rows), "note": note})

    def _row(self, row: int) -> dict[str, Any]:
        try:
            return list_row(self.shards, row, self._sample(row), clip_id(row))
        except ShardError as error:
            return damaged_row(self.shards, row, error)

    def sample(self, request: Request, row: int) -> Response:
        content = self._sample(row)
        with self._decoding:  # the tokenizer, like the codec, is loaded once
            return _json(detail(self.shards, row, content, self.checkpoints, clip_id(row)))

    def codes(self, request: Request, row: int, number: int) -> Response:
        data = packed_codes(self._segment(row, number).codes_KT)
        return Response(data, mimetype="application/octet-stream")

    def clip(self, request: Request, row: int, number: int) -> Response:
        if not self.audio:
            raise NotFound
        codes_KT = self._segment(row, number).codes_KT
        name = packed_codes(codes_KT)
        with self._decoding:
            if name not in self._clips:
                wave_S = self.checkpoints.codec.decode(codes_KT)
                self._clips[name] = ogg(wave_S, self.checkpoints.codec.config.sample_rate_hz)
                if len(self._clips) > CLIPS_KEPT:
                    self._clips.popitem(last=False)
            self._clips.move_to_end(name)
            return Response(self._clips[name], mimetype=MEDIA_TYPE)

    def run_clip(self, request: Request, number: int) -> Response:
        if not self.runs or number >= len(self.runs[0].audio):
            raise NotFound
        return Response(ogg_of_file(self.runs[0].audio[number]), mimetype=MEDIA_TYPE)


def _json(value: Any) -> Response:
    return Response(to_json(value), mimetype="application/json")


class _Handler(WSGIRequestHandler):
    """Logs errors only, and drops a client that stays silent."""

    timeout = 30

    def log(self, type: str, message: str, *args: Any) -> None:
        if type == "error":
            super().log(type, message, *args)


def open_server(
    shards: ShardSet, checkpoints: Checkpoints, runs: Sequence[RunFolder], *, audio: bool, port: int
) -> BaseWSGIServer:
    """A server that listens but does not answer yet. port: 0 for any free one.

    Raises:
        UserError: the port is taken.
    """
    try:
        listener = socket.create_server((HOST, port))
    except (OSError, OverflowError) as error:
        raise UserError(f"cannot listen: {error}", where=f"{HOST}:{port}", hint="Give another --port, or 0.") from error
    with listener:
        real = listener.getsockname()[1]
        app = App(shards, checkpoints, runs, audio=audio, port=real)
        return make_server(HOST, real, app, threaded=True, request_handler=_Handler, fd=listener.fileno())
