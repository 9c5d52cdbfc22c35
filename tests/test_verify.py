"""higgs-inspect verify: every kind of damage is found and named, a sound set gives no finding, repair is exact."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.inspect_sets import SampleMaker, write_set
from higgs_tune.inspect import cli
from higgs_tune.inspect.verify.diagnose import Finding
from higgs_tune.inspect.verify.verify import Verdict, VerifyOptions, verify_set
from higgs_tune.shards.errors import UserError
from higgs_tune.shards.reader import ShardSet

# fields of a USTAR header (POSIX.1-1988) by their first byte
USTAR_FIELDS = {
    "name": 0, "mode": 100, "uid": 108, "gid": 116, "size": 124, "mtime": 136, "chksum": 148, "typeflag": 156,
    "linkname": 157, "magic": 257, "version": 263, "uname": 265, "gname": 297, "devmajor": 329, "devminor": 337,
    "prefix": 345, "padding": 500,
}  # fmt: skip
QUICK = VerifyOptions()
FIRST, SECOND = "codes-000000.tar", "codes-000001.tar"
Damage = Callable[[Path], None]


@pytest.fixture(scope="session")
def made(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """A sound set of two shards of three samples, with Whisper features."""
    maker = SampleMaker(toy, features=True)
    shards = [[maker(number) for number in range(first, first + 3)] for first in (0, 3)]
    return write_set(tmp_path_factory.mktemp("sound"), toy, shards, features="mel")


@pytest.fixture
def folder(made: ShardSet, tmp_path: Path) -> Path:
    """A copy of it, to be damaged."""
    return Path(shutil.copytree(made.folder, tmp_path / "set"))


def edit(path: Path, change: Callable[[bytearray], Any]) -> None:
    data = bytearray(path.read_bytes())
    change(data)
    path.write_bytes(data)


def flip(path: Path, at: int) -> None:
    edit(path, lambda data: data.__setitem__(at, data[at] ^ 0x55))


def named(verdict: Verdict, kind: str) -> Finding:
    """The one finding of a kind; fails where there is none."""
    matching = [one for one in verdict.findings if one.kind == kind]
    assert matching, f"no {kind} in {[(one.kind, one.file, one.detail) for one in verdict.findings]}"
    return matching[0]


def test_sound_sets_have_no_finding(made: ShardSet, shards: ShardSet) -> None:
    for one in (made, shards):
        for options in (QUICK, replace(QUICK, deep=True), replace(QUICK, jobs=2)):
            verdict = verify_set(one.folder, options)
            assert verdict.findings == []
            assert verdict.notes == []
            assert verdict.samples == len(one)


@pytest.mark.parametrize("member", [0, 1, 2], ids=["codes", "json", "tokens"])
@pytest.mark.parametrize(("field", "at"), USTAR_FIELDS.items(), ids=USTAR_FIELDS)
def test_a_flipped_byte_in_every_header_field(folder: Path, made: ShardSet, field: str, at: int, member: int) -> None:
    flip(folder / FIRST, member_starts(made, 1)[member] + at)
    finding = named(verify_set(folder, QUICK), "damaged_sample")
    assert (finding.file, finding.key) == (FIRST, "clip-000001")
    assert finding.offset == int(made.index["offset"][1])
    assert "damaged tar header" in finding.detail, field


def member_starts(shards: ShardSet, row: int) -> list[int]:
    """Where the three members of a sample start, by plain arithmetic on the file."""
    data = (shards.folder / FIRST).read_bytes()
    starts = [int(shards.index["offset"][row])]
    for _ in range(2):
        size = int(data[starts[-1] + 124 : starts[-1] + 135], 8)
        starts.append(starts[-1] + 512 + -(-size // 512) * 512)
    return starts


@pytest.mark.parametrize("member", [0, 1, 2], ids=["codes", "json", "tokens"])
def test_a_flipped_byte_in_every_payload(folder: Path, made: ShardSet, member: int) -> None:
    flip(folder / FIRST, member_starts(made, 2)[member] + 512 + 140)
    verdict = verify_set(folder, QUICK)
    assert named(verdict, "damaged_sample").key == "clip-000002"
    assert named(verdict, "wrong_sha256").file == FIRST
    assert verdict.samples == 5


@pytest.mark.fast
def test_cut_shards(folder: Path, made: ShardSet) -> None:
    starts = {
        "member": (member_starts(made, 1)[1], "cut_sample", "clip-000001"),
        "header": (member_starts(made, 1)[1] + 100, "cut_sample", "clip-000001"),
        "payload": (member_starts(made, 1)[0] + 600, "cut_sample", "clip-000001"),
        "sample": (int(made.index["offset"][1]), "lost_samples", "clip-000001"),
        "end": (int(made.index["offset"][2] + made.index["length"][2]), "no_end_marker", ""),
    }
    whole = (folder / FIRST).read_bytes()
    for cut, kind, key in starts.values():
        (folder / FIRST).write_bytes(whole[:cut])
        verdict = verify_set(folder, QUICK)
        assert (named(verdict, kind).key, named(verdict, "wrong_size").file) == (key, FIRST)
        if cut <= int(made.index["offset"][2]):
            assert "clip-000002" in named(verdict, "lost_samples").detail


def test_zeroed_block(folder: Path, made: ShardSet) -> None:
    start = member_starts(made, 0)[1]
    edit(folder / FIRST, lambda data: data.__setitem__(slice(start, start + 512), bytes(512)))
    finding = named(verify_set(folder, QUICK), "damaged_sample")
    assert finding.key == "clip-000000"
    assert "are zero" in finding.detail


def test_swapped_missing_and_extra_shards(folder: Path) -> None:
    (folder / FIRST).rename(folder / "x")
    (folder / SECOND).rename(folder / FIRST)
    (folder / "x").rename(folder / SECOND)
    verdict = verify_set(folder, QUICK)
    assert [(one.kind, one.file) for one in verdict.findings[:2]] == [("swapped_file", FIRST), ("swapped_file", SECOND)]
    assert SECOND in verdict.findings[0].detail
    (folder / SECOND).unlink()
    assert named(verify_set(folder, QUICK), "missing_file").file == SECOND
    (folder / "codes-000009.tar").write_bytes(b"")
    assert named(verify_set(folder, QUICK), "unlisted_file").file == "codes-000009.tar"


@pytest.mark.fast
def test_stale_and_damaged_index(folder: Path, toy: Path, tmp_path: Path) -> None:
    maker = SampleMaker(toy, features=True)
    other = write_set(tmp_path / "other", toy, [[maker(number) for number in range(5)]], features="mel")
    shutil.copy(other.folder / "index.npy", folder / "index.npy")
    verdict = verify_set(folder, QUICK)
    assert named(verdict, "stale_index").file == "index.npy"
    assert verdict.samples == 6, "the shards are checked all the same"
    assert {one.file for one in verdict.findings} == {"index.npy"}
    (folder / "index.npy").write_bytes(b"nothing")
    assert named(verify_set(folder, QUICK), "damaged_index")


def test_mel_shards(folder: Path, made: ShardSet) -> None:
    mel = folder / "mel-000000.tar"
    start, length = int(made.index["mel_offset"][1]), int(made.index["mel_length"][1])
    whole = mel.read_bytes()
    flip(mel, start + 700)
    assert named(verify_set(folder, QUICK), "damaged_features").key == "clip-000001"
    size = int(whole[start + 124 : start + 135], 8)
    shorter = whole[: start + 512 + size - 20] + bytes(20) + whole[start + 512 + size :]
    mel.write_bytes(shorter)
    finding = named(verify_set(folder, QUICK), "damaged_features")
    assert (finding.file, finding.key) == (mel.name, "clip-000001")
    assert "zstandard" in finding.detail
    mel.write_bytes(whole[: start + length - 100])
    assert named(verify_set(folder, QUICK), "wrong_size").file == mel.name
    mel.unlink()
    assert named(verify_set(folder, QUICK), "missing_file").file == mel.name


def test_any_flipped_byte_is_found(folder: Path) -> None:
    """Beyond the table: random bytes of every file, the padding and the end of the archives too."""
    rng = np.random.default_rng(0)
    for path in sorted(folder.glob("*[!n]")):  # all but the manifest, which nothing vouches for
        whole = path.read_bytes()
        for at in [0, len(whole) - 1, *rng.integers(0, len(whole), 6).tolist()]:
            flip(path, at)
            findings = verify_set(folder, QUICK).findings
            assert path.name in {one.file for one in findings}, f"byte {at} of {path.name}"
            path.write_bytes(whole)
    assert verify_set(folder, QUICK).findings == []


def rewrite(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(path.read_bytes())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("wrong_manifest", lambda m: m["totals"].update(samples=7)),
        ("wrong_manifest", lambda m: m["speakers"].reverse()),
        ("wrong_manifest", lambda m: m["rejects"]["by_reason"].update(too_long=3)),
        ("wrong_manifest", lambda m: m["index"].update(xxh3="0")),
        ("wrong_count", lambda m: m["index"].update(rows=9)),
        ("wrong_count", lambda m: m["shards"][0].update(samples=9)),
        ("wrong_size", lambda m: m["shards"][0].update(bytes=9)),
        ("wrong_sha256", lambda m: m["shards"][0].update(sha256="9")),
        ("wrong_index_row", lambda m: m["shards"].reverse()),
        ("stale_index", lambda m: m["index"].update(sha256="9")),
        ("wrong_sha256", lambda m: m["rejects"].update(sha256="9")),
        ("damaged_manifest", lambda m: m.update(format_version=2)),
        ("damaged_manifest", lambda m: m.pop("totals")),
        ("damaged_manifest", lambda m: m["shards"][0].update(name="../x.tar")),
        ("damaged_manifest", lambda m: m["shards"][0].update(name=m["shards"][1]["name"])),
        ("other_checkpoint", lambda m: m["provenance"]["model"].update(tokenizer_sha256="9")),
        ("other_codec", lambda m: m["provenance"]["codec"].update(weights_sha256="9")),
    ],
)  # fmt: skip
def test_wrong_manifest(folder: Path, kind: str, change: Callable[[dict[str, Any]], Any]) -> None:
    rewrite(folder / "manifest.json", change)
    named(verify_set(folder, QUICK), kind)


def test_manifest_that_is_lost(folder: Path, tmp_path: Path) -> None:
    (folder / "manifest.json").write_text("{")
    assert named(verify_set(folder, QUICK), "damaged_manifest")
    (folder / "manifest.json").unlink()
    assert named(verify_set(folder, QUICK), "missing_manifest")
    with pytest.raises(UserError, match="no shard set"):
        verify_set(tmp_path / "nowhere", QUICK)


def test_rules_that_checksums_do_not_see(toy: Path, tmp_path: Path) -> None:
    """Sets whose checksums are right and whose content is wrong."""
    maker = SampleMaker(toy)
    good = maker(0)
    out_of_range = good.codes_KT.copy()
    out_of_range[3, 7] = 1024
    labelled_user = good.tokens_2L.copy()
    labelled_user[1, 20] = labelled_user[0, 20]
    other_label = good.tokens_2L.copy()
    other_label[1, np.flatnonzero(other_label[1] >= 0)[0]] += 1
    beyond = good.tokens_2L.copy()
    beyond[0, 9] = 10**6
    late = good.meta | {"start_index": 4}
    roles = good.meta | {"segments": [segment | {"role": "user"} for segment in good.meta["segments"]]}
    untold = good.meta | {"messages": [{"role": "narrator", "content": []}]}
    said = {"role": "user", "content": [{"type": "text", "text": "x"}]}
    words = good.meta | {"messages": [good.meta["messages"][0], said, good.meta["messages"][2]]}
    cases = [
        ("code_range", replace(good, codes_KT=out_of_range)),
        ("labelled_turn", replace(good, tokens_2L=labelled_user)),
        ("labelled_turn", replace(good, meta=late)),
        ("wrong_label", replace(good, tokens_2L=other_label)),
        ("token_range", replace(good, tokens_2L=beyond)),
        ("wrong_segments", replace(good, meta=roles)),
        ("damaged_metadata", replace(good, meta=untold)),
        ("other_tokens", replace(good, meta=words)),
    ]
    for number, (kind, sample) in enumerate(cases):
        made = write_set(tmp_path / str(number), toy, [[maker(1), sample]])
        verdict = verify_set(made.folder, replace(QUICK, deep=True))
        assert named(verdict, kind).key == sample.key
        assert {one.kind for one in verdict.findings} == {kind}


def test_repair_rebuilds_the_same_index(folder: Path, made: ShardSet) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    times = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.tar")}
    (folder / "index.npy").unlink()
    with pytest.raises(SystemExit) as left:
        cli.VerifyCommand(folder, jobs=1, repair_index=True).run()
    assert left.value.code == 0
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert {path.name: path.stat().st_mtime_ns for path in folder.glob("*.tar")} == times
    edit(folder / "index.npy", lambda data: data.extend(b"x"))
    rewrite(folder / "manifest.json", lambda m: m["totals"].update(samples=1))
    with pytest.raises(SystemExit) as left:
        cli.VerifyCommand(folder, jobs=1, repair_index=True).run()
    assert left.value.code == 0
    assert json.loads((folder / "manifest.json").read_bytes()) == made.manifest


def test_repair_refuses_damaged_shards(folder: Path) -> None:
    (folder / "index.npy").unlink()
    flip(folder / FIRST, 700)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(UserError, match="intact shards"):
        cli.VerifyCommand(folder, jobs=1, repair_index=True).run()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_command_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for damage, code in ((lambda: None, 0), (lambda: flip(folder / SECOND, 600), 1)):
        damage()
        with pytest.raises(SystemExit) as left:
            cli.VerifyCommand(folder, jobs=1, json=True).run()
        assert left.value.code == code
        verdict = json.loads(capsys.readouterr().out)
        assert verdict["ok"] == (code == 0)
    assert verdict["kinds"] == {"wrong_sha256": 1, "damaged_sample": 1}
    assert verdict["findings"][1]["key"] == "clip-000003"
    with pytest.raises(SystemExit):
        cli.VerifyCommand(folder, jobs=1).run()
    assert "2 findings" in capsys.readouterr().out
    with pytest.raises(UserError, match="is not here"):
        cli.VerifyCommand(folder, jobs=1, model_path=folder).run()
