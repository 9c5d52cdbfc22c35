"""Publishing: the folder that higgs-export writes is ready for the Hub, and reaches it through the Hub's own client."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import huggingface_hub.file_download
import pytest
import yaml
from helpers.hub_server import hub_server
from higgs_tune.preprocess.checkpoints.hub import local_checkpoint
from higgs_tune.preprocess.checkpoints.training_record import RECORD, TrainingRecord
from higgs_tune.shards.errors import UserError
from higgs_tune.train.export.merge import ExportConfig, export
from test_adapters import foreign
from test_export import write_base
from transformers import PreTrainedTokenizerBase


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, toy_tokenizer: PreTrainedTokenizerBase) -> Path:
    return write_base(tmp_path_factory.mktemp("publish") / "base", toy_tokenizer)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    """The folder of a run, as far as the card needs it."""
    folder = tmp_path_factory.mktemp("run")
    foreign(base, folder / "out")
    record = TrainingRecord(stages=("stage1", "stage2"), base_name="base", samples=40, hours=12.5, speakers=4,
                            languages={"ar": 30, "en": 10}, layouts={"chat": 30, "serve": 10})  # fmt: skip
    (folder / "out" / RECORD).write_bytes(record.to_bytes())
    (folder / "out" / "config.yaml").write_text(yaml.safe_dump({"options": {"learning_rate": 2e-4}, "versions": {}}))
    lines = [{"kind": "eval", "step": step, "loss": 9.0 / step, "text_loss": None} for step in (1, 2)]
    (folder / "out" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    figure = {"mean": 0.125, "low": 0.1, "high": 0.15, "n": 40}
    (folder / "eval").mkdir()
    (folder / "eval" / "eval.json").write_text(
        json.dumps(
            {
                "tuned": {"wer": figure, "cer": figure, "sim": None},
                "about": {"lines": 40, "normaliser": {"name": "habibi"}},
            }
        )
    )
    return folder


@pytest.mark.fast
@pytest.mark.parametrize("alone", [False, True])
def test_the_folder_is_ready_to_publish(run: Path, base: Path, tmp_path: Path, alone: bool) -> None:
    """Licence files, record and a card that says base, data, stages, options, figures and how to load."""
    export(ExportConfig(run / "out", out=tmp_path / "out", layout="native", adapter_only=alone, eval_dir=run / "eval"))
    for name in ("LICENSE", "NOTICE.txt"):
        assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes()
    assert (tmp_path / "out" / RECORD).read_bytes() == (run / "out" / RECORD).read_bytes()
    card = (tmp_path / "out" / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["license_name"] == "boson-community"
    assert front["language"] == ["ar", "en"]
    assert front["base_model_relation"] == ("adapter" if alone else "finetune")
    for text in ("| hours | 12.50 |", "Stages: stage1 → stage2", "| learning_rate | 0.0002 |", "| lora_r | 4 |",
                 "| validation, step 2 | 4.5000 |", "| tuned | 0.1250 [0.1000, 0.1500] |",
                 "40 lines, normaliser habibi"):  # fmt: skip
        assert text in card, text
    assert ("PeftModel.from_pretrained" in card) is alone


def test_push_and_download(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through huggingface_hub, to a server that speaks the Hub's interface; what comes back is what was written."""
    with hub_server() as hub:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(
            huggingface_hub.file_download,
            "HUGGINGFACE_CO_URL_TEMPLATE",
            hub.url + "/{repo_id}/resolve/{revision}/{filename}",
        )
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        config: dict[str, Any] = {"adapter": run / "out", "layout": "native", "push_to_hub": "owner/voice"}
        monkeypatch.setenv("HF_TOKEN", "another")
        with pytest.raises(UserError, match="the Hub cannot be used"):
            export(ExportConfig(**config, out=tmp_path / "a"))
        assert not (tmp_path / "a").exists()
        monkeypatch.setenv("HF_TOKEN", hub.token)
        export(ExportConfig(**config, out=tmp_path / "b"))
        written = {file.name: file.read_bytes() for file in (tmp_path / "b").iterdir()}
        assert {path: data for (_, path), data in hub.files.items()} == written
        assert b"owner/voice" in written["README.md"]
        fetched = local_checkpoint(Path("owner/voice"))
        assert {"LICENSE", "config.json", "model.safetensors"} <= {file.name for file in fetched.iterdir()}
        hub.fail = "/commit/"
        with pytest.raises(UserError, match="the upload failed"):
            export(ExportConfig(**config, out=tmp_path / "c"))
        assert {file.name for file in (tmp_path / "c").iterdir()} == written.keys()
