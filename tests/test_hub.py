"""Hub names in every command that takes a checkpoint, on a stand-in for the Hub's client that serves local files."""

from __future__ import annotations

import fnmatch
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from conftest import EXAMPLES, preprocess
from helpers.hub_server import hub_server
from helpers.tiny import run_train
from higgs_tune.inspect.checkpoints import Checkpoints
from higgs_tune.preprocess.checkpoints.hub import CONFIG_FILES, PINNED, local_checkpoint, name_of
from higgs_tune.shards.errors import UserError
from higgs_tune.shards.reader import ShardSet
from higgs_tune.train import loop
from higgs_tune.train.model.base import resolve_model
from higgs_tune.train.monitor.samples import codec_path
from huggingface_hub.errors import LocalEntryNotFoundError

MODEL, CODEC = PINNED
WHISPER = "openai/whisper-large-v3"


class Hub:
    """Repositories as folders; keeps the revision and the files that were fetched of each."""

    def __init__(self, folder: Path, repositories: dict[str, Path]) -> None:
        self.folder, self.repositories = folder, repositories
        self.fetched: dict[str, tuple[str | None, set[str]]] = {}

    def snapshot_download(self, name: str, *, revision: str | None, allow_patterns: list[str], **_: Any) -> str:
        if name not in self.repositories:
            raise LocalEntryNotFoundError("Cannot find the requested files")
        snapshot = self.folder / f"models--{name.replace('/', '--')}" / "snapshots" / (revision or "0" * 40)
        snapshot.mkdir(parents=True, exist_ok=True)
        files = {file.name for file in self.repositories[name].iterdir()}
        wanted = {file for file in files if any(fnmatch.fnmatch(file, pattern) for pattern in allow_patterns)}
        for file in wanted:
            shutil.copy(self.repositories[name] / file, snapshot)
        self.fetched[name] = revision, wanted
        return str(snapshot)


@pytest.fixture
def hub(toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    whisper = tmp_path / "whisper"
    whisper.mkdir()
    files = ["config.json", "preprocessor_config.json", "model.safetensors", "model.safetensors.index.fp32.json"]
    files += [f"model.fp32-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for file in (
        *files,
        "pytorch_model.bin",
        "pytorch_model.fp32-00001-of-00002.bin",
        "flax_model.msgpack",
        "README.md",
    ):
        (whisper / file).write_text("{}")
    model = shutil.copytree(toy / "model", tmp_path / "model")
    for file in ("pytorch_model.bin", "model.gguf"):
        (model / file).write_text("")
    made = Hub(tmp_path / "cache", {MODEL: model, CODEC: toy / "codec", WHISPER: whisper})
    monkeypatch.setattr(huggingface_hub, "snapshot_download", made.snapshot_download)
    return made


@pytest.mark.fast
def test_one_copy_of_the_weights_is_fetched(hub: Hub) -> None:
    """Of whisper-large-v3, with two precisions and three formats, the safetensors that are read."""
    local_checkpoint(Path(WHISPER))
    assert hub.fetched[WHISPER][1] == {
        *("config.json", "preprocessor_config.json", "model.safetensors", "model.safetensors.index.fp32.json")
    }
    local_checkpoint(Path(MODEL), CONFIG_FILES)
    assert "model.safetensors" not in hub.fetched[MODEL][1]
    assert {"config.json", "tokenizer.json", "tokenizer_config.json"} <= hub.fetched[MODEL][1]
    local_checkpoint(Path(MODEL))
    assert {"model.safetensors"} == {name for name in hub.fetched[MODEL][1] if Path(name).suffix != ".json"}
    local_checkpoint(Path(f"{CODEC}@v1"))
    assert hub.fetched[CODEC] == ("v1", {"config.json", "model.pth"})


def test_every_command_takes_the_pinned_revision(hub: Hub, shards: ShardSet, tmp_path: Path) -> None:
    """Preprocessing, the trainer's model and codec, the inspector's model and codec."""
    preprocess(tmp_path, EXAMPLES, tmp_path / "out", model_path=Path(MODEL), audio_tokenizer_path=Path(CODEC))
    assert "model.safetensors" not in hub.fetched[MODEL][1]
    asked = {name: revision for name, (revision, _) in hub.fetched.items()}
    assert asked == PINNED
    folders = {name: hub.folder / f"models--{name.replace('/', '--')}" / "snapshots" / PINNED[name] for name in PINNED}
    assert resolve_model(Path(MODEL)) == (folders[MODEL], None)
    assert codec_path(Path(CODEC), [shards]) == folders[CODEC]
    checkpoints = Checkpoints(shards.provenance, Path(MODEL), Path(CODEC))
    assert (checkpoints.model_folder(), checkpoints.codec_folder()) == (folders[MODEL], folders[CODEC])
    assert checkpoints.codec.config.codebooks == 8
    made = ShardSet(tmp_path / "out").provenance
    for kind, name in (("model", MODEL), ("codec", CODEC)):
        assert (made[kind]["name"], made[kind]["revision"]) == (name, PINNED[name])


@pytest.mark.fast
def test_an_adapter_on_the_hub_is_a_model(hub: Hub, tmp_path: Path) -> None:
    """Its tensors and JSON files are fetched, and the base that its config names, at the revision that it names."""
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    config = {"peft_type": "LORA", "base_model_name_or_path": MODEL, "revision": "v7"}
    for name in ("adapter_model.safetensors", "higgs_tune.json", "README.md", "optimizer.safetensors"):
        (adapter / name).write_text("{}")
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    hub.repositories["me/voice"] = adapter
    base, folder = resolve_model(Path("me/voice@v1"))
    assert folder is not None
    assert {file.name for file in folder.iterdir()} == {
        *("adapter_config.json", "adapter_model.safetensors", "higgs_tune.json")
    }
    assert hub.fetched["me/voice"][0] == "v1"
    assert base.name == "v7"
    assert (base / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("codec", "message"),
    [
        ("nobody/nothing", "no such folder, and as a Hub repository: Cannot find"),
        (WHISPER, "not the config of a Higgs audio tokenizer"),
    ],
)
def test_the_trainer_checks_its_codec_before_it_loads_the_model(
    hub: Hub,
    shards: ShardSet,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    codec: str,
    message: str,
) -> None:
    monkeypatch.setattr(loop, "build_run", None)
    with pytest.raises(SystemExit) as end:
        run_train("single", hub.repositories[MODEL], Path(shards.location), tmp_path / "run", sample_steps=1,
                  audio_tokenizer_path=codec)  # fmt: skip
    assert end.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def cached(folder: Path, name: str, revisions: list[str], main: str | None) -> Path:
    """A repository's folder in the Hub's cache."""
    repository = folder / f"models--{name.replace('/', '--')}"
    for revision in revisions:
        (repository / "snapshots" / revision).mkdir(parents=True)
        (repository / "snapshots" / revision / "config.json").write_text("{}")
    if main:
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(main)
    return repository


@pytest.mark.fast
def test_a_repositorys_folder_in_the_cache_stands_for_its_snapshot(tmp_path: Path) -> None:
    two = ["a" * 40, "b" * 40]
    for name, revisions, main, expected in (
        ("me/one", two[:1], None, two[0]),
        ("me/two", two, two[1], two[1]),
        (CODEC, [*two, PINNED[CODEC]], two[1], PINNED[CODEC]),
        ("me/partial", two[:1], two[1], two[0]),
    ):
        folder = cached(tmp_path, name, revisions, main)
        assert local_checkpoint(folder) == folder / "snapshots" / expected
        assert local_checkpoint(folder / "snapshots") == folder / "snapshots" / expected
        assert name_of(folder) == {"name": name, "revision": expected}
        assert local_checkpoint(folder / "snapshots" / expected) == folder / "snapshots" / expected
    with pytest.raises(UserError, match=r"without a main revision .*expected one of its snapshots, got aaaa.*, bbbb"):
        local_checkpoint(cached(tmp_path, "me/many", two, None))
    with pytest.raises(UserError, match=r"this is the cache of the Hub .*got models--"):
        local_checkpoint(tmp_path)


def test_offline_use_and_tokens(tmp_path: Path) -> None:
    """As docs/released_checkpoints.md says, by the Hub's own client and a server that asks for a token."""
    code = (
        "import sys; from pathlib import Path; from higgs_tune.preprocess.checkpoints.hub import local_checkpoint as f;"
    )
    code += "print(f(Path(sys.argv[1])))"

    def ask(name: str, **environment: str) -> subprocess.CompletedProcess[str]:
        plain = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        plain |= {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": url, **environment}
        words = [sys.executable, "-c", code, name]
        return subprocess.run(words, check=False, env=plain, capture_output=True, text=True, timeout=120)

    with hub_server() as hub:
        url = hub.url
        hub.repositories.add("me/voice")
        hub.files |= {("me/voice", "config.json"): b"{}", ("me/voice", "model.safetensors"): b"weights"}
        refused = ask("me/voice")
        assert refused.returncode == 1 and "no such folder, and as a Hub repository" in refused.stderr
        fetched = ask("me/voice", HF_TOKEN=hub.token)
        assert fetched.returncode == 0, fetched.stderr
        folder = Path(fetched.stdout.strip())
        assert (folder / "model.safetensors").read_bytes() == b"weights"
    again = ask("me/voice", HF_HUB_OFFLINE="1")  # the server is gone
    assert Path(again.stdout.strip()) == folder, again.stderr
    assert ask(str(folder), HF_HUB_OFFLINE="1").stdout.strip() == str(folder)
    missing = ask("me/other", HF_HUB_OFFLINE="1")
    assert missing.returncode == 1 and "UserError: no such folder, and as a Hub repository" in missing.stderr
