"""Unusable outputs, devices, terminals and environments: one clear line before the work, and no file lost."""

from __future__ import annotations

import errno
import os
import pty
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from conftest import ROOT
from helpers.inspect_runs import write_run
from helpers.inspect_sets import SampleMaker, write_set
from higgs_tune.inspect import cli
from higgs_tune.inspect.checkpoints import Checkpoints
from higgs_tune.inspect.decode import decode_to_files
from higgs_tune.inspect.web import report
from higgs_tune.preprocess.codec import checkpoint
from higgs_tune.shards.errors import ShardError, UserError
from higgs_tune.shards.manifest import manifest_fault
from higgs_tune.shards.reader import ShardSet
from higgs_tune.shards.writer import file_sha256

Captured = pytest.CaptureFixture[str]
Patch = pytest.MonkeyPatch


def inspect(*commands: list[str], code: int = 0, limit: int = 0, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run one higgs-inspect command after another in a process of its own; `limit`: largest file in bytes."""
    lines = [f"sys.argv[1:] = {command!r}; main()" for command in commands]
    program = "import sys; from higgs_tune.inspect.cli import main\n" + "\n".join(lines)
    if limit:
        program = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n{program}"
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "timeout": 300} | options
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False, **options)
    assert done.returncode == code, f"{done.stdout}{done.stderr}"
    assert "Traceback" not in done.stderr
    return done


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def no_work(monkeypatch: Patch) -> None:
    """Fails where a sample is decoded or counted."""

    def work(*_: Any, **__: Any) -> None:
        pytest.fail("work before the output was checked")

    monkeypatch.setattr(report, "scan_samples", work)
    monkeypatch.setattr(report, "list_row", work)
    monkeypatch.setattr(checkpoint, "load_codec", work)


@pytest.mark.fast
@pytest.mark.usefixtures("no_work")
def test_outputs_that_would_replace_another_file(shards: ShardSet, toy: Path, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", ["a"])
    own = Path(shutil.copytree(shards.folder, tmp_path / "set"))
    (tmp_path / "link.html").symlink_to(own / "codes-000000.tar")
    (tmp_path / "notes.html").write_text("my notes")
    before = content(tmp_path)
    files = [own / name for name in ("codes-000000.tar", "index.npy", "manifest.json")]
    files += [run / "metrics.jsonl", run / "config.yaml", toy / "model" / "config.json"]
    files += [tmp_path / "link.html", tmp_path / "notes.html"]
    for path in files:
        with pytest.raises(UserError, match="would overwrite another file"):
            cli.ReportCommand(str(own), path, run_dirs=(run,)).run()
    (tmp_path / "x.wav").write_bytes((own / "index.npy").read_bytes())
    with pytest.raises(UserError, match="would overwrite another file"):
        cli.DecodeCommand(str(own), ("0",), tmp_path / "x.wav").run()
    for path, message in ((own, "is a folder"), (Path(os.devnull), "not a regular file")):
        with pytest.raises(UserError, match=message):
            cli.ReportCommand(str(own), path).run()
    (tmp_path / "x.wav").unlink()
    assert content(tmp_path) == before
    assert not os.path.isfile(os.devnull)  # noqa: PTH113


@pytest.mark.usefixtures("no_work")
def test_decode_spares_the_recording(toy: Path, tmp_path: Path) -> None:
    """A file with the SHA-256 that the sample remembers of its source is not replaced; other wav files are."""
    sample = SampleMaker(toy)(0)
    source = tmp_path / "voice.wav"
    source.write_bytes(b"RIFF, a recording")
    sample.meta["segments"][1]["sha256"] = file_sha256(source)
    made = write_set(tmp_path / "set", toy, [[sample]])
    with pytest.raises(UserError, match="the recording of this sample"):
        cli.DecodeCommand(str(made.folder), ("0",), source).run()
    assert source.read_bytes() == b"RIFF, a recording"
    mistakes = [((), "x.wav", "no sample is named"), (("0",), "x.mp3", "decode writes WAV"), (("0",), "x.FLAC", "WAV")]
    for keys, name, message in mistakes:
        with pytest.raises(UserError, match=message):
            cli.DecodeCommand(str(made.folder), keys, tmp_path / name).run()
        assert not (tmp_path / name).exists()


def test_a_key_does_not_lead_out_of_the_folder(toy: Path, tmp_path: Path, monkeypatch: Patch) -> None:
    made = write_set(tmp_path / "set", toy, [[SampleMaker(toy)(0)]])
    sample = made.read(0)
    object.__setattr__(sample, "key", "../../elsewhere")
    monkeypatch.setattr(made, "read", lambda row: sample)
    checkpoints = Checkpoints(made.provenance)
    with pytest.raises(ShardError, match="damaged key"):
        decode_to_files(made, checkpoints, ("0",), tmp_path / "out", kind="all", delayed=False)


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOSPC], ids=errno.errorcode.get)
@pytest.mark.usefixtures("no_work")
def test_folders_that_cannot_be_written(shards: ShardSet, tmp_path: Path, monkeypatch: Patch, number: int) -> None:
    """Read-only, forbidden and full folders; files and dangling links in place of a folder."""
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere" / "else")
    commands = [cli.ReportCommand(str(shards.folder), tmp_path / "file" / "report.html")]
    commands += [cli.DecodeCommand(str(shards.folder), ("0",), tmp_path / name) for name in ("file", "link/x.wav")]
    for command in commands:
        with pytest.raises(UserError, match=r"cannot (write|make the folder)"):
            command.run()

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(tempfile, "NamedTemporaryFile", refuse)
    own = Path(shutil.copytree(shards.folder, tmp_path / "set"))
    (own / "index.npy").write_bytes(b"")
    for command in (
        cli.ReportCommand(str(shards.folder), tmp_path / "report.html"),
        cli.DecodeCommand(str(shards.folder), ("0",), tmp_path / "x.wav"),
        cli.DecodeCommand(str(shards.folder), ("0",), tmp_path / "clips"),
        cli.VerifyCommand(own, jobs=1, repair_index=True),
    ):
        with pytest.raises(UserError, match=f"cannot write: {os.strerror(number)}"):
            command.run()


def test_limits_and_full_disks(shards: ShardSet, tmp_path: Path) -> None:
    """A limit on file size stands in for a full disk: seen before the work, or else nothing is left of the file."""
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] < 0
    page, folder = tmp_path / "report.html", str(shards.folder)
    report = ["report", folder, "-o", str(page), "--max_samples", "2", "--no_audio"]
    done = inspect(report, code=2, limit=1_000_000)
    assert done.stderr == f"error: cannot write: File too large ({tmp_path})\n"
    inspect(["decode", folder, "0", "-o", str(tmp_path / "x.wav")], code=2, limit=1000)
    assert content(tmp_path) == {}
    inspect(report)
    earlier = page.read_bytes()
    done = inspect(report, code=2, limit=len(earlier) - 100)
    assert f"error: cannot write: File too large ({page})" in done.stderr
    assert content(tmp_path) == {"report.html": earlier}


@pytest.mark.parametrize(
    "arguments", [["stats"], ["stats", "--json"], ["show", "0"], ["show", "0", "--raw"], ["verify", "--jobs", "1"]]
)
def test_full_standard_output(shards: ShardSet, arguments: list[str]) -> None:
    name, *rest = arguments
    with Path("/dev/full").open("w") as full:
        done = inspect([name, str(shards.folder), *rest], code=2, stdout=full)
    last = done.stderr.splitlines()[-1]
    assert last == "error: cannot read or write: No space left on device (standard output)"


def test_without_home_and_unicode(shards: ShardSet, tmp_path: Path) -> None:
    """No home folder, a terminal that knows ASCII only, Arabic texts."""
    folder, page = str(shards.folder), str(tmp_path / "report.html")
    environment = {name: value for name, value in os.environ.items() if name not in ("HOME", "LANG", "LANGUAGE")}
    environment |= {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    run = write_run(tmp_path / "run", ["a"])
    reporting = ["report", folder, "-o", page, "--max_samples", "2", "--run", str(run)]
    for home in ({}, {"HOME": "/nonexistent"}):
        commands = [["stats", folder], ["show", folder, "0"], ["show", folder, "0", "--raw"], reporting]
        done = inspect(*commands, env=environment | home)
        assert done.stdout.isascii()
        assert "\\u0630" in done.stdout
        assert "2068" not in done.stdout, "isolates help on a terminal with Unicode only"
    assert "السَّلَامُ" in Path(page).read_text(encoding="utf-8")


def on_terminal(*arguments: str, columns: int, **environment: str) -> str:
    """What higgs-inspect prints on a terminal of a width."""
    leader, terminal = pty.openpty()
    program = "from higgs_tune.inspect.cli import main; main()"
    environment = os.environ | {"COLUMNS": str(columns), "TERM": "xterm"} | environment
    command = [sys.executable, "-c", program, *arguments]
    with subprocess.Popen(command, cwd=ROOT, stdout=terminal, stderr=subprocess.DEVNULL, env=environment) as process:
        os.close(terminal)
        shown = bytearray()
        while True:
            try:
                part = os.read(leader, 65_536)
            except OSError:  # Linux: the other end is closed
                break
            if not part:
                break
            shown += part
    os.close(leader)
    assert process.returncode == 0
    return shown.decode()


def test_narrow_terminals_cut_no_number(shards: ShardSet, capsys: Captured) -> None:
    cli.ShowCommand(str(shards.folder), "0").run()
    table = capsys.readouterr().out
    rows = [" ".join(line.split()) for line in table.splitlines() if line.lstrip()[:1].isdigit()]
    for columns, color in ((80, {"NO_COLOR": "1", "TERM": "dumb"}), (20, {})):
        shown = on_terminal("show", str(shards.folder), "0", columns=columns, **color)
        assert ("\x1b[" in shown) == (not color)
        assert "…" not in shown
        lines = " ".join(shown.split())
        assert color == {} or all(row in lines for row in rows)
        assert "…" not in on_terminal("stats", str(shards.folder), columns=columns, **color)


def test_hub_names(shards: ShardSet, toy: Path, tmp_path: Path, monkeypatch: Patch, capsys: Captured) -> None:
    """Checked first, with only the files that are needed; the hint names the repository that the manifest remembers."""
    asked: list[tuple[str, str | None, bool]] = []

    def download(name: str, *, revision: str | None, allow_patterns: list[str], **_: Any) -> str:
        asked.append((name, revision, "model.safetensors" in allow_patterns))
        return str(toy / ("codec" if "tokenizer" in name else "model"))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    model, codec = Path("bosonai/higgs-audio-v2-generation-3B-base"), Path("bosonai/higgs-audio-v2-tokenizer")
    folder = str(shards.folder)
    cli.DecodeCommand(folder, ("0",), tmp_path / "x.wav", audio_tokenizer_path=codec).run()
    cli.ShowCommand(folder, "0", model_path=model).run()
    assert {(name, weights) for name, _, weights in asked} == {(str(codec), True), (str(model), False)}
    assert all(len(revision or "") == 40 for _, revision, _ in asked), "pinned"
    monkeypatch.undo()
    made_on_hub = {"name": str(codec), "revision": "v1"}
    elsewhere = Checkpoints({"codec": made_on_hub, "paths": {"codec": str(tmp_path / "gone")}})
    with pytest.raises(UserError, match=f"is not here .*--audio_tokenizer_path {codec}@v1"):
        elsewhere.check_codec()


@pytest.mark.fast
def test_devices_and_other_codecs(shards: ShardSet, toy: Path, tmp_path: Path, capsys: Captured) -> None:
    for device in ("cuda:99", "gpu", "cuda:x"):
        with pytest.raises(UserError, match="--device is"):
            cli.DecodeCommand(str(shards.folder), ("0",), tmp_path / "x.wav", device=device).run()
    other = Path(shutil.copytree(toy / "codec", tmp_path / "codec"))
    Checkpoints(shards.provenance, None, other).check_codec()
    assert "other weights" not in capsys.readouterr().err
    (weights,) = [path for path in other.iterdir() if path.suffix in (".pth", ".safetensors")]
    weights.write_bytes(weights.read_bytes() + b"x")
    Checkpoints(shards.provenance, None, other).check_codec()
    assert "other weights" in capsys.readouterr().err


@pytest.mark.fast
def test_every_damaged_manifest_is_one_line(shards: ShardSet) -> None:
    """Each field removed, or given a wrong type."""
    manifest = shards.manifest
    assert manifest_fault(manifest) == ""
    sections = [(name, manifest[name]) for name in ("index", "rejects", "totals", "layouts")]
    sections += [("special ids", manifest["provenance"]["model"]["special_ids"]), ("shards 0", manifest["shards"][0])]
    for where, section in sections:
        for name in list(section):
            good = section.pop(name)
            faults = [manifest_fault(manifest)]
            for wrong in (None, [], -1):
                section[name] = wrong
                faults.append(manifest_fault(manifest))
            section[name] = good
            if name != "audio_frames":  # nothing reads it
                assert all(fault.startswith(where) for fault in faults), (where, name, faults)
    for name in list(manifest):
        good = manifest.pop(name)
        assert manifest_fault(manifest) or name == "layouts"  # which older sets do not have
        manifest[name] = good
    assert manifest_fault([]).startswith("manifest")
    assert manifest_fault(manifest) == ""
