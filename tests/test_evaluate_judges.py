"""Judges: tiny random checkpoints through each class, an endpoint on loopback, choice by name, mistakes."""

from __future__ import annotations

import io
import json
import shutil
import threading
from collections.abc import Iterator
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from helpers.wavlm_state import LARGE, Sizes, shapes, state_dict
from higgs_tune.preprocess.judges import endpoint
from higgs_tune.preprocess.judges.interface import cosine
from higgs_tune.preprocess.judges.load import load_quality_model, load_recogniser, load_speaker_encoder
from higgs_tune.shards.errors import UserError

RATE = 16_000


def noise(seconds: float, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(int(seconds * RATE)) * 0.1).astype(np.float32)


@pytest.fixture(scope="module")
def ctc(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random wav2vec2 with adapters, and adapter weights for `ara` and `eng`, as MMS has them."""
    from safetensors.torch import save_file
    from transformers import (
        Wav2Vec2Config,
        Wav2Vec2CTCTokenizer,
        Wav2Vec2FeatureExtractor,
        Wav2Vec2ForCTC,
        Wav2Vec2Processor,
    )

    folder = tmp_path_factory.mktemp("ctc")
    special = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, "|": 4}
    vocabularies = {"eng": special | {"a": 5, "b": 6}, "ara": special | {"ا": 5, "ب": 6}}
    (folder / "vocab.json").write_text(json.dumps(vocabularies))
    tokenizer = Wav2Vec2CTCTokenizer(str(folder / "vocab.json"), target_lang="eng")
    extractor = Wav2Vec2FeatureExtractor(return_attention_mask=True)
    Wav2Vec2Processor(extractor, tokenizer).save_pretrained(folder)
    torch.manual_seed(0)
    config = Wav2Vec2Config(
        vocab_size=7, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        conv_dim=(8, 8), conv_kernel=(10, 5), conv_stride=(160, 2), num_feat_extract_layers=2,
        num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, adapter_attn_dim=4,
        feat_extract_norm="layer", do_stable_layer_norm=True,
    )  # fmt: skip
    model = Wav2Vec2ForCTC(config)
    model.save_pretrained(folder)
    for at, language in enumerate(("eng", "ara")):
        weights = {name: value.clone() for name, value in model._get_adapters().items()}
        weights["lm_head.bias"][5 + at] += 100
        save_file(weights, folder / f"adapter.{language}.safetensors")
    return folder


@pytest.mark.fast
def test_ctc_with_adapters(ctc: Path) -> None:
    """The adapter's language decides the letters; a short clip in a batch is not padded into more of them."""
    judge = load_recogniser(str(ctc), "cpu")
    waves = [noise(1.0), noise(0.001), noise(0.3, 1)]
    assert judge.transcribe(waves, "eng") == ["a"] * 3
    assert judge.transcribe(waves, "ara") == ["ب"] * 3
    assert judge.name == str(ctc)
    with pytest.raises(UserError, match="no adapter: "):
        judge.transcribe(waves, "xyz")


@pytest.fixture(scope="module")
def whisper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Whisper with a vocabulary of bytes."""
    from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration, WhisperTokenizer
    from transformers.models.whisper.tokenization_whisper import bytes_to_unicode

    folder = tmp_path_factory.mktemp("whisper")
    vocabulary = {letter: at for at, letter in enumerate(bytes_to_unicode().values())} | {"<|endoftext|>": 256}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer: Any = WhisperTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    named = ["<|startoftranscript|>", "<|ar|>", "<|en|>", "<|translate|>", "<|transcribe|>", "<|startofprev|>"]
    named += ["<|startoflm|>", "<|nospeech|>", "<|notimestamps|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": named})
    tokenizer.add_tokens([f"<|{at * 0.02:.2f}|>" for at in range(1501)])
    tokenizer.save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=8).save_pretrained(folder)
    ids: dict[str, int] = dict(zip(named, tokenizer.convert_tokens_to_ids(named), strict=True))
    torch.manual_seed(0)
    config = WhisperConfig(
        vocab_size=len(tokenizer), num_mel_bins=8, d_model=16, encoder_layers=1, decoder_layers=1,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16,
        max_target_positions=24, pad_token_id=256, bos_token_id=256, eos_token_id=256,
        decoder_start_token_id=ids["<|startoftranscript|>"], suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip
    model = WhisperForConditionalGeneration(config)
    settings = {
        "is_multilingual": True,
        "lang_to_id": {name: ids[name] for name in ("<|ar|>", "<|en|>")},
        "task_to_id": {"translate": ids["<|translate|>"], "transcribe": ids["<|transcribe|>"]},
        "no_timestamps_token_id": ids["<|notimestamps|>"],
        "prev_sot_token_id": ids["<|startofprev|>"],
        "max_initial_timestamp_index": 50,
        "max_length": 16,
        "_from_model_config": False,  # or it is made anew from the config
    }
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    model.save_pretrained(folder)
    return folder


@pytest.mark.fast
def test_whisper(whisper: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone or in a batch, a clip has the same transcript; the language is forced; a long clip goes alone."""
    judge: Any = load_recogniser(str(whisper), "cpu")
    waves = [noise(1.0), noise(2.0, 1)]
    texts = judge.transcribe(waves, "ar")
    assert texts == [judge.transcribe([wave], "ar")[0] for wave in waves]
    asked: list[dict[str, Any]] = []
    generate = judge._model.generate
    monkeypatch.setattr(judge._model, "generate", lambda **given: asked.append(given) or generate(**given))
    assert len(judge.transcribe([waves[0], noise(31.0), waves[1]], "ar")) == 3
    short, long = asked
    assert len(short["input_features"]) == 2 and short["language"] == "ar" and short["task"] == "transcribe"
    assert long["input_features"].shape[-1] == 3100 and long["return_timestamps"]
    with pytest.raises(UserError, match=r"Whisper refuses: .*got xx"):
        judge.transcribe(waves, "xx")


@pytest.mark.fast
def test_xvector(tmp_path: Path) -> None:
    from transformers import Wav2Vec2FeatureExtractor, WavLMConfig, WavLMForXVector

    torch.manual_seed(0)
    config = WavLMConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, conv_dim=(8, 8),
        conv_kernel=(10, 5), conv_stride=(160, 2), num_feat_extract_layers=2, num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2, tdnn_dim=(8, 8, 8), tdnn_kernel=(5, 3, 1), tdnn_dilation=(1, 2, 1),
        xvector_output_dim=6,
    )  # fmt: skip
    WavLMForXVector(config).save_pretrained(tmp_path)
    Wav2Vec2FeatureExtractor().save_pretrained(tmp_path)
    judge = load_speaker_encoder(str(tmp_path), "cpu")
    embedding_D = judge.embed(noise(1.0))
    assert embedding_D.shape == (6,) and embedding_D.dtype == np.float32
    assert np.array_equal(embedding_D, judge.embed(noise(1.0)))
    assert np.isfinite(judge.embed(noise(0.01))).all()
    assert cosine(embedding_D, embedding_D) == pytest.approx(1)
    assert cosine(embedding_D, np.zeros(6)) is None and cosine(embedding_D, embedding_D * np.nan) is None


@pytest.mark.fast
def test_seed_tts_evals_speaker_encoder(tmp_path: Path) -> None:
    """Embeddings of UniSpeech's own code over s3prl 0.4.18's WavLM, with the same weights (helpers/wavlm_state.py)."""
    file = tmp_path / "wavlm_large_finetune.pth"
    weights = state_dict(Sizes())
    torch.save({"model": weights | {"loss_calculator.projection.weight": torch.zeros(3, 3)}}, file)
    judge = load_speaker_encoder(str(file), "cpu")
    published = (
        (1.0, 0, (-1.3155, 1.79804, -1.61893, 0.31706, 3.36401, 4.12163, -1.01808, -1.31941)),
        (3.7, 1, (-1.48718, 1.7025, -1.72624, 0.45679, 3.29342, 4.23049, -1.01131, -1.08604)),
    )
    for seconds, seed, expected in published:
        np.testing.assert_allclose(judge.embed(noise(seconds, seed)), expected, atol=2e-4)
    assert np.isfinite(judge.embed(noise(0.01))).all() and judge.revision.startswith("sha256 ")
    np.testing.assert_array_equal(judge.embed(noise(70)), judge.embed(noise(70)[: 60 * RATE]))
    assert shapes(LARGE)["layer2.Res2Conv1dReluBn.convs.6.weight"] == (64, 64, 3)


@pytest.mark.fast
def test_state_dicts_that_are_no_speaker_encoder(tmp_path: Path) -> None:
    file = tmp_path / "model.pth"
    weights = state_dict(Sizes())
    for given, message in (
        ({"model": {}}, "cannot load the speaker encoder: no tensor .*conv_layers.0"),
        (weights | {"linear.bias": torch.zeros(3)}, r"cannot load the speaker encoder: .*size|shape"),
        ({name: value for name, value in weights.items() if name != "bn.running_var"}, "no tensor 'bn.running_var'"),
        ({name: value for name, value in weights.items() if "fc2" not in name}, "cannot load the speaker encoder: "),
        ({"model": Path("a pickle")}, "cannot read the speaker encoder: it holds more than weights"),
    ):
        torch.save(given, file)
        with pytest.raises(UserError, match=message):
            load_speaker_encoder(str(file), "cpu")
    file.write_bytes(b"no file of torch")
    with pytest.raises(UserError, match="cannot read the speaker encoder: "):
        load_speaker_encoder(str(file), "cpu")
    with pytest.raises(UserError, match="no such weight file"):
        load_speaker_encoder(str(tmp_path / "none.pth"), "cpu")


@pytest.mark.fast
def test_other_weights_have_another_revision(ctc: Path, tmp_path: Path) -> None:
    """So a recogniser that was trained on is not taken for the one that judged before."""
    folder = tmp_path / "asr"
    shutil.copytree(ctc, folder)
    before = load_recogniser(str(folder), "cpu").revision
    assert before.startswith("sha256 ") and before == load_recogniser(str(ctc), "cpu").revision
    (folder / "adapter.eng.safetensors").write_bytes((folder / "adapter.ara.safetensors").read_bytes())
    assert load_recogniser(str(folder), "cpu").revision != before


class Server(ThreadingHTTPServer):
    """Transcribes a clip as its length, language and model; the first requests fail as told."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.failures: list[int] = []
        self.answer: bytes | None = None
        self.raw: bytes | None = None  # in place of HTTP
        self.requests: list[tuple[str, str | None]] = []
        self.url = f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Server  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.requests.append((self.path, self.headers["Authorization"]))
        status = self.server.failures.pop(0) if self.server.failures else 200
        boundary = b"--" + self.headers["Content-Type"].partition("boundary=")[2].encode()
        fields = {}
        for part in body.split(boundary)[1:-1]:
            head, _, value = part.strip(b"\r\n").partition(b"\r\n\r\n")
            fields[head.split(b'name="')[1].split(b'"')[0].decode()] = value
        samples, rate = soundfile.read(io.BytesIO(fields["file"]))
        text = f"{len(samples) / rate:.1f} s {fields.get('language', b'').decode()} {fields['model'].decode()}"
        if self.server.raw is not None:
            self.wfile.write(self.server.raw)
            return
        self.send_response(status)
        self.end_headers()
        self.wfile.write(self.server.answer or json.dumps({"text": text}).encode())

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(endpoint, "PAUSE_S", 0.01)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    server = Server()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.fast
def test_endpoint(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    judge = load_recogniser(f"{server.url}#large-v3")
    waves = [noise(seconds) for seconds in (0.5, 1.0, 0.2)]
    assert judge.transcribe(waves, "ar") == ["0.5 s ar large-v3", "1.0 s ar large-v3", "0.2 s ar large-v3"]
    assert judge.name == f"large-v3 at 127.0.0.1:{server.server_port}"
    assert set(server.requests) == {("/v1/audio/transcriptions", None)}
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    server.failures = [503, 429]
    whole = load_recogniser(f"{server.url}/audio/transcriptions")
    assert whole.transcribe(waves[:1], "") == ["0.5 s  whisper-1"]
    assert server.requests[-3:] == [("/v1/audio/transcriptions", "Bearer secret")] * 3


@pytest.mark.fast
def test_endpoint_faults(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    judge = load_recogniser(server.url)
    server.failures = [401]
    with pytest.raises(UserError, match="the endpoint refuses: 401"):
        judge.transcribe([noise(0.1)], "")
    server.failures = [400, 400]  # the clip, and the noise that tells whether it is the clip
    with pytest.raises(UserError, match="the endpoint refuses: 400"):
        judge.transcribe([noise(0.1)], "")
    server.failures = [422]
    assert judge.transcribe([noise(0.1)], "") == [""]
    assert "nothing is heard in a clip of 0.1 s: the endpoint refuses: 422" in capsys.readouterr().err
    server.failures = [500] * 4
    with pytest.raises(UserError, match="the endpoint fails 4 times: 500"):
        judge.transcribe([noise(0.1)], "")
    for answer in (b"hello", b'{"segments": []}', b"[]", b'{"text": null}'):
        server.answer = answer
        with pytest.raises(UserError, match="the endpoint answers in another form"):
            judge.transcribe([noise(0.1)], "")
    half = b'HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\n{"te'
    for server.raw, fault in ((b"hello\r\n\r\n", "hello"), (b"", "closed"), (half, "IncompleteRead")):
        with pytest.raises(UserError, match=f"the endpoint fails 4 times: .*{fault}"):
            judge.transcribe([noise(0.1)], "")
    with pytest.raises(UserError, match="no such address"):
        load_recogniser("http://127.0.0.1:port/v1").transcribe([noise(0.1)], "")
    with pytest.raises(UserError, match=r"the endpoint fails 4 times: .*refused"):
        load_recogniser("http://127.0.0.1:9/v1").transcribe([noise(0.1)], "")


@pytest.mark.fast
def test_mistakes_are_named(tmp_path: Path, ctc: Path) -> None:
    with pytest.raises(UserError, match="cannot read the checkpoint's config"):
        load_recogniser(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "bert", "architectures": ["BertModel"]}')
    with pytest.raises(UserError, match=r"no recogniser .*expected Whisper or a CTC model, got bert"):
        load_recogniser(str(tmp_path))
    with pytest.raises(UserError, match="no speaker encoder in this checkpoint"):
        load_speaker_encoder(str(ctc))
    with pytest.raises(UserError, match="unknown quality model, expected dnsmos or distillmos, got utmos"):
        load_quality_model("utmos")
    (tmp_path / "config.json").write_text('{"model_type": "whisper"}')
    (tmp_path / "pytorch_model.bin").write_bytes(b"a pickle")
    with pytest.raises(UserError, match="cannot load Whisper"):  # safetensors only
        load_recogniser(str(tmp_path))


@pytest.mark.fast
def test_a_download_is_named_with_its_size(
    ctc: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the files that are taken: safetensors and CTranslate2, no pickles."""
    sizes = {"model.safetensors": 3_000_000, "model.bin": 2_000_000, "pytorch_model.bin": 9_000_000, "a.pth": 9_000_000}
    files = [SimpleNamespace(rfilename=name, size=size) for name, size in sizes.items()]
    info = SimpleNamespace(siblings=files, sha="abc")
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_given, **_named: info)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_given, **named: asked.append(named) or str(ctc))
    judge = load_recogniser("owner/name@v1", "cpu")
    assert (judge.name, judge.revision) == ("owner/name@v1", ctc.name)
    assert "owner/name@abc: 5 MB, downloaded unless it is here" in capsys.readouterr().err
    assert asked[0]["revision"] == "v1" and "*.pth" not in asked[0]["allow_patterns"]

    def unreachable(*_given: Any, **_named: Any) -> str:
        raise OSError("offline")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", unreachable)
    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    with pytest.raises(UserError, match=r"no such folder, and as a Hub repository: offline"):
        load_recogniser("owner/name", "cpu")
    with pytest.raises(UserError, match="no checkpoint here"):
        load_recogniser("no/such/folder", "cpu")


@pytest.mark.fast
def test_of_many_files_only_the_needed_ones_are_fetched(
    ctc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The adapter of the language (MMS has a thousand), and one weight file by its path in a repository."""
    snapshot, remote = tmp_path / "snapshots" / "c0ffee", tmp_path / "remote"
    shutil.copytree(ctc, remote)
    (remote / "sub").mkdir()
    torch.save(state_dict(Sizes()), remote / "sub" / "voice.pth")
    files = [path for path in remote.rglob("*") if path.is_file()]
    siblings = [SimpleNamespace(rfilename=str(path.relative_to(remote)), size=1_000_000) for path in files]
    info = SimpleNamespace(siblings=siblings, sha="c0ffee")
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_given, **_named: info)

    def download(*_given: Any, allow_patterns: list[str], **_named: Any) -> str:
        for path in files:
            name = path.relative_to(remote)
            if any(fnmatch(str(name), pattern) for pattern in allow_patterns):
                (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, snapshot / name)
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    judge = load_recogniser("owner/mms", "cpu")
    assert judge.revision == "c0ffee" and not list(snapshot.rglob("adapter.*"))
    assert judge.transcribe([noise(0.3)], "ara") == ["ب"]
    assert [path.name for path in snapshot.rglob("adapter.*")] == ["adapter.ara.safetensors"]
    assert "owner/mms@c0ffee: 1 MB, downloaded unless it is here" in capsys.readouterr().err
    encoder = load_speaker_encoder("owner/mms/sub/voice.pth", "cpu")
    assert encoder.revision == "c0ffee" and encoder.embed(noise(1.0)).shape == (8,)
