"""What people write after --resume_from_checkpoint, and LoRA's options when a run is resumed or continued."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash
from helpers.samples import random_sample
from helpers.tiny import ids_of, metrics_of, run_train, write_checkpoint, write_set
from higgs_tune.train.checkpoint.folder import list_checkpoints
from transformers import PreTrainedTokenizerBase

LORA = {"lora_r": 4, "lora_alpha": 6.0, "lora_dropout": 0.25, "use_rslora": True, "lora_preset": "attention_only"}


class Begun:
    """A model, its set, and a run of four steps with LoRA's options all of its own."""

    def __init__(self, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model, self.out = folder / "model", folder / "begun"
        write_checkpoint(self.model, tokenizer)
        samples = [random_sample("s", np.random.default_rng(0), tokenizer, ids_of(self.model))]
        self.data = write_set(folder / "data", samples, self.model)
        run_train("single", self.model, self.data, self.out, max_steps=4, save_steps=2, **LORA)

    def resume(self, out: Path, **options: object) -> list[dict[str, Any]]:
        """Resume to step 6 in an output folder."""
        return run_train("single", self.model, self.data, out, **{"max_steps": 6, "save_steps": 2, **options})


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory, toy_tokenizer: PreTrainedTokenizerBase) -> Begun:
    return Begun(tmp_path_factory.mktemp("begun"), toy_tokenizer)


@pytest.fixture
def out(begun: Begun, tmp_path: Path) -> Path:
    return Path(shutil.copytree(begun.out, tmp_path / "out"))


def refusal(capsys: pytest.CaptureFixture[str], begun: Begun, out: Path, **options: object) -> str:
    with pytest.raises(SystemExit) as exit_info:
        begun.resume(out, **options)
    assert exit_info.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    return said


def adapter_config(out: Path) -> dict[str, Any]:
    """With the base as a place, since its name is relative to the folder."""
    config = json.loads((out / "adapter_config.json").read_bytes())
    base = (out / config["base_model_name_or_path"]).resolve()
    return config | {"target_modules": sorted(config["target_modules"]), "base_model_name_or_path": base}


def remove_checkpoints(out: Path) -> None:
    for path in list_checkpoints(out):
        shutil.rmtree(path)


@pytest.mark.parametrize("word", ["auto", "True", "true", "latest", "last", "{out}", "{out}/checkpoint-4"])
def test_words_for_the_newest_checkpoint(begun: Begun, out: Path, word: str) -> None:
    """A run's folder too; LoRA's options are the checkpoint's, though none is given again."""
    lines = begun.resume(out, resume_from_checkpoint=word.format(out=out))
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert adapter_config(out) == adapter_config(begun.out)


def test_a_run_s_folder_elsewhere_and_its_newest_valid_checkpoint(
    begun: Begun, out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (out / "checkpoint-4" / "optimizer.safetensors").write_bytes(b"cut")
    lines = begun.resume(tmp_path / "new", resume_from_checkpoint=out)
    assert [line["step"] for line in lines] == [3, 4, 5, 6]
    assert "warning: the checkpoint is damaged" in capsys.readouterr().out
    assert [path.name for path in list_checkpoints(out)] == ["checkpoint-4", "checkpoint-2"]


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("True", "no checkpoint to resume from ({out}), expected a folder checkpoint-STEP, got none"),
        ("latest", "no checkpoint to resume from ({out})"),
        ("{out}", "no checkpoint to resume from ({out})"),
        ("{out}/checkpoint-7", "--resume_from_checkpoint: no such folder ({out}/checkpoint-7)"),
        ("nothing/here", "--resume_from_checkpoint: no such folder (nothing/here)"),
        ("{out}/best-1", "not a checkpoint to resume from ({out}/best-1)"),
        ("{out}/foreign", "a checkpoint of another trainer ({out}/foreign)"),
    ],
)
def test_what_is_no_checkpoint_is_named(
    begun: Begun, out: Path, capsys: pytest.CaptureFixture[str], word: str, message: str
) -> None:
    remove_checkpoints(out)
    (out / "best-1").mkdir()
    state = json.dumps({"version": 1, "step": 1}).encode()
    (out / "best-1" / "state.json").write_bytes(state)
    sums = {"state.json": {"bytes": len(state), "xxh3_128": xxhash.xxh3_128(state).hexdigest()}}
    (out / "best-1" / "checksums.json").write_text(json.dumps(sums))
    (out / "foreign").mkdir()
    (out / "foreign" / "trainer_state.json").write_text("{}")
    said = refusal(capsys, begun, out, resume_from_checkpoint=word.format(out=out))
    assert f"error: {message.format(out=out)}" in said


@pytest.mark.parametrize("word", ["False", "none", "no"])
def test_words_for_no_checkpoint(begun: Begun, tmp_path: Path, capsys: pytest.CaptureFixture[str], word: str) -> None:
    assert [line["step"] for line in begun.resume(tmp_path / "new", resume_from_checkpoint=word, max_steps=1)] == [1]
    assert "from step" not in capsys.readouterr().out


@pytest.mark.fast
def test_a_run_that_is_shorter_than_its_checkpoint_is_refused(
    begun: Begun, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (out / "config.yaml").read_bytes()
    said = refusal(capsys, begun, out, resume_from_checkpoint="auto", max_steps=3)
    assert "the checkpoint is beyond the end of the run" in said
    assert "expected at most 3 steps, got 4" in said
    assert (out / "config.yaml").read_bytes() == before


def test_resume_wins_over_overwriting(begun: Begun, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    both = {"resume_from_checkpoint": "auto", "overwrite_output_dir": True}
    lines = begun.resume(out, **both)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert "--overwrite_output_dir removes nothing: the run resumes from checkpoint-4" in capsys.readouterr().out
    for path in list_checkpoints(out):
        (path / "state.json").unlink()
    assert "no checkpoint of the output folder is valid" in refusal(capsys, begun, out, **both)
    assert len(list_checkpoints(out)) == 3


def test_an_older_checkpoint_is_resumed_elsewhere_only(
    begun: Begun, out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Newer ones in the same folder would be taken by the next `auto`, and counted by --save_total_limit."""
    older = {"resume_from_checkpoint": out / "checkpoint-2"}
    said = refusal(capsys, begun, out, **older)
    assert f"the output folder holds newer checkpoints than checkpoint-2 ({out}), got checkpoint-4" in said
    assert [line["step"] for line in begun.resume(tmp_path / "new", **older)] == [3, 4, 5, 6]


def test_a_damaged_newer_checkpoint_does_not_push_out_valid_ones(begun: Begun, out: Path) -> None:
    (out / "checkpoint-4").rename(out / "checkpoint-50")
    (out / "checkpoint-50" / "state.json").unlink()
    begun.resume(out, resume_from_checkpoint="auto", save_total_limit=1, max_steps=3)
    assert [path.name for path in list_checkpoints(out)] == ["checkpoint-50", "checkpoint-3"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"lora_alpha": 4.0}, "lora.lora_alpha: 6.0 -> 4.0"),
        ({"lora_dropout": 0.0}, "lora.lora_dropout: 0.25 -> 0"),
        ({"use_dora": True}, "lora.use_dora: 0 -> True"),
        ({"lora_r": 8}, "lora.r: 4 -> 8"),
        ({"lora_preset": "text_only"}, "lora.targets: new layers.0.mlp.down_proj"),
        ({"lora_target_modules": r"layers\.0\.self_attn\..*"}, "lora.targets: no longer layers.1.self_attn."),
    ],
)
@pytest.mark.parametrize("old", [False, True])
def test_changed_lora_is_refused_by_name(
    begun: Begun, out: Path, capsys: pytest.CaptureFixture[str], change: dict[str, object], named: str, old: bool
) -> None:
    """Also where the checkpoint is older than LoRA's part of its identity."""
    if old:
        make_old(out)
    said = refusal(capsys, begun, out, resume_from_checkpoint="auto", **change)
    assert "the checkpoint is of another run: " in said
    assert named in said


def make_old(out: Path) -> None:
    """The checkpoints as they were written before."""
    for path in list_checkpoints(out):
        state = json.loads((path / "state.json").read_bytes())
        del state["identity"]["lora"]
        state["options"]["lora_target_modules"] = None
        data = json.dumps(state).encode()
        (path / "state.json").write_bytes(data)
        sums = json.loads((path / "checksums.json").read_bytes())
        sums["state.json"] = {"bytes": len(data), "xxh3_128": xxhash.xxh3_128(data).hexdigest()}
        (path / "checksums.json").write_text(json.dumps(sums))


def test_an_old_checkpoint_resumes(begun: Begun, out: Path) -> None:
    make_old(out)
    begun.resume(out, resume_from_checkpoint="auto")
    assert adapter_config(out) == adapter_config(begun.out)


def test_resume_anyway_changes_the_scaling(begun: Begun, out: Path) -> None:
    begun.resume(out, resume_from_checkpoint="auto", resume_anyway=True, lora_alpha=4.0)
    assert adapter_config(out)["lora_alpha"] == 4.0


@pytest.mark.parametrize("flag", ["lora_r", "lora_alpha", "lora_dropout", "use_rslora"])
def test_a_continued_adapter_keeps_its_own(
    begun: Begun, tmp_path: Path, capsys: pytest.CaptureFixture[str], flag: str
) -> None:
    """Stage 2 without LoRA's options has stage 1's; another value is refused by name."""
    run_train("stage2", begun.out, begun.data, tmp_path / "2")
    new, old = adapter_config(tmp_path / "2"), adapter_config(begun.out)
    assert {name: new[name] for name in ("r", "lora_alpha", "lora_dropout", "use_rslora")} == {
        name: old[name] for name in ("r", "lora_alpha", "lora_dropout", "use_rslora")
    }
    if flag != "use_rslora":
        with pytest.raises(SystemExit):
            run_train("stage2", begun.out, begun.data, tmp_path / "3", **{flag: 0 if flag == "lora_dropout" else 7})
        assert f"error: --{flag} differs from the adapter's" in capsys.readouterr().err
    assert metrics_of(tmp_path / "2")
