"""higgs-preprocess: what it stores, what it rejects, and that restarts and processes change nothing."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from boson_multimodal.dataset.chatml_dataset import prepare_chatml_sample
from conftest import EXAMPLES, preprocess
from higgs_tune.preprocess import pipeline
from higgs_tune.shards.errors import UserError
from higgs_tune.shards.reader import ShardSet
from transformers import PreTrainedTokenizerBase


def entry(audio: Any = "good.wav", text: Any = "مرحبا", role: str = "assistant", **more: Any) -> dict[str, Any]:
    user = [{"type": "text", "text": "say"}, {"type": "audio", "audio_url": "good.wav"}]
    answer = [{"type": "text", "text": text}, {"type": "audio", "audio_url": audio}]
    return {"messages": [{"role": "user", "content": user}, {"role": role, "content": answer}], **more}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    soundfile.write(tmp_path / "good.wav", 0.1 * rng.standard_normal(8000), 16000)
    soundfile.write(tmp_path / "stereo.wav", 0.1 * rng.standard_normal((48000, 2)), 48000)
    soundfile.write(tmp_path / "empty.wav", np.zeros(0), 16000)
    soundfile.write(tmp_path / "nan.wav", np.full(8000, np.nan), 16000, subtype="FLOAT")
    (tmp_path / "noise.wav").write_bytes(b"RIFF" + bytes(60))
    return tmp_path


def write(folder: Path, entries: list[Any], name: str = "data.json") -> Path:
    path = folder / name
    path.write_text(json.dumps(entries, ensure_ascii=False))
    return path


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


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
        assert target["sha256"] == pipeline.file_sha256(source)


def test_processes_and_json_lines_change_nothing(toy: Path, shards: ShardSet, tmp_path: Path) -> None:
    lines = tmp_path / "chatml.jsonl"
    lines.write_text("\n".join(json.dumps(e, ensure_ascii=False) for e in json.loads(EXAMPLES.read_text())) + "\n")
    (tmp_path / "clips").symlink_to(EXAMPLES.parent / "clips")
    preprocess(toy, lines, tmp_path / "out", val_fraction=0.1, samples_per_shard=16, num_processes=2, clips_per_unit=7)
    one, two = files_of(shards.folder), files_of(tmp_path / "out")
    assert one.keys() == two.keys()
    assert all(one[name] == two[name] for name in one if name != "manifest.json")


def test_bad_input_is_named_and_the_rest_is_there(toy: Path, folder: Path) -> None:
    inline = base64.b64encode((folder / "good.wav").read_bytes()).decode()
    bad = {
        "missing_audio": entry("nowhere.wav"),
        "unreadable_audio": entry("noise.wav"),
        "empty_audio": entry("empty.wav"),
        "non_finite_audio": entry("nan.wav"),
        "empty_text": entry(text="  "),
        "unknown_role": entry(role="narrator"),
        "malformed_chatml": {"messages": "hello"},
        "template_token_in_text": entry(text="a <|AUDIO_OUT|> b"),
        "nothing_to_train": entry(start_index=5),
    }
    more = [entry(audio=7), entry(text=None), "text", {}, entry(text="\ud800"), entry(misc={"x": 1e999})]
    good = [entry(), entry("stereo.wav", speaker="b"), entry(id="utt 1"), entry(misc={"x": float("nan")})]
    good[0]["messages"][1]["content"][1] = {"type": "audio", "audio_url": "", "raw_audio": inline}
    entries = [good[0], *bad.values(), good[1], *more, good[2], entry(id="utt 1"), good[3]]
    path = folder / "data.json"
    path.write_text(json.dumps(entries).replace("Infinity", "1e999"))
    summary = preprocess(toy, path, folder / "out")
    shards = ShardSet(folder / "out")
    expected = dict.fromkeys(bad, 1) | {"duplicate_id": 1, "malformed_chatml": 1 + len(more)}
    assert summary["rejects"] == shards.manifest["rejects"]["by_reason"] == expected
    lines = [json.loads(line) for line in (folder / "out" / "rejects.jsonl").read_text().splitlines()]
    assert len(lines) == sum(expected.values())
    assert {line["reason"]: line["position"] for line in lines}["missing_audio"] == 1
    keys = [key.decode() for key in shards.index["key"]]
    assert len(keys) == len(good)
    assert keys[0] == "000000000"
    assert keys[2].startswith("utt_1-")
    stereo = shards.read(1).meta["segments"][1]
    assert (stereo["seconds"], stereo["frames"]) == (1.0, 25)


def test_invalid_json_line_is_a_named_reject(toy: Path, folder: Path) -> None:
    path = folder / "data.jsonl"
    path.write_text(json.dumps(entry()) + "\n{broken\n\n" + json.dumps(entry()) + "\n")
    summary = preprocess(toy, path, folder / "out")
    assert (summary["samples"], summary["rejects"]) == (2, {"invalid_json": 1})
    assert "line 2" in (folder / "out" / "rejects.jsonl").read_text()


@pytest.mark.parametrize(
    ("content", "message"),
    [("", "not a ChatML file"), ("hello", "not a ChatML file"), ("[{]", "not JSON"), ("[]", "no sample is left")],
)
def test_unusable_data_is_refused(toy: Path, folder: Path, content: str, message: str) -> None:
    (folder / "data.json").write_text(content)
    with pytest.raises(UserError, match=message):
        preprocess(toy, folder / "data.json", folder / "out")
    assert not (folder / "out" / "manifest.json").exists()


def test_bad_checkpoints_are_refused(toy: Path, folder: Path) -> None:
    data = write(folder, [entry()])
    base: dict[str, Any] = {"data": data, "out": folder / "out"}
    base |= {"model_path": toy / "model", "audio_tokenizer_path": toy / "codec"}
    from higgs_tune.preprocess.config import PreprocessConfig

    for change, message in (
        ({"model_path": folder}, "no checkpoint here"),
        ({"model_path": toy / "codec"}, "not a Higgs Audio v2 checkpoint"),
        ({"audio_tokenizer_path": folder}, "no audio tokenizer here"),
        ({"data": folder / "none.json"}, "no data file here"),
    ):
        options: dict[str, Any] = {**base, **change}
        with pytest.raises(UserError, match=message):
            pipeline.build(PreprocessConfig(**options))


def test_interrupted_run_continues_to_the_same_bytes(
    toy: Path, shards: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the middle of encoding and again between two shards; encoded units are not encoded again."""
    options = {"val_fraction": 0.1, "samples_per_shard": 16, "clips_per_unit": 8}
    encode_clip, calls = pipeline._encode_clip, []

    def counting(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 20:
            raise KeyboardInterrupt
        return encode_clip(*args)

    monkeypatch.setattr(pipeline, "_encode_clip", counting)
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
    undisturbed = files_of(shards.folder)
    restarted = files_of(tmp_path)
    assert restarted.keys() == undisturbed.keys()
    assert all(restarted[name] == undisturbed[name] for name in restarted if name != "manifest.json")
    assert preprocess(toy, EXAMPLES, tmp_path, **options) == {"already_built": True}
    with pytest.raises(UserError, match="made from other data or options"):
        preprocess(toy, EXAMPLES, tmp_path, val_fraction=0.5)


def test_command_line(toy: Path, folder: Path) -> None:
    data = write(folder, [entry("nowhere.wav"), entry()])
    program = "from higgs_tune.preprocess.cli import main; main()"
    command = [sys.executable, "-c", program, "--data", str(data), "--out", str(folder / "out")]
    command += ["--model-path", str(toy / "model"), "--audio_tokenizer_path", str(toy / "codec")]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert "samples   1 " in result.stdout
    assert "missing_audio" in result.stdout
    result = subprocess.run([*command[:6], str(folder / "x"), *command[7:9], str(folder), *command[9:]],
                            capture_output=True, text=True, check=False, timeout=60)  # fmt: skip
    assert result.returncode == 2
