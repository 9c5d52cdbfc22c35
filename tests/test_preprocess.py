"""higgs-preprocess: what it stores, where it gets its checkpoints, and that a restart changes nothing."""

from __future__ import annotations

import base64
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import fsspec
import huggingface_hub
import numpy as np
import pytest
import soundfile
from boson_multimodal.dataset.chatml_dataset import prepare_chatml_sample
from conftest import EXAMPLES, preprocess
from higgs_tune.inspect.verify.verify import VerifyOptions, verify_set
from higgs_tune.preprocess import encode, pipeline
from higgs_tune.preprocess.check import check_data
from higgs_tune.preprocess.check_report import describe_sides
from higgs_tune.preprocess.checkpoints.hub import local_checkpoint
from higgs_tune.preprocess.config import PreprocessConfig
from higgs_tune.preprocess.progress import ProgressBar
from higgs_tune.shards.errors import UserError
from higgs_tune.shards.reader import ShardSet
from higgs_tune.shards.writer import file_sha256
from higgs_tune.train.model.base import resolve_model
from huggingface_hub.errors import LocalEntryNotFoundError
from transformers import PreTrainedTokenizerBase


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.fast
def test_example_set_is_whole(shards: ShardSet, toy_tokenizer: PreTrainedTokenizerBase) -> None:
    """Tokens and labels are boson's own on the same entries; frames fit the audio."""
    entries = json.loads(EXAMPLES.read_text())
    assert len(shards) == len(entries) == 40
    assert shards.manifest["rejects"]["rows"] == 0
    for row, given in enumerate(entries):
        sample = shards.read(row)
        input_ids, label_ids, _, _ = prepare_chatml_sample(given, toy_tokenizer)
        assert sample.tokens_2L[0].tolist() == input_ids
        assert sample.tokens_2L[1].tolist() == label_ids
        assert [segment["role"] for segment in sample.meta["segments"]] == ["user", "assistant"]
        target = sample.meta["segments"][1]
        assert target["seconds"] == pytest.approx(given["misc"]["duration"], abs=1e-3)
        assert target["frames"] == pytest.approx(target["seconds"] * 25, abs=1)
        source = EXAMPLES.parent / target["source"]
        assert target["sha256"] == file_sha256(source)


def test_json_lines_and_units_change_nothing(toy: Path, shards: ShardSet, tmp_path: Path) -> None:
    lines = tmp_path / "chatml.jsonl"
    lines.write_text("\n".join(json.dumps(e, ensure_ascii=False) for e in json.loads(EXAMPLES.read_text())) + "\n")
    (tmp_path / "clips").symlink_to(EXAMPLES.parent / "clips")
    preprocess(toy, lines, tmp_path / "out", val_fraction=0.1, samples_per_shard=16, clips_per_unit=7)
    one, two = files_of(Path(shards.location)), files_of(tmp_path / "out")
    assert one.keys() == two.keys()
    assert all(one[name] == two[name] for name in one if name != "manifest.json")


def test_conversations_of_several_voices(toy: Path, toy_tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """Several turns, several audios a message, a cut, inline audio: each segment has the codes of its own piece."""
    rng = np.random.default_rng(0)
    wave = 0.1 * rng.standard_normal(5 * 24000)
    soundfile.write(tmp_path / "long.wav", wave, 24000, subtype="FLOAT")
    for name, start in (("a", 1.0), ("b", 3.5)):
        soundfile.write(tmp_path / f"{name}.wav", wave[int(start * 24000) :][:24000], 24000, subtype="FLOAT")
    inline = base64.encodebytes((tmp_path / "b.wav").read_bytes()).decode()  # in lines of 76, as MIME has it
    audio: dict[str, dict[str, Any]] = {
        "cut": {"type": "audio", "audio_url": "long.wav", "offset": 1.0, "duration": 1.0},
        "file": {"type": "audio", "audio_url": "a.wav"},
        "inline": {"type": "audio", "audio_url": "", "raw_audio": inline},
        "cut again": {"type": "audio", "audio_url": "long.wav", "offset": 3.5, "duration": 1},
    }
    text = {"type": "text", "text": "[SPEAKER0] hello"}
    given = {
        "messages": [
            {"role": "system", "content": [{"type": "text", "text": "SPEAKER0:"}, audio["cut"], audio["inline"]]},
            {"role": "user", "content": "say hello"},
            {"role": "assistant", "content": [text, audio["file"], text, audio["cut again"]]},
            {"role": "user", "content": [text, audio["cut again"]]},
            {"role": "assistant", "content": [text, audio["inline"]]},
        ],
        "start_index": 3,
        "speaker": "SPEAKER0",
    }
    data = tmp_path / "data.json"
    data.write_text(json.dumps([given]))
    assert preprocess(toy, data, tmp_path / "out")["clips"] == 4
    sample = ShardSet(tmp_path / "out").read(0)
    pieces = np.split(sample.codes_KT, 6, axis=1)
    for same in ((0, 2), (1, 3), (1, 4), (1, 5)):  # as waveforms: 1.0 to 2.0 s, and 3.5 to 4.5 s
        np.testing.assert_array_equal(pieces[same[0]], pieces[same[1]])
    assert not np.array_equal(pieces[0], pieces[1])
    input_ids, label_ids, *_ = prepare_chatml_sample(given, toy_tokenizer)
    assert [sample.tokens_2L[0].tolist(), sample.tokens_2L[1].tolist()] == [input_ids, label_ids]
    stored = sample.meta["messages"]
    assert "raw_audio" not in json.dumps(stored)
    assert stored[0]["content"][1] == audio["cut"]
    assert stored[4]["content"][1]["audio_url"] == sample.meta["segments"][5]["source"]


def changed(folder: Path, target: Path, file: str, content: str | None) -> Path:
    """The config and tokenizer of a checkpoint with one file changed, or taken away."""
    target.mkdir()
    for source in folder.glob("*.json"):
        (target / source.name).symlink_to(source)
    (target / file).unlink()
    if content is not None:
        (target / file).write_text(content)
    return target


def test_bad_checkpoints_are_refused(toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one line, before anything is encoded."""
    monkeypatch.setattr(pipeline, "encode_unit", None)
    narrow = json.loads((toy / "model" / "config.json").read_text()) | {"audio_codebook_size": 512}
    (tmp_path / "native").mkdir()
    (tmp_path / "native" / "config.json").write_text('{"model_type": "higgs_audio_v2"}')
    for change, message in (
        ({"model_path": tmp_path}, "no checkpoint here"),
        ({"model_path": toy / "codec"}, "not a Higgs Audio v2 checkpoint"),
        ({"model_path": tmp_path / "native"}, "the checkpoint's config lacks 'hidden_size'"),
        ({"model_path": tmp_path / "nothing" / "at" / "all"}, "no checkpoint here .*expected a folder, or owner"),
        ({"audio_tokenizer_path": tmp_path}, "no audio tokenizer here"),
        ({"data": tmp_path / "none.json"}, "no data here"),
        ({"device": "banana"}, "--device is out of range, expected auto, cpu, cuda or cuda:1, got banana"),
        ({"device": "cuda:99"}, r"--device is not there, expected a GPU that PyTorch sees \(it sees \d\), got cuda:99"),
        ({"out": "memory://set", "num_processes": 2}, "expected 1 with an --out in memory"),
        ({"out": "/proc/higgs"}, r"cannot make the folder: .* \(/proc/higgs\)"),
        ({"out": str(EXAMPLES)}, rf"cannot make the folder: .* \({EXAMPLES}\)"),
        ({"out": ""}, "--out is missing"),
        ({"ref_drop": 1.5}, r"--ref_drop is out of range, expected 0 to 1, got 1\.5"),
        ({"audio_tokenizer_path": None}, "--audio_tokenizer_path is missing"),
    ):
        options: dict[str, Any] = {"data": EXAMPLES, "out": str(tmp_path / "out"), **change}
        with pytest.raises(UserError, match=message):
            preprocess(toy, **options)
    for file, content, message in (
        ("config.json", "[1]", r"the checkpoint's config has the wrong content .*expected a JSON object, got \[1\]"),
        ("config.json", "nothing", "the checkpoint's config is not JSON"),
        ("config.json", '{"model_type": "higgs_audio"}', "expected text_config: an object, got None"),
        ("config.json", json.dumps(narrow), "the codec does not fit .*expected 8 codebooks of 512, got 8 of 1024"),
        ("tokenizer.json", None, r"the checkpoint has no tokenizer .*expected tokenizer\.json"),
        ("tokenizer.json", "garbage", "cannot read the checkpoint's tokenizer: expected value at line 1"),
        ("tokenizer.json", "{}", "cannot read the checkpoint's tokenizer: Model missing"),
        ("tokenizer_config.json", None, r"the checkpoint has no tokenizer .*expected tokenizer_config\.json"),
        ("tokenizer_config.json", "{", r"the tokenizer's config is not JSON: .*tokenizer_config\.json"),
    ):
        model = changed(toy / "model", tmp_path / f"{len(list(tmp_path.iterdir()))}", file, content)
        with pytest.raises(UserError, match=message):
            preprocess(toy, EXAMPLES, tmp_path / "out", model_path=model)


def test_a_folder_that_holds_something_else_is_refused(toy: Path, tmp_path: Path) -> None:
    for content, message in (
        ("[]", r"the manifest has the wrong content .*manifest\.json\), expected a JSON object, got \[\]"),
        ("{", "the manifest is not JSON"),
        ('{"provenance": []}', "holds a shard set made from other data or options"),
    ):
        (tmp_path / "manifest.json").write_text(content)
        with pytest.raises(UserError, match=message):
            preprocess(toy, EXAMPLES, tmp_path)
        assert (tmp_path / "manifest.json").read_text() == content


def test_the_native_layout_of_the_model_gives_the_same_set(toy: Path, shards: ShardSet, tmp_path: Path) -> None:
    boson = json.loads((toy / "model" / "config.json").read_text())
    native = boson["text_config"] | {"model_type": "higgs_audio_v2", "num_codebooks": boson["audio_num_codebooks"]}
    native |= {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}
    native |= {name: boson[name] for name in ("audio_stream_bos_id", "audio_stream_eos_id")}
    (tmp_path / "native").mkdir()
    (tmp_path / "native" / "config.json").write_text(json.dumps(native))
    for file in (toy / "model").glob("*token*.json"):
        (tmp_path / "native" / file.name).write_bytes(file.read_bytes())
    preprocess(toy, EXAMPLES, tmp_path / "out", model_path=tmp_path / "native", val_fraction=0.1, samples_per_shard=16)
    made = ShardSet(tmp_path / "out")
    assert made.manifest["shards"] == shards.manifest["shards"]
    assert made.provenance["model"] == shards.provenance["model"] | {"name": "native"}


def test_hub_names_are_pinned(toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Boson's repositories at the revisions that have the original layout, others at what is asked for."""
    asked: list[tuple[str, str | None, bool]] = []

    def download(name: str, *, revision: str | None, allow_patterns: list[str], **_: Any) -> str:
        asked.append((name, revision, "*.pth" in allow_patterns))
        if "nothing" in name:
            raise LocalEntryNotFoundError("Cannot find the requested files\nand more")
        return str(toy / ("codec" if "tokenizer" in name else "model"))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    model, codec = Path("bosonai/higgs-audio-v2-generation-3B-base"), Path("bosonai/higgs-audio-v2-tokenizer")
    preprocess(toy, EXAMPLES, tmp_path / "out", model_path=model, audio_tokenizer_path=codec)
    pinned = ("10840182ca4ad5d9d9113b60b9bb3c1ef1ba3f84", "9d4988fbd4ad07b4cac3a5fa462741a41810dbec")
    assert asked == [(str(model), pinned[0], False), (str(codec), pinned[1], True)]
    made = ShardSet(tmp_path / "out").provenance
    assert (made["model"]["name"], made["model"]["revision"]) == (str(model), pinned[0])
    assert (made["codec"]["name"], made["codec"]["revision"]) == (str(codec), pinned[1])
    local_checkpoint(Path("someone/else@v1.0"))
    assert asked[-1] == ("someone/else", "v1.0", True)
    assert resolve_model(model) == (toy / "model", None)  # the trainer's way: the weights, too
    assert asked[-1] == (str(model), pinned[0], True)
    with pytest.raises(UserError, match=r"as a Hub repository: Cannot find the requested files \(who/nothing\)\. Give"):
        local_checkpoint(Path("who/nothing"))


def test_precision_is_part_of_the_provenance(toy: Path, tmp_path: Path) -> None:
    preprocess(toy, EXAMPLES, tmp_path / "out", precision="bfloat16", tf32=True)
    codec = ShardSet(tmp_path / "out").provenance["codec"]
    assert (codec["precision"], codec["tf32"]) == ("bfloat16", True)
    with pytest.raises(UserError, match="made from other data or options"):
        preprocess(toy, EXAMPLES, tmp_path / "out")


@pytest.mark.parametrize("kind", ["memory", "s3"])
def test_a_set_can_be_built_into_a_url(
    kind: str,
    toy: Path,
    shards: ShardSet,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    """A run that is cut off between two shards is continued to the same files; nothing stays in the local folder."""
    monkeypatch.setenv("HIGGS_TUNE_CACHE", str(tmp_path / "cache"))
    url = f"{'memory://bucket' if kind == 'memory' else request.getfixturevalue('s3')}/{tmp_path.name}"
    options = {"val_fraction": 0.1, "samples_per_shard": 16}
    assemble_shard = pipeline.assemble_shard

    def stopping(job: Any, number: int) -> None:
        if number == 2:
            raise KeyboardInterrupt
        assemble_shard(job, number)

    monkeypatch.setattr(pipeline, "assemble_shard", stopping)
    with pytest.raises(KeyboardInterrupt):
        preprocess(toy, EXAMPLES, url, **options)
    fs, path = fsspec.core.url_to_fs(url)
    assert sorted(name.rsplit("/", 1)[1] for name in fs.ls(path, detail=False)) == [
        "codes-000000.tar",
        "codes-000001.tar",
    ]
    monkeypatch.setattr(pipeline, "assemble_shard", assemble_shard)
    preprocess(toy, EXAMPLES, url, **options)
    fs.invalidate_cache()
    expected = files_of(Path(shards.location))
    remote = {name.rsplit("/", 1)[1]: fs.cat_file(name) for name in fs.ls(path, detail=False)}
    assert remote.keys() == expected.keys()
    assert all(remote[name] == expected[name] for name in expected if name != "manifest.json")
    assert [str(file) for file in (tmp_path / "cache").rglob("*") if file.is_file()] == []
    assert preprocess(toy, EXAMPLES, url + "/", **options)["already_built"]
    with pytest.raises(UserError, match=rf"made from other data or options .*{url}"):
        preprocess(toy, EXAMPLES, url, val_fraction=0.5)
    assert ShardSet(url).read(3).meta == shards.read(3).meta


@pytest.mark.fast
def test_bad_urls_are_clear_errors(toy: Path, tmp_path: Path) -> None:
    for url, message in (
        ("nowhere://bucket/set", "cannot open this URL: Protocol not known: nowhere"),
        ("file:///proc/higgs/set", "cannot write here"),
    ):
        with pytest.raises(UserError, match=message):
            preprocess(toy, EXAMPLES, url, staging=tmp_path)
    with pytest.raises(UserError, match="--staging is out of range, expected a URL as --out"):
        preprocess(toy, EXAMPLES, tmp_path / "out", staging=tmp_path)


def test_interrupted_run_continues_to_the_same_bytes(
    toy: Path, shards: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the middle of encoding and again between two shards; encoded units are not encoded again."""
    options = {"val_fraction": 0.1, "samples_per_shard": 16, "clips_per_unit": 8}
    encode_clip, calls = encode._encode, []

    def counting(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 20:
            raise KeyboardInterrupt
        return encode_clip(*args)

    monkeypatch.setattr(encode, "_encode", counting)
    with pytest.raises(KeyboardInterrupt):
        preprocess(toy, EXAMPLES, tmp_path, **options)
    assert len(list((tmp_path / ".work").glob("unit-*"))) == 2
    assemble_shard = pipeline.assemble_shard

    def stopping(config: Any, number: int) -> None:
        if number == 1:
            raise KeyboardInterrupt
        assemble_shard(config, number)

    monkeypatch.setattr(pipeline, "assemble_shard", stopping)
    with pytest.raises(KeyboardInterrupt):
        preprocess(toy, EXAMPLES, tmp_path, **options)
    assert len(calls) == 20 + 40 - 16
    monkeypatch.setattr(pipeline, "assemble_shard", assemble_shard)
    preprocess(toy, EXAMPLES, tmp_path, **options)
    assert len(calls) == 20 + 40 - 16
    undisturbed = files_of(Path(shards.location))
    restarted = files_of(tmp_path)
    assert restarted.keys() == undisturbed.keys()
    assert all(restarted[name] == undisturbed[name] for name in restarted if name != "manifest.json")
    assert preprocess(toy, EXAMPLES, tmp_path, **options) == {"already_built": True, "samples": 40, "rejects": {}}
    with pytest.raises(UserError, match=r"made from other data or options .*got another val_fraction"):
        preprocess(toy, EXAMPLES, tmp_path, **options | {"val_fraction": 0.5})


def test_the_bar_says_from_the_start_what_it_is_about() -> None:
    """The first phase, reading the data, has a name and no total."""
    task = ProgressBar()._bar.tasks[0]
    assert (task.description, task.total) == ("list", None)


def test_command_line(toy: Path, tmp_path: Path) -> None:
    """Plain lines where there is no terminal, the summary, and a user's mistake in one line with exit code 2."""
    program = "from higgs_tune.preprocess.cli import main; main()"
    command = [sys.executable, "-c", program, "--data", str(EXAMPLES), "--out", str(tmp_path / "out")]
    command += ["--model-path", str(toy / "model"), "--audio_tokenizer_path", str(toy / "codec")]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    assert re.search(r"^samples   40 in ", result.stdout, re.MULTILINE)
    assert re.search(r"^encode 40/40 clips: 0\.04 h, [\d.]+x real time, 0 rejects, 0:00:00 left$", result.stderr, re.M)
    command[command.index("--model-path") + 1] = str(tmp_path)
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert (result.returncode, result.stderr.count("\n"), "Traceback" in result.stderr) == (2, 1, False)


def test_at_least_one_sample_is_held_out_and_never_all(toy: Path, tmp_path: Path) -> None:
    """The default, both extremes, and one sample alone; the check foresees it, and verify agrees."""
    entries = json.loads(EXAMPLES.read_text())
    (tmp_path / "clips").symlink_to(EXAMPLES.parent / "clips")
    data = tmp_path / "data.json"
    cases: list[tuple[int, dict[str, Any], int]] = [
        (4, {}, 1),
        (4, {"val_fraction": 1.0}, 3),
        (4, {"val_fraction": 0.0}, 0),
        (1, {}, 0),
        (4, {"val_by": "speaker"}, 1),
    ]
    sides: dict[str, int] = {}
    for number, (count, options, held_out) in enumerate(cases):
        data.write_text(json.dumps(entries[:count]))
        out = tmp_path / f"out-{number}"
        sides = preprocess(toy, data, out, **options)["sides"]
        assert (sides["validation_samples"], sides["train_samples"]) == (held_out, count - held_out)
        made = ShardSet(out)
        assert made.index["split"].sum() == made.manifest["totals"]["validation_samples"] == held_out
        assert (
            check_data(PreprocessConfig(data=data, model_path=toy / "model", check=True, **options))["sides"] == sides
        )
        assert not verify_set(out, VerifyOptions()).findings
    assert sides == {"train_samples": 3, "validation_samples": 1, "train_speakers": 3, "validation_speakers": 1,
                     "speakers_in_both": 0}  # fmt: skip
    assert describe_sides(sides, 0.05) == "1 of 4 samples (at least one): 1 speakers, 0 of them trained on too"


def test_speakers_cannot_be_held_out_without_names(toy: Path, tmp_path: Path) -> None:
    entries = json.loads(EXAMPLES.read_text())[:4]
    (tmp_path / "clips").symlink_to(EXAMPLES.parent / "clips")
    for speakers, count in (([None] * 4, 0), (["a"] * 4, 1)):
        named = [entry | {"speaker": speaker} for entry, speaker in zip(entries, speakers, strict=True)]
        (tmp_path / "data.json").write_text(json.dumps(named))
        with pytest.raises(UserError, match=rf"--val_by speaker cannot .*expected 2 speakers or more, got {count}\."):
            preprocess(toy, tmp_path / "data.json", tmp_path / "out", val_by="speaker")
