"""The self-test before the first step: it lets right signals and untrained models through, and stops leaked labels."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.samples import random_sample
from helpers.tiny import ids_of, overfit, run_train, write_checkpoint, write_set
from higgs_tune.shards import sequence
from higgs_tune.train.data.batch import collate
from higgs_tune.train.model import loss
from higgs_tune.train.model.load import load_model
from higgs_tune.train.monitor.selftest import SHIFTS, PartLosses, SelfTestResult, distinct_values, shifted_sums
from transformers import PreTrainedTokenizerBase


class Trained:
    """A checkpoint that knows four samples by heart, and their shard set."""

    def __init__(self, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model, rng = folder / "model", np.random.default_rng(0)
        model = write_checkpoint(self.model, tokenizer)
        self.ids = ids_of(self.model)
        self.samples = [random_sample(f"s{i}", rng, tokenizer, self.ids, frames=(8, 16)) for i in range(4)]
        assert overfit(model, self.samples, self.ids, steps=60) < 6
        model.save_pretrained(self.model)
        self.data = write_set(folder / "data", self.samples, self.model)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, toy_tokenizer: PreTrainedTokenizerBase) -> Trained:
    return Trained(tmp_path_factory.mktemp("trained"), toy_tokenizer)


def refusal(capsys: pytest.CaptureFixture[str], *args: Any, **options: Any) -> str:
    """What the command says when it refuses, which it must, with exit code 2 and before any step."""
    with pytest.raises(SystemExit) as exit_info:
        run_train(*args, **options)
    assert exit_info.value.code == 2
    out: Path = args[3]
    assert not (out / "adapter_model.safetensors").exists()
    assert not (out / "metrics.jsonl").exists()
    said = capsys.readouterr()
    assert "shift 0" in said.out  # the whole table, to see for oneself
    return said.err


def verdicts(out: Path) -> dict[str, str]:
    return json.loads((out / "selftest.json").read_text())["verdicts"]


def test_trained_checkpoint_passes(trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_train("single", trained.model, trained.data, tmp_path)
    result = json.loads((tmp_path / "selftest.json").read_text())
    assert result["verdicts"]["text"] == result["verdicts"]["audio"] == "right"
    assert "wrong shift" not in result["verdicts"].values()
    assert result["eos_labels"] == 8 * result["segments"] == 8 * 4
    labels = sum(int((sample.tokens_2L[1] >= 0).sum()) for sample in trained.samples)
    assert result["text_labels"] == labels - 4  # a placeholder's label is no text label
    said = capsys.readouterr().out
    assert "first trained text" in said
    assert "cannot tell whether" not in said


@pytest.mark.fast
def test_losses_at_shifts_are_a_naive_loop(trained: Trained) -> None:
    """Shift s compares the logits s positions before each labelled token with it, by boson's own forward."""
    from higgs_tune.train.model.reference import boson_inputs

    loaded = load_model(trained.model, device=torch.device("cpu"), dtype=torch.float32).model
    batch = collate(trained.samples, 0.0, trained.ids)
    sums = shifted_sums(loaded, batch, with_text=True, with_audio=True)
    inputs = boson_inputs(trained.samples, trained.ids, loaded.config.pad_token_id)
    with torch.no_grad():
        out = loaded(**inputs)
    starts = [*inputs["audio_out_ids_start"].tolist(), inputs["audio_out_ids"].shape[1]]
    for shift in SHIFTS:
        text, count = 0.0, 0
        for row, labels in enumerate(out.expanded_labels):
            for at in torch.nonzero(labels >= 0).flatten().tolist():
                text -= float(out.logits[row, at - shift].log_softmax(-1)[labels[at]])
                count += 1
        assert sums[shift, :, 0].tolist() == pytest.approx([text, count], rel=1e-4)
        audio, count = 0.0, 0
        for begin, end in itertools.pairwise(starts):
            for at in range(begin + shift, end):
                if (label := int(inputs["label_audio_ids"][3, at])) >= 0:
                    audio -= float(out.audio_logits[at - shift, 3].log_softmax(-1)[label])
                    count += 1
        assert sums[shift, :, 4].tolist() == pytest.approx([audio, count], rel=1e-4)


def test_shards_with_shifted_labels_are_refused(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Labels shifted by whoever made the data: what is trained on then stands where its target does."""
    shifted = []
    for sample in trained.samples:
        inputs, labels = sample.tokens_2L
        is_audio = np.isin(inputs, (trained.ids.audio_in, trained.ids.audio_out))
        moved = np.append(labels[1:], -100)
        moved[is_audio] = labels[is_audio]
        shifted.append(replace(sample, tokens_2L=np.stack([inputs, moved]).astype(np.int32)))
    data = write_set(tmp_path / "data", shifted, trained.model)
    said = refusal(capsys, "stage1", trained.model, data, tmp_path / "out")
    assert "text: wrong shift" in said
    assert "--skip_alignment_check" in said
    run_train("stage1", trained.model, data, tmp_path / "again", skip_alignment_check=True)
    assert verdicts(tmp_path / "again")["text"] == "wrong shift"


def unshifted_expand(make: Callable[..., sequence.Expanded]) -> Callable[..., sequence.Expanded]:
    """Every label at its own target's position, as public trainers have it."""

    def expand(*args: Any, **options: Any) -> sequence.Expanded:
        seen = make(*args, **options)
        return replace(seen, text_label_at=seen.text_label_at + 1, audio_label_at=seen.audio_label_at + 1)

    return expand


def test_unshifted_labels_are_refused(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from higgs_tune.train.data import batch

    monkeypatch.setattr(batch, "expand", unshifted_expand(sequence.expand))
    said = refusal(capsys, "single", trained.model, trained.data, tmp_path)
    assert "text: wrong shift" in said
    assert "audio: wrong shift" in said


@pytest.mark.parametrize("forward", ["packed", "reference"])
@pytest.mark.parametrize("untrained", [False, True])
def test_unshifted_loss_is_refused(
    trained: Trained,
    toy_tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    forward: str,
    untrained: bool,
) -> None:
    """The code that trains is compared with shift 1, so an unshifted loss shows even on an untrained model."""
    from higgs_tune.train.model import pack_model, reference

    model = trained.model
    if untrained:
        model = tmp_path / "model"
        write_checkpoint(model, toy_tokenizer)

    def unshifted_pack_loss(
        model: Any, hidden: torch.Tensor, batch: Any, *rest: Any, at_labels: bool
    ) -> loss.LossParts:
        batch = replace(batch, flat=batch.flat.clone())
        at = batch["to_sorted"][batch["text_rows"].long()] + 1
        batch["text_rows"].copy_(batch["to_sequence"][at.clamp(max=len(hidden) - 1).long()])
        return loss.pack_loss(model, hidden, batch, *rest)

    def unshifted_reference(model: Any, inputs: dict[str, Any], *rest: Any, **options: Any) -> loss.LossParts:
        labels = torch.roll(inputs["label_ids"], 1, 1)
        return reference.reference_loss(model, inputs | {"label_ids": labels}, *rest, **options)

    monkeypatch.setattr(
        pack_model, "label_states", pack_model.hidden_states
    )  # the wrong rows are none of those with a label
    monkeypatch.setattr(pack_model, "pack_loss", unshifted_pack_loss)
    monkeypatch.setattr(pack_model, "reference_loss", unshifted_reference)
    said = refusal(capsys, "single", model, trained.data, tmp_path / "out", forward=forward)
    assert "text: the training loss is" in said
    assert "codebook 0" not in said


@pytest.mark.parametrize("seed", range(6))
def test_untrained_models_go_on(
    seed: int, toy_tokenizer: PreTrainedTokenizerBase, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Random weights on very few labels: chance alone must not refuse them, nor find anything right."""
    model = tmp_path / "model"
    write_checkpoint(model, toy_tokenizer, seed=seed)
    ids, rng = ids_of(model), np.random.default_rng(seed)
    samples = [random_sample(f"s{i}", rng, toy_tokenizer, ids, frames=(3, 12)) for i in range(1 + 3 * (seed % 2))]
    data = write_set(tmp_path / "data", samples, model)
    run_train("single", model, data, tmp_path / "out")
    assert set(verdicts(tmp_path / "out").values()) == {"cannot tell"}
    assert "cannot tell whether the signal is right" in capsys.readouterr().out


def test_dropout_and_reference_labels_do_not_disturb_it(trained: Trained, tmp_path: Path) -> None:
    """Dropout is off within the test; labels of reference audio count as segments."""
    dropout = {"lora_dropout": 0.5}
    run_train("single", trained.model, trained.data, tmp_path / "1", learning_rate=1e-2, max_steps=3, **dropout)
    run_train("stage2", tmp_path / "1", trained.data, tmp_path / "2", train_on_reference=True)
    result = json.loads((tmp_path / "2" / "selftest.json").read_text())
    assert result["eos_labels"] == 8 * result["segments"]
    assert result["segments"] == sum(len(sample.segment_frames) for sample in trained.samples)
    assert result["verdicts"]["text"] == "right"


def test_loss_above_uniform_is_refused(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str], toy_tokenizer: PreTrainedTokenizerBase
) -> None:
    """A trained checkpoint on codes of another codec: sure of itself, and wrong."""
    rng = np.random.default_rng(9)
    foreign = [replace(s, codes_KT=rng.permutation(1024).astype(np.uint16)[s.codes_KT]) for s in trained.samples]
    data = write_set(tmp_path / "data", foreign, trained.model)
    said = refusal(capsys, "single", trained.model, data, tmp_path / "out")
    assert "above uniform" in said
    assert "codec" in said


def test_lost_end_of_stream_is_refused(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from higgs_tune.train.data import batch

    def without_eos(*args: Any, **options: Any) -> sequence.Expanded:
        seen = sequence.expand(*args, **options)
        labels = seen.audio_labels_KB
        labels[0, labels[0] == 1025] = -100
        return seen

    monkeypatch.setattr(batch, "expand", without_eos)
    said = refusal(capsys, "single", trained.model, trained.data, tmp_path)
    assert "28 end-of-stream labels, expected 4 segments x 8" in said


def part(losses: tuple[float, float, float], distinct: int) -> str:
    return PartLosses("text", losses, uniform=11.76, labels=10_000, distinct=distinct).verdict()


@pytest.mark.fast
def test_verdicts_weigh_the_number_of_values() -> None:
    """The signature of a leak is refused on ten values; small differences only where many values back them."""
    assert part((0.05, 9.0, 9.0), 10) == "wrong shift"
    assert part((11.5, 6.0, 10.0), 10) == "right"
    assert part((8.8, 9.0, 10.0), 10) == "cannot tell"
    assert part((8.8, 9.0, 10.0), 10_000) == "wrong shift"
    assert part((11.5, 11.9, 11.9), 100) == "cannot tell"
    assert part((13.5, 13.5, 13.5), 1000) == "above uniform"
    assert part((12.9, 12.9, 12.9), 1000) == "cannot tell"


@pytest.mark.fast
def test_labels_of_one_value_count_once() -> None:
    assert distinct_values(torch.tensor([7] * 500 + [-100] * 20)) == 1
    assert distinct_values(torch.arange(64).repeat(9)) == pytest.approx(64)
    assert distinct_values(torch.tensor([1, 1, 1, 2])) == pytest.approx(16 / 10)
    assert distinct_values(torch.tensor([-100])) == 0


def test_report_names_the_problem() -> None:
    good = PartLosses("text", (9.0, 3.0, 8.0), 11.76, 1000, 1000)
    report = SelfTestResult([good], {"text": 3.0}, 100, 10, 20, 16, 2, 8, "text")
    assert report.problems == []
    assert replace(report, eos_labels=15).problems == ["15 end-of-stream labels, expected 2 segments x 8"]
    assert len(replace(report, training_loss={"text": 9.0}).problems) == 1
