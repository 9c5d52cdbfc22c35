"""higgs-eval with models: they speak every line; kills and ranks change nothing; what is not spoken counts as wrong."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import soundfile
from conftest import EXAMPLES, ROOT
from helpers.eval_rank import Listener, judges
from helpers.samples import random_sample
from helpers.speaking import write_list
from helpers.stub_judge import Stub
from helpers.tiny import ids_of, run_train, write_checkpoint, write_set
from higgs_tune.evaluate import speaking
from higgs_tune.evaluate.config import EvalConfig
from higgs_tune.evaluate.evaluate import evaluate
from higgs_tune.evaluate.judging import Judges
from higgs_tune.evaluate.speak import run as speak_run
from higgs_tune.shards.errors import UserError
from higgs_tune.shards.reader import ShardSet
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerBase

pytest.importorskip("rapidfuzz")
CLIPS = EXAMPLES.parent / "clips"


@pytest.fixture(scope="module")
def trained(toy_tokenizer: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base`, and `out`, the output folder of a run with a checkpoint."""
    folder, rng = tmp_path_factory.mktemp("trained"), np.random.default_rng(0)
    base = folder / "base"
    write_checkpoint(base, toy_tokenizer)
    samples = [random_sample(f"s{i}", rng, toy_tokenizer, ids_of(base)) for i in range(4)]
    data = write_set(folder / "set", samples, base)
    options: dict[str, Any] = {"save_steps": 2, "max_steps": 2, "lr_scheduler_type": "constant"}
    run_train("single", base, data, folder / "out", learning_rate=0.1, **options)
    return folder


@pytest.fixture(scope="module")
def lists(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An Arabic and an English list; `lost` has no reference file, `token` a text that no model can be given."""
    folder = tmp_path_factory.mktemp("lists")
    voice = {"ref_audio": str(CLIPS / "zayd-01.flac"), "ref_text": "قَالَ"}
    arabic = [{"id": f"ar/{i}", "text": f"مرحبا {word}", **voice} for i, word in enumerate(("بكم", "بالعالم", "جميعا"))]
    english: list[dict[str, Any]] = [{"id": f"en{i}", "text": f"The cat {w}.", **voice} for i, w in enumerate("abc")]
    english += [{"id": "lost", "text": "Here.", "ref_audio": "no.wav"}, {"id": "token", "text": "Hi <|eot_id|>"}]
    write_list(folder / "ar.jsonl", arabic)
    write_list(folder / "en.jsonl", english)
    return folder


def arguments(trained: Path, toy: Path, lists: Path, out: Path) -> dict[str, Any]:
    return {
        "out": out,
        "asr": "listener",
        "data": (f"ar={lists / 'ar.jsonl'}", f"en={lists / 'en.jsonl'}"),
        "model_path": (str(trained / "base"), str(trained / "out"), str(trained / "out" / "checkpoint-2")),
        "audio_tokenizer_path": toy / "codec",
        "speak_seconds": 0.4,
        "batch_size": 4,
        "device": "cpu",
    }


@pytest.fixture(scope="module")
def whole(trained: Path, toy: Path, lists: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of an evaluation that nothing happened to."""
    out = tmp_path_factory.mktemp("whole") / "eval"
    evaluate(EvalConfig(**arguments(trained, toy, lists, out)), judges)
    yield out


def results(out: Path) -> dict[str, Any]:
    """What must not change: all figures, each utterance without its folder, each file."""
    lines = [json.loads(line) for line in (out / "utterances.jsonl").read_text().splitlines()]
    return {
        "eval": json.loads((out / "eval.json").read_text()),
        "lines": [line | {"wav": Path(line["wav"]).name} for line in lines],
        "wavs": {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*.wav")},
    }


@pytest.mark.fast
def test_every_line_counts_for_every_model(whole: Path) -> None:
    given = results(whole)
    names = ["base", "out", "checkpoint-2"]
    figures = given["eval"]
    for name in names:
        assert figures[name]["wer"]["n"] == 8 and figures[name]["counts"]["problems"] >= 2
        problems = {problem["id"]: problem for problem in figures["findings"][name]["problems"]}
        assert problems["lost"]["problem"] == problems["token"]["problem"] == "not_spoken"
        assert "no.wav" in problems["lost"]["detail"] and "<|eot_id|>" in problems["token"]["detail"]
        assert set(figures["findings"][name]["cut_off"]) <= {f"ar/{i}" for i in range(3)} | {f"en{i}" for i in range(3)}
    wrong = [line for line in given["lines"] if line["id"] in ("lost", "token")]
    assert len(wrong) == 6 and all(line["wer"] == 1 and line["heard"] == "" for line in wrong)
    assert set(given["wavs"]) == {
        f"wavs/{name}/{line}.wav" for name in names for line in ("ar/0", "ar/1", "ar/2", "en0", "en1", "en2")
    }
    adapter = {name.split("/", 2)[2]: data for name, data in given["wavs"].items() if "/out/" in name}
    for name, data in adapter.items():
        assert given["wavs"][f"wavs/checkpoint-2/{name}"] == data  # the final adapter is the last checkpoint's
    assert any(given["wavs"][f"wavs/base/{name}"] != data for name, data in adapter.items())
    assert figures["paired"]["base"] == "base" and figures["paired"]["minus_base"]["out"]["wer"]["n"] == 8
    assert set(figures["changes"]) == set(figures["groups"]["language"]) == {"ar", "en"}
    assert set(figures["changes"]["ar"]) == {"out", "checkpoint-2"}
    page = (whole / "index.html").read_text("utf-8")
    assert 'src="wavs/out/ar/0.wav"' in page and "not_spoken" in page


@pytest.mark.fast
def test_a_killed_evaluation_speaks_on_to_the_same_table(
    trained: Path, toy: Path, lists: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = EvalConfig(**arguments(trained, toy, lists, tmp_path / "eval"))
    spoken: list[str] = []
    original = speak_run.speak_utterances

    def counted(engine: Any, utterances: Any, *rest: Any, kill: bool = False) -> Iterator[Any]:
        for result in original(engine, utterances, *rest):
            spoken.append(cast(Any, result).id)
            yield result
            if kill and len(spoken) == 8:
                raise KeyboardInterrupt

    monkeypatch.setattr(speak_run, "speak_utterances", lambda *given: counted(*given, kill=True))
    with pytest.raises(KeyboardInterrupt):
        evaluate(config, judges)
    assert len(spoken) == 8 and not (tmp_path / "eval" / "eval.json").exists()
    with (tmp_path / "eval" / "wavs" / "out" / "spoken.jsonl").open("ab") as file:
        file.write(b'{"id": "half a li')
    monkeypatch.setattr(speak_run, "speak_utterances", counted)
    evaluate(config, judges)
    assert len(spoken) == 18
    assert results(tmp_path / "eval") == results(whole)
    evaluate(config, judges)
    assert len(spoken) == 18  # nothing is spoken again


def test_two_ranks_of_torchrun_share_the_lines(
    trained: Path, toy: Path, lists: Path, whole: Path, tmp_path: Path
) -> None:
    given = arguments(trained, toy, lists, tmp_path / "eval")
    flags = [
        str(word)
        for name, value in given.items()
        for word in (f"--{name}", *(value if isinstance(value, tuple) else (value,)))
    ]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*torchrun, str(ROOT / "tests" / "helpers" / "eval_rank.py"), *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("8 lines") == 1  # rank 0 alone prints the table
    assert results(tmp_path / "eval") == results(whole)
    assert not list((tmp_path / "eval").rglob("*part*"))


def test_the_held_out_split_is_spoken(toy: Path, shards: ShardSet, tmp_path: Path) -> None:
    """In the voices of its own references; the training samples of its set are checked for leaks."""
    config = EvalConfig(
        out=tmp_path / "eval", asr="listener", shards=shards.location, split="val", audio_root=EXAMPLES.parent,
        model_path=(f"toy={toy / 'model'}",), audio_tokenizer_path=toy / "codec", speak_seconds=0.2, device="cpu",
        ceiling=True,
    )  # fmt: skip
    result = evaluate(config, judges)
    count = len(shards.rows_of(validation=True))
    assert result["about"]["lines"] == count > 1
    assert len(list((tmp_path / "eval" / "wavs" / "toy").rglob("*.wav"))) == count
    assert not [fault for fault in result["findings"]["toy"]["problems"] if fault["problem"] != "nothing_heard"]
    assert result["ceiling"]["wer"]["n"] == count and result["leakage"][0]["compared"] == len(shards) - count


@pytest.mark.fast
def test_names_of_models(tmp_path: Path) -> None:
    """A path is named by as many of its last parts as make it unique."""
    base: dict[str, Any] = {"out": tmp_path, "asr": "x", "data": ("x",), "audio_tokenizer_path": tmp_path}
    odd = tmp_path / "lr=1"
    odd.mkdir()
    paths = ("a/checkpoint-2", "b/checkpoint-2", "b", "mine=c/x", "owner/name@main", str(odd))
    names = list(EvalConfig(**base, model_path=paths).models)
    assert names == ["a-checkpoint-2", "b-checkpoint-2", "b", "mine", "name@main", "lr=1"]
    for paths, wavs, message in (
        (("b", "b"), (), "'b' is given twice"),
        (("x=b", "x=c"), (), "'x' is given twice"),
        (("b",), ("b=c",), "'b' is given twice"),
        (("floor=b",), (), "'floor' cannot be used"),
        (("x/y=b",), (), "'x/y' cannot be used"),
    ):
        with pytest.raises(UserError, match=message):
            EvalConfig(**base, model_path=paths, wavs=wavs)


def test_a_model_that_is_none_is_named_before_the_judges_load(toy: Path, lists: Path, tmp_path: Path) -> None:
    given = arguments(tmp_path, toy, lists, tmp_path / "eval")
    with pytest.raises(UserError, match="base"):
        evaluate(EvalConfig(**given), lambda _config: pytest.fail("judges were loaded"))


def test_an_unusable_reference_is_named_before_anything_is_spoken(
    trained: Path, toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A missing one: no model can speak its line. One of zeros: there is no similarity to it. The others are done."""
    soundfile.write(tmp_path / "zeros.wav", np.zeros(16_000), 16_000)
    voice = {"ref_audio": str(CLIPS / "zayd-01.flac"), "ref_text": "قَالَ"}
    lines = [
        {"id": "a", "text": "مرحبا", "ref_audio": "zeros.wav", "ref_text": "نعم"},
        {"id": "b", "text": "نعم", "ref_audio": "none.wav"},
        {"id": "c", "text": "مرحبا بكم", **voice},
    ]
    write_list(tmp_path / "ar.jsonl", lines)
    write_list(tmp_path / "en.jsonl", [{"id": "d", "text": "yes", **voice}])
    given: dict[str, Any] = arguments(trained, toy, tmp_path, tmp_path / "eval") | {"speaker_model": "stub"}
    one: dict[str, Any] = given | {"model_path": (str(trained / "base"),)}
    config = EvalConfig(**one)

    class OneVoice(Stub):
        def embed(self, wave_S: np.ndarray) -> np.ndarray:
            return np.ones(2, np.float32)

    shown: list[str] = []

    def speak(*given: Any) -> Any:
        shown.append(capsys.readouterr().err)
        return original(*given)

    original = speaking.speak_into
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speaking, "speak_into", speak)
        result = evaluate(config, lambda _config: Judges(Listener(), OneVoice(())))
    assert "2 lines have no usable reference" in shown[0] and "a: silent_audio" in shown[0]
    assert [fault["id"] for fault in result["list"]["without_reference"]] == ["a", "b"]
    assert result["base"]["sim"]["n"] == 2 and result["base"]["wer"]["n"] == 4
    failed = {fault["id"]: fault["detail"] for fault in result["findings"]["base"]["problems"]}
    assert "none.wav" in failed["b"]


def test_a_model_whose_weights_cannot_be_loaded_costs_no_other(
    trained: Path, toy: Path, lists: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All its lines count as wrong, with the reason; alone it is an error."""
    broken = tmp_path / "broken"
    shutil.copytree(trained / "base", broken)
    tensors = load_file(broken / "model.safetensors")
    tensors.pop("norm.weight")
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    given: dict[str, Any] = arguments(trained, toy, lists, tmp_path / "eval")
    both: dict[str, Any] = given | {"model_path": (str(trained / "base"), str(broken))}
    alone: dict[str, Any] = given | {"model_path": (str(broken),), "out": tmp_path / "other"}
    config = EvalConfig(**both)
    result = evaluate(config, judges)
    problems = result["findings"]["broken"]["problems"]
    assert len(problems) == 8 and result["broken"]["wer"]["mean"] == 1
    assert sum("cannot be loaded" in fault["detail"] for fault in problems) == 6
    assert "warning: broken: the model cannot be loaded" in capsys.readouterr().err
    assert not any("cannot be loaded" in fault["detail"] for fault in result["findings"]["base"]["problems"])
    with pytest.raises(UserError, match="norm"):
        evaluate(EvalConfig(**alone), judges)
