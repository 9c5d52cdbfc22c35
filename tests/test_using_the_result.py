"""The commands of docs/using_the_result.md and docs/speaking.md, as they stand there; and Boson's own engine."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import pytest
import soundfile
from conftest import EXAMPLES, ROOT
from helpers.boson_codec import boson_tokenizer, save_boson, serving_with
from helpers.doc_commands import commands, run_command
from helpers.hub_server import hub_server
from helpers.samples import random_sample
from helpers.speaking import write_list
from helpers.tiny import ids_of, run_train, write_checkpoint, write_set
from higgs_tune.evaluate.speak.cli import main as higgs_speak
from higgs_tune.evaluate.speak.config import VoiceConfig
from higgs_tune.evaluate.speak.engine import SpeechEngine, Task
from higgs_tune.evaluate.speak.settings import resolve_settings
from higgs_tune.inspect.cli import main as higgs_inspect
from higgs_tune.shards.reader import ShardSet
from higgs_tune.train.export.merge import ExportConfig, export
from higgs_tune.train.export.merge import main as higgs_export
from transformers import HubertConfig, PreTrainedTokenizerBase

PAGES = ("using_the_result.md", "speaking.md")
PROGRAMS: dict[str, Callable[[], Any]] = {
    "higgs-speak": higgs_speak, "higgs-export": higgs_export, "higgs-inspect": higgs_inspect,
}  # fmt: skip
ELSEWHERE = {  # the beginnings of commands that are not run here, and where they are
    "higgs-speak serve": "test_speak_page.py",
    "pip install": "the environment",
    "HIGGS_AUDIO_V2_TOKENIZER_PATH=CODEC_NATIVE vllm-omni serve": "needs a GPU; its loader is run by native/loaders.py",
    "curl http://localhost:8000/v1/audio/speech": "asks vllm-omni",
    "python -m mlx_audio.tts.generate": "fetches its own codec; its loader is run by native/loaders.py",
}
CLIP = EXAMPLES.parent / "clips" / "huda-01.flac"


COMMANDS = [(page, command) for page in PAGES for command in commands(page)]
RUN = [command for _, command in COMMANDS if not command.startswith(tuple(ELSEWHERE))]


@pytest.mark.fast
def test_every_command_is_run_here_or_elsewhere() -> None:
    assert len(RUN) == 13
    assert {shlex.split(command)[0] for command in RUN} == PROGRAMS.keys()
    texts = [command for _, command in COMMANDS]
    assert not [start for start in ELSEWHERE if not any(text.startswith(start) for text in texts)]
    for place in ELSEWHERE.values():
        for name in re.findall(r"[\w/]+\.py", place):
            assert (ROOT / "tests" / name).is_file(), name


@pytest.fixture(scope="module")
def place(
    tmp_path_factory: pytest.TempPathFactory, toy: Path, toy_tokenizer: PreTrainedTokenizerBase, shards: ShardSet
) -> Path:
    """A folder with what the pages name: a run's folder, recordings, sets, the toy checkpoints."""
    folder, rng = tmp_path_factory.mktemp("place"), np.random.default_rng(0)
    (folder / "runs" / "toy").mkdir(parents=True)
    (folder / "runs" / "toy-demo").mkdir()
    links = dict.fromkeys(("SHARDS", "runs/toy-demo/shards"), Path(shards.location)) | {"examples": ROOT / "examples"}
    links |= {"runs/toy/model": toy / "model", "runs/toy/codec": toy / "codec", "CODEC": toy / "codec"}
    for name, target in links.items():
        (folder / name).symlink_to(target)
    write_checkpoint(folder / "base", toy_tokenizer)
    ids = ids_of(folder / "base")
    samples = [random_sample(f"s{i}", rng, toy_tokenizer, ids) for i in range(4)]
    data = write_set(folder / "set", samples, folder / "base")
    run_train("single", folder / "base", data, folder / "OUT2", max_steps=2, learning_rate=0.05)
    wave, rate = soundfile.read(CLIP)
    soundfile.write(folder / "voice.wav", wave, rate)
    lines = [{"id": "a", "text": "مرحبا.", "ref_audio": "voice.wav"}, {"id": "b", "text": "Hello."}]
    write_list(folder / "list.jsonl", lines)
    (folder / "EVAL").mkdir()
    (folder / "EVAL" / "eval.json").write_text(json.dumps({"about": {"lines": 0}}))
    return folder


def run(command: str) -> None:
    """Run a command in this process; speech is short."""
    words = shlex.split(command)
    if words[0] == "higgs-speak" and "--max_seconds" not in words:
        words += ["--max_seconds", "0.6"]
    run_command(words, PROGRAMS)


def test_the_pages_commands_run(
    place: Path, shards: ShardSet, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In order, in one folder; the sample's key and the Hub are stand-ins."""
    monkeypatch.chdir(place)
    with hub_server() as hub:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
        monkeypatch.setenv("HF_TOKEN", hub.token)
        for command in RUN:
            run(command.replace("SHARDS KEY", f"SHARDS {shards.read(0).key}"))
        assert ("owner/name", "model.safetensors") in hub.files
    assert soundfile.info("out.wav").samplerate == 24_000
    assert {path.name for path in Path("SPOKEN").glob("*.wav")} == {"a.wav", "b.wav"}
    made = {"MERGED": "config.json", "NATIVE": "processor_config.json", "ADAPTER": "adapter_config.json"}
    assert all((place / folder / name).is_file() for folder, name in made.items())
    assert "prompt layout chat" in capsys.readouterr().out


def engine_code() -> str:
    """The page's Python code for Boson's engine."""
    section = (ROOT / "docs" / PAGES[0]).read_text().partition("## Boson's engine")[2]
    code = re.search(r"```python\n(.*?)```", section, re.DOTALL)
    assert code
    return code[1]


def test_bosons_engine_speaks_a_merged_model_as_we_do(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The page's code, with Boson's own classes of engine and codec: the same codes under greedy choice."""
    export(ExportConfig(place / "OUT2", out=tmp_path / "MERGED"))
    codec = boson_tokenizer(HubertConfig(num_hidden_layers=2, conv_dim=(32,) * 7, intermediate_size=256), narrow=8)
    save_boson(codec, tmp_path / "CODEC")
    shutil.copy(place / "voice.wav", tmp_path)
    monkeypatch.chdir(tmp_path)
    code = engine_code()
    for told, here in {
        'device="cuda"': 'device="cpu", torch_dtype="float32"',
        "max_new_tokens=1024": "max_new_tokens=24",
        "temperature=0.7": "temperature=0.0, ras_win_len=None",
    }.items():
        assert told in code
        code = code.replace(told, here)
    names: dict[str, Any] = {}
    with serving_with(codec):
        exec(code, names)
    assert soundfile.info("out.wav").samplerate == 24_000
    theirs_KW = names["said"].generated_audio_tokens  # delayed, from the column of BOS on
    options: dict[str, Any] = {"temperature": 0.0, "ras_win_len": 0, "max_seconds": 1.0, "layout": "serve"}
    config = VoiceConfig(model_path=Path("MERGED"), audio_tokenizer_path=Path("CODEC"), **options)
    ours = SpeechEngine(resolve_settings(config), device="cpu", batch_size=1)
    voice = ours.voice("voice.wav", "What voice.wav says.")
    (task,) = ours.speak([Task(["السلام عليكم."], (voice,), 0)])
    frames = min(task.codes[0].shape[1], theirs_KW.shape[1] - 8)
    assert frames > 8
    for k in range(8):
        np.testing.assert_array_equal(task.codes[0][k, :frames], theirs_KW[k, 1 + k : 1 + k + frames])
