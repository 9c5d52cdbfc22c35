"""The server of `higgs-inspect serve`: what it gives, and everything that it refuses, over real sockets."""

from __future__ import annotations

import http.client
import io
import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from helpers.inspect_runs import write_run
from higgs_tune.inspect import cli
from higgs_tune.inspect.checkpoints import Checkpoints
from higgs_tune.inspect.web.pages import folded
from higgs_tune.inspect.web.run import read_run
from higgs_tune.inspect.web.serve import HOST, MAX_HEADERS, MAX_TARGET, open_server
from higgs_tune.shards.errors import UserError
from higgs_tune.shards.reader import ShardSet

SECRET = b"nobody may read this"


@pytest.fixture(scope="module")
def run_folder(shards: ShardSet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose lists and links try to lead out of it, to a real wav file."""
    folder = tmp_path_factory.mktemp("run")
    outside = folder / "outside.wav"
    soundfile.write(outside, np.zeros(2400, np.float32), 24_000)
    (folder / "secret.txt").write_bytes(SECRET)
    out = write_run(folder / "out", ["000000000", "000000001"])
    listed = out / "samples" / "base" / "samples.json"
    entries = json.loads(listed.read_text())
    (out / "samples" / "base" / "link.wav").symlink_to(outside)
    (out / "samples" / "linked").symlink_to(folder)
    names = ["link.wav", "../../../outside.wav", str(outside), "../linked/outside.wav", "missing.wav", "a\0b.wav"]
    entries += [entries[0] | {"key": f"bad{number}", "wav": name} for number, name in enumerate(names)]
    listed.write_text(json.dumps(entries))
    return out


@pytest.fixture(scope="module")
def port(shards: ShardSet, run_folder: Path) -> Iterator[int]:
    server = open_server(shards, Checkpoints(shards.provenance), [read_run(run_folder)], audio=True, port=0)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server.port
    server.shutdown()
    thread.join()
    server.server_close()


def ask(port: int, target: str, method: str = "GET", body: bytes | None = None, **headers: str) -> tuple[int, bytes]:
    """Status and body; the target goes out as it is."""
    connection = http.client.HTTPConnection(HOST, port, timeout=120)
    connection.putrequest(method, target, skip_host="Host" in headers)
    for name, value in headers.items():
        connection.putheader(name.replace("_", "-"), value)
    if body is not None:
        connection.putheader("Content-Length", str(len(body)))
    connection.endheaders(body)
    answer = connection.getresponse()
    answered = answer.status, answer.read()
    connection.close()
    return answered


def ask_json(port: int, target: str) -> Any:
    status, body = ask(port, target)
    assert status == 200, body
    return json.loads(body)


@pytest.mark.fast
def test_gives_what_is_stored(port: int, shards: ShardSet) -> None:
    answered = ask_json(port, "/api/sample/3")
    sample = shards.read(3)
    assert answered["ids"] == sample.tokens_2L[0].tolist()
    assert answered["labels"] == sample.tokens_2L[1].tolist()
    codes = [np.frombuffer(ask(port, f"/api/codes/3/{number}")[1], "<u2").reshape(8, -1) for number in range(2)]
    assert np.array_equal(np.concatenate(codes, axis=1), sample.codes_KT)
    status, clip = ask(port, "/api/clip/3/1")
    assert status == 200
    wave_S, rate = soundfile.read(io.BytesIO(clip))
    assert len(wave_S) / rate == pytest.approx(sample.segment_frames[1] / 25, abs=0.03)
    status, page = ask(port, "/")
    assert status == 200
    assert b"Content-Security-Policy" in page


def test_every_page_of_the_list_once(port: int, shards: ShardSet) -> None:
    pages = [ask_json(port, f"/api/samples?offset={at}&count=7&sort=seconds") for at in range(0, len(shards), 7)]
    rows = [row["row"] for page in pages for row in page["rows"]]
    assert rows == np.argsort(shards.index["seconds"], kind="stable").tolist()
    answered = ask_json(port, "/api/samples?query=" + "%D8%A7%D9%84%D8%B3%D9%84%D8%A7%D9%85&count=100")
    texts = [json.dumps(shards.read(row).meta["messages"], ensure_ascii=False) for row in range(len(shards))]
    assert [row["row"] for row in answered["rows"]] == [n for n, text in enumerate(texts) if "السلام" in folded(text)]


@pytest.mark.fast
@pytest.mark.parametrize(
    "target",
    [
        "/../../../../etc/passwd",
        "/..%2f..%2f..%2fetc/passwd",
        "/%2e%2e/%2e%2e/etc/passwd",
        "/api/clip/run/../../secret.txt",
        "/api/clip/run/..%2f..%2fsecret.txt",
        "/api/clip/run/-1",
        "/api/clip/run/99999",
        "/api/clip/0/99",
        "/api/sample/-1",
        "/api/sample/40",
        "/api/sample/9999999999999999999999",
        "/api/codes/0/..%2f0",
        "/manifest.json",
        "/samples/base/samples.json",
        "//etc/passwd",
        "/%00",
        "http://127.0.0.1/etc/passwd",
        "file:///etc/passwd",
    ],
)
def test_no_path_leads_to_a_file(port: int, target: str) -> None:
    status, body = ask(port, target)
    assert status in (400, 404, 421)
    assert SECRET not in body
    assert b"root:" not in body
    assert len(body) < 200


def test_links_and_names_that_lead_out_of_the_run(port: int, run_folder: Path) -> None:
    """Every clip that the page may ask for lies inside of the run; the others have none."""
    run = read_run(run_folder)
    info = next(iter(json.loads(part) for part in _scripts(ask(port, "/")[1])))
    rows = {row["key"]: row for row in info["run"]["generated"]["rows"]}
    assert sum(key.startswith("bad") for key in rows) == 6
    for key, row in rows.items():
        assert (row["steps"]["base"]["clip"] is None) == key.startswith("bad")
    assert "linked" not in info["run"]["generated"]["steps"]
    clips = [clip for row in rows.values() for clip in (row["target"], row["reference"]) if clip]
    clips += [step["clip"] for row in rows.values() for step in row["steps"].values() if step["clip"]]
    for clip in clips:
        assert ask(port, f"/api/clip/{clip}")[0] == 200
    assert ask(port, f"/api/clip/run/{len(set(clips))}")[0] == 404
    assert run.folder == run_folder


def _scripts(page: bytes) -> Iterator[bytes]:
    start = page.index(b'id="info">') + len(b'id="info">')
    yield page[start : page.index(b"</script>", start)]


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:{port}", "127.0.0.1", "127.0.0.1:1", "0.0.0.0:{port}", ""]
)
def test_other_hosts_are_refused(port: int, host: str) -> None:
    assert ask(port, "/api/sample/0", Host=host.format(port=port))[0] == 421
    assert ask(port, "/api/sample/0", Host=f"localhost:{port}")[0] == 200


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE"])
def test_only_reading(port: int, method: str) -> None:
    assert ask(port, "/api/sample/0", method)[0] == 405


def test_oversized_requests_are_refused(port: int) -> None:
    assert ask(port, "/api/samples?query=" + "x" * MAX_TARGET)[0] == 414
    assert ask(port, "/", X_Long=f"{'x' * MAX_HEADERS}")[0] == 431
    assert ask(port, "/", body=b"x" * 100_000)[0] == 413
    assert ask(port, "/", "POST", body=b"x")[0] == 413
    assert ask(port, "/", Transfer_Encoding="chunked")[0] == 413
    assert ask(port, "/api/samples?count=101")[0] == 400
    assert ask(port, "/api/samples?count=0")[0] == 400
    assert ask(port, "/api/samples?offset=-1")[0] == 400
    assert ask(port, "/api/samples?offset=x")[0] == 400
    assert ask(port, "/api/samples?sort=__class__")[0] == 400
    status, _ = ask(port, "/" + "x" * 100_000)
    assert status == 414
    assert ask(port, "/api/sample/0")[0] == 200, "still there"


def test_listens_on_loopback_only(port: int) -> None:
    others = {info[4][0] for info in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)} - {HOST}
    for address in others or {"127.0.0.2"}:
        with pytest.raises(OSError, match=r"refused|unreachable|timed out"):
            socket.create_connection((str(address), port), timeout=2)


def test_a_silent_client_stops_nobody(port: int) -> None:
    with socket.create_connection((HOST, port)) as silent:
        silent.sendall(b"GET / HTTP/1.1\r\n")
        assert ask(port, "/api/sample/0")[0] == 200


def test_answers_may_not_be_used_by_other_sites(port: int) -> None:
    connection = http.client.HTTPConnection(HOST, port, timeout=120)
    connection.request("GET", "/api/sample/0")
    answer = connection.getresponse()
    headers = {name.lower(): value for name, value in answer.getheaders()}
    answer.read()
    connection.close()
    assert headers["cross-origin-resource-policy"] == "same-origin"
    assert headers["x-content-type-options"] == "nosniff"
    assert "access-control-allow-origin" not in headers


def test_user_mistakes(port: int, shards: ShardSet) -> None:
    with pytest.raises(UserError, match="cannot listen"):
        cli.ServeCommand(str(shards.folder), port=port).run()
    with pytest.raises(UserError, match="cannot listen"):
        cli.ServeCommand(str(shards.folder), port=70_000).run()
    with pytest.raises(UserError, match="no run here"):
        cli.ServeCommand(str(shards.folder), run_dirs=(Path("nothing/here"),), port=0).run()
