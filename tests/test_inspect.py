"""higgs-inspect on the terminal: what it prints and writes is what is stored, and what boson's collator makes of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import scipy.stats
import soundfile
from helpers.inspect_sets import HOSTILE, SampleMaker, write_set
from higgs_tune.inspect import cli
from higgs_tune.inspect.stats import main_script
from higgs_tune.inspect.view import printable, segments_of, target_text, visible
from higgs_tune.inspect.web.pages import set_info
from higgs_tune.preprocess.codec.checkpoint import load_codec
from higgs_tune.preprocess.reject import Reject
from higgs_tune.shards.errors import UserError
from higgs_tune.shards.reader import ShardSet
from higgs_tune.shards.sequence import expand
from higgs_tune.shards.split import ValidationSplit
from higgs_tune.train.data.sampler import Schedule
from higgs_tune.train.dist.context import World
from higgs_tune.train.model.reference import boson_inputs
from higgs_tune.train.model.sampling import request_of

Captured = pytest.CaptureFixture[str]


@pytest.mark.fast
def test_stats(shards: ShardSet, capsys: Captured) -> None:
    cli.StatsCommand(str(shards.folder), json=True, tokens_per_pack=2048).run()
    numbers = json.loads(capsys.readouterr().out)
    samples = [shards.read(row) for row in range(len(shards))]
    assert numbers["samples"] == len(samples) == 40
    assert numbers["hours"] == pytest.approx(sum(s["seconds"] for x in samples for s in x.meta["segments"]) / 3600)
    assert numbers["speakers"] == dict.fromkeys(("amal", "huda", "karim", "zayd"), 10)
    assert numbers["languages_by_script"] == {"Arabic": 40}
    codes_KT = np.concatenate([sample.codes_KT for sample in samples], axis=1)
    counts = [np.bincount(codes, minlength=1024) for codes in codes_KT]
    assert numbers["code_usage"]["entropy_bits"] == pytest.approx(
        [scipy.stats.entropy(c, base=2) for c in counts], abs=1e-3
    )
    assert numbers["code_usage"]["dead_codes"] == [1024 - len(set(codes.tolist())) for codes in codes_KT]
    lengths = [x.tokens_2L.shape[1] + sum(f + 8 for f in x.segment_frames) for x in samples]
    assert numbers["length_percentiles"]["50"] == pytest.approx(np.median(lengths))
    text = sum(x.tokens_2L.shape[1] - len(x.segment_frames) for x in samples)
    assert numbers["label_shares"]["text_positions"] == pytest.approx(text / sum(lengths))
    assert 0.85 < numbers["pack_fill"]["fill"] <= 1
    assert numbers["disk_bytes"]["codes"] == sum(path.stat().st_size for path in shards.folder.glob("codes-*.tar"))
    cli.StatsCommand(str(shards.folder)).run()
    assert "Arabic 40" in capsys.readouterr().out


TEXT = [{"role": "user", "content": "قل"}, {"role": "assistant", "content": "نعم"}]


def test_stats_of_mixed_sets(toy: Path, tmp_path: Path, capsys: Captured) -> None:
    """Samples without audio target or speaker, and speakers on both sides of the split, are counted and named."""
    maker = SampleMaker(toy)
    voices = ["amal", "huda", None, None, *["karim"] * 26]
    samples = [maker(n, speaker=voice, **({"messages": TEXT} if n < 3 else {})) for n, voice in enumerate(voices)]
    made = write_set(tmp_path / "mixed", toy, [samples])
    sides: dict[bool, set[str]] = {True: set(), False: set()}
    for entry in made.index:  # a plain loop over the rows
        name = made.manifest["speakers"][int(entry["speaker"])]
        sides[bool(entry["split"])] |= {name} if name else set()
    expected = {"training": len(sides[False]), "validation": len(sides[True]), "both": len(sides[True] & sides[False])}
    assert expected["both"] == 1
    cli.StatsCommand(made.location, json=True).run()
    numbers = json.loads(capsys.readouterr().out)
    assert numbers["speakers_by_split"] == expected
    assert (numbers["samples_without_audio_target"], numbers["samples_without_speaker"]) == (3, 2)
    cli.StatsCommand(made.location).run()
    out = capsys.readouterr().out
    for note in ("3 of 30 samples have no audio target", "2 of 30 samples have no speaker name", "1 of the"):
        assert f"note: {note}" in out
    assert set_info(made)["speakers"] == 3
    assert set_info(made)["speakers_in_both_splits"] == expected["both"]


def test_sets_without_audio_and_without_samples(toy: Path, tmp_path: Path, capsys: Captured) -> None:
    maker = SampleMaker(toy)
    for name, samples in (("text", [maker(0, messages=TEXT)]), ("empty", [])):
        folder = str(write_set(tmp_path / name, toy, [samples]).folder)
        cli.StatsCommand(folder).run()
        cli.ReportCommand(folder, tmp_path / f"{name}.html").run()
        assert f"{len(samples)} of {len(samples)} samples" in capsys.readouterr().out
        with pytest.raises(SystemExit) as left:
            cli.VerifyCommand(Path(folder), jobs=1).run()
        assert left.value.code == 0
        with pytest.raises(UserError, match="hold no audio" if samples else "no such sample"):
            cli.DecodeCommand(folder, ("0",), tmp_path / "clips").run()


def table_of(text: str, head: str) -> list[list[str]]:
    """Rows of the table whose header starts with `head`, cells between runs of two spaces or single numbers."""
    lines = text.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith(head))
    return [line.split() for line in lines[start + 1 :]]


@pytest.mark.fast
def test_show_is_bosons_batch(toy: Path, toy_ids: Any, tmp_path: Path, capsys: Captured) -> None:
    """Ids, labels, delayed codes and their labels, position by position, equal boson's collator's."""
    maker = SampleMaker(toy, frames=6)
    made = write_set(tmp_path / "set", toy, [[maker(0), maker(1)]])
    cli.ShowCommand(str(made.folder), "clip-000001").run()
    rows = table_of(capsys.readouterr().out, "position")
    batch = boson_inputs([maker(1)], toy_ids, 0)
    assert [int(row[0]) for row in rows] == list(range(len(rows)))
    text = [row for row in rows if row[1] == "text"]
    tokens = maker(1).tokens_2L.shape[1]  # the collator pads
    input_ids, label_ids = batch["input_ids"][0, :tokens].numpy(), batch["label_ids"][0, :tokens].numpy()
    is_text = (input_ids != toy_ids.audio_in) & (input_ids != toy_ids.audio_out)
    assert [int(row[2]) for row in text] == input_ids[is_text].tolist()
    assert [-100 if row[4] == "·" else int(row[4]) for row in text] == label_ids[is_text].tolist()
    for modality, codes, labels in (
        ("audio_in", batch["audio_in_ids"], None),
        ("audio_out", batch["audio_out_ids"], batch["label_audio_ids"]),
    ):
        shown = [row[2:] for row in rows if row[1] == modality]
        assert [[int(code) for code in row[:8]] for row in shown] == codes.T.tolist()
        got = [[-100 if label == "·" else int(label) for label in row[8:]] for row in shown]
        assert got == (labels.T.tolist() if labels is not None else [[-100] * 8] * len(shown))


def test_show_prompt_is_what_is_spoken_from(shards: ShardSet, capsys: Captured) -> None:
    """The positions of the request that higgs-speak makes of the same conversation, with the codes of its reference."""
    sample = shards.read(3)
    request = request_of(sample, shards.special_ids, speak=True, max_frames=1)
    wanted = expand([request.prompt], shards.special_ids)
    cli.ShowCommand(str(shards.folder), sample.key, prompt=True).run()
    out = capsys.readouterr().out
    assert "prompt layout chat: " in out
    assert f"{wanted.length} positions" in out
    rows = table_of(out, "position")
    assert len(rows) == wanted.length
    assert [int(row[2]) for row in rows if row[1] == "text"] == wanted.text_ids.tolist()
    codes = [[int(code) for code in row[2:10]] for row in rows if row[1] == "audio_in"]
    assert codes == wanted.codes_KA.T.tolist()
    with pytest.raises(UserError, match="exclude each other"):
        cli.ShowCommand(str(shards.folder), sample.key, prompt=True, raw=True).run()


def test_show_as_trained_is_the_loaders_batch(shards: ShardSet, capsys: Captured) -> None:
    """Pack number, neighbours and shifted labels equal what the trainer's loader makes."""
    budget, seed, epoch = 2048, 7, 1
    options = {"tokens_per_pack": budget, "seed": seed, "accumulation": 1, "world": World(0, 1, 0, 1)}
    schedule = Schedule([shards], **options)
    plan = schedule.plan(epoch)
    key = shards.index["key"].item(int(plan.pack(2)[1])).decode()
    cli.ShowCommand(str(shards.folder), key, as_trained=True, tokens_per_pack=budget, seed=seed, epoch=epoch).run()
    out = capsys.readouterr().out
    assert f"pack 2 of {len(plan)}:" in out
    keys = [shards.index["key"].item(int(row)).decode() for row in plan.pack(2)]
    block = out[out.index("pack 2") :].splitlines()[1 : 1 + len(keys)]
    assert [line.replace(">", " ").split()[1] for line in block] == keys
    assert block[1].startswith(">")
    rows = table_of(out, "in pack")
    start = int(shards.index["tokens"][plan.pack(2)[0]])
    assert [(int(row[0]), int(row[1])) for row in rows] == [(start + i, i) for i in range(len(rows))]
    entry = shards.index[int(plan.pack(2)[1])]
    labelled = [row for row in rows if row[2] == "text" and row[5] != "·"]
    assert len(labelled) == entry["text_labels"] - 1, "the last audio position predicts the token after the audio"
    audio = [row for row in rows if row[2] == "audio_out" and len(row) == 3 + 16]
    predicting = [row for row in audio if any(cell != "·" for cell in row[-8:])]
    assert len(predicting) == entry["audio_labels"] + 7, "each codebook one later than the one before"


@pytest.mark.parametrize("features", ["none", "mel"])
def test_show_as_trained_in_a_run(toy: Path, tmp_path: Path, capsys: Captured, features: str) -> None:
    """Budget, seed and sets come from the run, and so does whether its model takes the set's Whisper features."""
    maker = SampleMaker(toy, features=True)
    made = [
        write_set(tmp_path / name, toy, [[maker(n) for n in range(start, start + 12)]], features="mel")
        for name, start in (("first", 0), ("second", 12))
    ]
    options = {"train_data_dir": [str(one.folder) for one in made], "tokens_per_pack": 900, "seed": 5}
    config = {"options": options | {"mix_weights": None}, "resolved": {"whisper_features": features}}
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    (tmp_path / "metrics.jsonl").write_text("")
    schedule = Schedule(made, tokens_per_pack=900, seed=5, accumulation=1, world=World(0, 1, 0, 1), features=features)
    pack = schedule.plan(0).pack(1)
    number, row = divmod(int(pack[-1]), 12)
    cli.ShowCommand(str(made[number].folder), str(row), as_trained=True, run_dir=tmp_path).run()
    out = capsys.readouterr().out
    assert f"pack 1 of {len(schedule.plan(0))}:" in out
    rows = table_of(out, "in pack")
    last = made[number].index[row]
    assert len(rows) == last["tokens"] + (last["mel_tokens"] if features == "mel" else 0)
    assert any(line[2] == "whisper" for line in rows) == (features == "mel")


def test_show_as_trained_in_a_run_that_held_out_by_itself(shards: ShardSet, tmp_path: Path, capsys: Captured) -> None:
    """The run's own split, not the set's, says which samples are in packs."""
    options = {"train_data_dir": shards.location, "tokens_per_pack": 2048, "seed": 5, "val_fraction": 0.5}
    (tmp_path / "config.yaml").write_text(json.dumps({"options": options | {"val_by": "sample"}}))
    (tmp_path / "metrics.jsonl").write_text("")
    split = ShardSet(shards.folder)
    split.hold_out(ValidationSplit(0.5))
    held_out, kept = split.rows_of(validation=True), split.rows_of(validation=False)
    (row, *_) = set(held_out.tolist()) - set(shards.rows_of(validation=True).tolist())
    with pytest.raises(UserError, match="held out"):
        cli.ShowCommand(shards.location, str(row), as_trained=True, run_dir=tmp_path).run()
    cli.ShowCommand(shards.location, str(kept[0]), as_trained=True, run_dir=tmp_path).run()
    schedule = Schedule([split], tokens_per_pack=2048, seed=5, accumulation=1, world=World(0, 1, 0, 1))
    assert f" of {len(schedule.plan(0))}:" in capsys.readouterr().out


def test_show_as_trained_refuses_what_is_in_no_pack(shards: ShardSet) -> None:
    held_out = str(shards.rows_of(validation=True)[0])
    with pytest.raises(UserError, match="held out"):
        cli.ShowCommand(str(shards.folder), held_out, as_trained=True).run()
    with pytest.raises(UserError, match="longer than a pack"):
        cli.ShowCommand(str(shards.folder), "0", as_trained=True, tokens_per_pack=100).run()
    with pytest.raises(UserError, match="exclude"):
        cli.ShowCommand(str(shards.folder), "0", as_trained=True, raw=True).run()


def test_show_raw_is_what_is_stored(shards: ShardSet, capsys: Captured) -> None:
    cli.ShowCommand(str(shards.folder), "5", raw=True).run()
    out = capsys.readouterr().out
    sample = shards.read(5)
    for row in (*sample.tokens_2L, *sample.codes_KT[:, : sample.segment_frames[0]]):
        assert " ".join(map(str, row.tolist())) in " ".join(out.split())
    assert json.dumps(sample.meta["segments"][0]["source"]) in out


def test_right_to_left_and_hostile_texts_on_a_terminal(toy: Path, tmp_path: Path, capsys: Captured) -> None:
    maker = SampleMaker(toy, frames=4)
    texts = {"user": "\x1b[31mred\u202e", "assistant": "سَلَام"}
    said = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in texts.items()]
    with pytest.raises(Reject, match="control_character"):
        maker(0, messages=said)
    sample = maker(0)  # a set that another tool made may hold them
    sample.meta.update(messages=said, speaker="\x1b]0;title\x07")
    write_set(tmp_path / "set", toy, [[sample]])
    cli.ShowCommand(str(tmp_path / "set"), "0").run()
    out = capsys.readouterr().out
    assert "[31mred" in out
    assert "\x1b" not in out
    assert "\u202e" not in out
    assert "\u2068سَلَام\u2069" in out, "an isolate keeps the direction within the text"
    assert visible("\u064e") == "◌\u064e"
    assert printable("آب\u200cپ\nx") == "آب\u200cپ\nx"


@pytest.mark.fast
def test_target_text_and_kinds(toy: Path) -> None:
    """Where the reference stands in an earlier assistant turn, `start_index` tells it from the target."""
    maker = SampleMaker(toy)
    audio = [{"type": "audio", "audio_url": f"{name}.wav"} for name in ("reference", "target")]
    messages = [
        {"role": "user", "content": "first"},
        {"role": "assistant", "content": [audio[0]]},
        {"role": "user", "content": "second"},
        {"role": "assistant", "content": [audio[1]]},
    ]
    sample = maker(0, messages=messages, start_index=3)
    segments = segments_of(sample, maker.ids)
    assert [(s.kind, s.source) for s in segments] == [("ref", "reference.wav"), ("target", "target.wav")]
    assert target_text(sample) == "second"


def test_scripts() -> None:
    texts = ["سلام world ok", "salam", "你好 hi", "नमस्ते", "123 !"]
    assert [main_script(text) for text in texts] == ["Latin", "Latin", "Latin", "Devanagari", "none"]
    assert main_script("你好吗 hi") == "Han"


@pytest.mark.parametrize("delayed", [False, True])
def test_decode_is_the_codecs(shards: ShardSet, toy: Path, tmp_path: Path, delayed: bool) -> None:
    cli.DecodeCommand(str(shards.folder), ("2",), tmp_path / "x.wav", delayed=delayed).run()
    wave, rate = soundfile.read(tmp_path / "x.wav", dtype="float32")
    sample = shards.read(2)
    codes = sample.codes_KT[:, -sample.segment_frames[1] :]
    expected = load_codec(toy / "codec").decode(codes)
    assert rate == 24000
    np.testing.assert_allclose(wave, np.clip(expected, -1, 1), atol=1e-4)


def test_decode_chooses_segments(shards: ShardSet, tmp_path: Path) -> None:
    counts: dict[Literal["ref", "target", "all", "auto"], int] = {"ref": 2, "target": 2, "all": 4, "auto": 4}
    for segment, count in counts.items():
        cli.DecodeCommand(str(shards.folder), ("2", "3"), tmp_path / segment, segment=segment).run()
        assert len(list((tmp_path / segment).iterdir())) == count
    with pytest.raises(UserError, match="takes one segment"):
        cli.DecodeCommand(str(shards.folder), ("2", "3"), tmp_path / "x.wav").run()
    assert not (tmp_path / "x.wav").exists()


def test_diff(toy: Path, tmp_path: Path, capsys: Captured) -> None:
    maker = SampleMaker(toy)
    samples = [maker(number) for number in range(5)]
    codes = samples[1].codes_KT.copy()
    codes[0, 0] ^= 1
    labels = samples[2].tokens_2L.copy()
    labels[1] = -100
    labels[1, -1] = labels[0, -1]
    changed = [
        samples[0],
        replace(samples[1], codes_KT=codes),
        replace(samples[2], tokens_2L=labels),
        maker(3, messages=[*maker.entries[3]["messages"][:1], *maker.entries[4]["messages"][1:]]),
        maker(9),
    ]
    for name, group in (("a", samples), ("b", changed)):
        write_set(tmp_path / name, toy, [group])
    with pytest.raises(SystemExit) as left:
        cli.DiffCommand(str(tmp_path / "a"), str(tmp_path / "b"), json=True).run()
    assert left.value.code == 1
    difference = json.loads(capsys.readouterr().out)
    assert (difference["added"], difference["removed"], difference["same"]) == (["clip-000009"], ["clip-000004"], 1)
    parts = {change["key"]: change["parts"] for change in difference["changed"]}
    assert parts["clip-000001"] == {"codes": f"1 of {codes.size} codes differ"}
    assert list(parts["clip-000002"]) == ["labels"]
    assert {"text", "tokens"} <= parts["clip-000003"].keys()
    with pytest.raises(SystemExit) as left:
        cli.DiffCommand(str(tmp_path / "a"), str(tmp_path / "a")).run()
    assert left.value.code == 0
    with pytest.raises(SystemExit):
        cli.DiffCommand(str(tmp_path / "a"), str(tmp_path / "b")).run()
    assert "1 added, 1 removed, 3 changed, 1 the same" in capsys.readouterr().out


def test_user_mistakes(shards: ShardSet, tmp_path: Path) -> None:
    folder = str(shards.folder)
    mistakes = [
        (cli.ShowCommand(folder, "nobody"), "no such sample"),
        (cli.StatsCommand(str(tmp_path)), "no shard set"),
        (cli.StatsCommand(folder, tokens_per_pack=0), "out of range"),
        (cli.ReportCommand(folder, tmp_path / "x.html", max_samples=0), "out of range"),
        (cli.ReportCommand(folder, tmp_path / "x.html", run_dirs=(tmp_path,)), "no run here"),
        (cli.ReportCommand(folder, tmp_path / "x.html", audio_tokenizer_path=tmp_path), "codec"),
        (cli.ShowCommand(folder, "0", model_path=tmp_path), "model"),
    ]
    for command, message in mistakes:
        with pytest.raises(UserError, match=message):
            command.run()
    assert not (tmp_path / "x.html").exists()


def test_hostile_rejects_on_a_terminal(toy: Path, tmp_path: Path, capsys: Captured) -> None:
    write_set(tmp_path / "set", toy, [[SampleMaker(toy)(0, speaker=HOSTILE)]])
    cli.StatsCommand(str(tmp_path / "set")).run()
    assert HOSTILE in capsys.readouterr().out.replace("\n", "")
