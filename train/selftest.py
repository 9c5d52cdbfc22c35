"""The self-test before the first step: does the untouched model know the next token, or is the signal wrong?

In: the model as it will be trained, real batches. Out: losses at shifts 0, 1 and 2 (a target against the prediction
made at its own position, one before, two before), beside the loss of a uniform guess. Never: a change to the model.

A trained checkpoint predicts one ahead, so shift 1 must be the best. Compared unshifted, labels leak: that was the
bug of public trainers, whose audio loss fell to 0 while the model learned to copy.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..preprocess.checkpoint import load_tokenizer
from ..shards.errors import UserError
from .batch import Batch
from .diagnostics import isolated
from .forward import hidden_states
from .lora import normed
from .loss import IGNORE, head_cross_entropy
from .model import HiggsAudioModel
from .step import Run

SHIFTS = (0, 1, 2)
# nats over the uniform loss that no sensible pairing of checkpoint and data shows; random weights can lie half a nat
# over it, and a single codebook, which has few labels, further
ABOVE_UNIFORM, CODEBOOK_ABOVE_UNIFORM = 1.5, 2.5
KNOWS_SOMETHING = 0.1  # nats under the uniform loss from which on a checkpoint counts as trained
CLEARLY_BETTER = 0.05  # nats by which another shift must beat shift 1


@dataclass(frozen=True)
class Part:
    """Mean losses of text, of all codebooks or of one, at each shift.

    uniform: the loss of a uniform guess. margin: nats above it that are too many.
    """

    name: str
    losses: tuple[float, ...]
    uniform: float
    margin: float = ABOVE_UNIFORM

    def verdict(self) -> str:
        """`right`, `wrong shift`, `above uniform`, `not finite`, or `cannot tell` (nothing learned yet)."""
        if not all(map(math.isfinite, self.losses)):
            return "not finite"
        if self.losses[1] > self.uniform + self.margin:
            return "above uniform"
        if min(self.losses) > self.uniform - KNOWS_SOMETHING:
            return "cannot tell"
        return "wrong shift" if self.losses[1] > min(self.losses) + CLEARLY_BETTER else "right"


@dataclass(frozen=True)
class Report:
    """What the self-test found. eos_labels, segments: over the batches; the first must be 8 times the second."""

    parts: list[Part]
    positions: int
    text_labels: int
    audio_label_rows: int
    eos_labels: int
    segments: int
    codebooks: int
    text: str

    @property
    def problems(self) -> list[str]:
        """What speaks against training."""
        found = [
            f"{part.name}: {part.verdict()}"
            for part in self.parts
            if part.verdict() in ("above uniform", "wrong shift", "not finite")
        ]
        if self.eos_labels != self.segments * self.codebooks:
            found.append(
                f"{self.eos_labels} end-of-stream labels, expected {self.segments} segments x {self.codebooks}"
            )
        return found

    def lines(self) -> list[str]:
        """The report as people read it."""
        head = f"{'self-test':<12}" + "".join(f"{'shift ' + str(shift):>9}" for shift in SHIFTS) + f"{'uniform':>9}"
        rows = [
            f"{part.name:<12}"
            + "".join(f"{loss:>9.3f}" for loss in part.losses)
            + f"{part.uniform:>9.3f}  {part.verdict()}"
            for part in self.parts
        ]
        shares = (
            f"{self.positions} positions: {self.text_labels / max(1, self.positions):.1%} have a text label, "
            f"{self.audio_label_rows / max(1, self.positions):.1%} audio labels; "
            f"{self.eos_labels} end-of-stream labels for {self.segments} segments"
        )
        return [head, *rows, shares, f"first trained text: {self.text}"]

    def to_dict(self) -> dict[str, Any]:
        parts = [asdict(part) | {"losses": [loss if math.isfinite(loss) else None for loss in part.losses]}
                 for part in self.parts]  # fmt: skip
        return asdict(self) | {"parts": parts, "verdicts": {part.name: part.verdict() for part in self.parts}}


def refuse_if_wrong(report: Report) -> None:
    """Raise UserError where the report speaks against training."""
    if report.problems:
        raise UserError(
            f"the training signal looks wrong: {'; '.join(report.problems)}",
            expected="a trained checkpoint that is best at shift 1 and below the uniform loss",
            hint=(
                "Check that the shards were made with this checkpoint's tokenizer and with its codec (provenance in "
                "manifest.json), and that the checkpoint is whole. --skip_alignment_check trains all the same."
            ),
        )


@torch.no_grad()
def shifted_sums(model: HiggsAudioModel, batch: Batch, *, with_text: bool, with_audio: bool) -> torch.Tensor:
    """Sums and counts at every shift: [shifts, 2, 1 + K] (text, then each codebook)."""
    hidden_NH = hidden_states(model, batch)
    text_rows = len(hidden_NH) - batch["codes_KA"].shape[1]
    labels_nK = batch["audio_labels_KL"].t().int()
    found = []
    for shift in SHIFTS:
        text = torch.zeros(2, 1, device=hidden_NH.device)
        audio = torch.zeros(2, labels_nK.shape[1], device=hidden_NH.device)
        if with_text:
            rows = _rows_at(batch, "text_rows", shift)
            text = _sums(model, model.audio_decoder_proj.text_lm_head, hidden_NH, rows, batch["text_labels"][:, None])
        if with_audio:
            rows = _rows_at(batch, "audio_rows", shift)
            inside = labels_nK.where((rows >= text_rows)[:, None], IGNORE)  # a segment's first frame has no two before
            audio = _sums(model, model.audio_decoder_proj.audio_lm_head, hidden_NH, rows, inside)
        found.append(torch.cat([text, audio], dim=1))
    return torch.stack(found)


def _rows_at(batch: Batch, name: str, shift: int) -> torch.Tensor:
    """The rows that stand `shift` positions before the targets of the labels under `name`."""
    positions = batch["to_sorted"][batch[name].long()] + 1 - shift
    return batch["to_sequence"][positions.long()]


def _sums(
    model: HiggsAudioModel, head: torch.nn.Module, hidden_NH: torch.Tensor, rows: torch.Tensor, labels_nK: torch.Tensor
) -> torch.Tensor:
    normed_nH = normed(model.norm, hidden_NH.index_select(0, rows))
    weights = torch.ones(labels_nK.shape[1], device=labels_nK.device)
    _, stats_4K = head_cross_entropy(normed_nH, head, labels_nK, weights)
    return torch.stack([stats_4K[0], (labels_nK >= 0).sum(0).float()])


def run_selftest(run: Run, base: Path) -> Report:
    """Self-test on the first batch of every rank.

    Args:
        base: the base checkpoint, for its tokenizer.

    Raises:
        UserError: the training signal is wrong on some rank, and that is not to be passed over.
    """
    batch = run.loader.peek().to(run.place.device)
    parts = {"with_text": run.loss.with_text, "with_audio": run.loss.with_audio}
    sums = shifted_sums(run.model, batch, **parts)
    tokenizer = load_tokenizer(base, run.special_ids)
    first = batch["text_labels"][batch["to_sorted"][batch["text_rows"].long()] < batch.lengths[0]]
    text = isolated(tokenizer.decode(first.tolist(), skip_special_tokens=False))
    report = make_report(run.place.agree(sums.flatten().tolist()), [batch], run.model, text, **parts)
    wrong_ranks = run.place.agree([float(bool(report.problems))])[0]
    if wrong_ranks and not run.config.skip_alignment_check:
        refuse_if_wrong(report)
        raise UserError("the training signal looks wrong on another rank; see its message")
    return report


def make_report(
    sums: list[float], batches: Iterable[Batch], model: HiggsAudioModel, text: str, *, with_text: bool, with_audio: bool
) -> Report:
    """Name the numbers.

    Args:
        sums: `shifted_sums`, flat, over all batches and ranks.
        batches: this rank's.
        text: the first trained text, decoded.
    """
    codebooks, batches = model.config.audio_num_codebooks, list(batches)
    table = torch.tensor(sums, dtype=torch.float64).view(len(SHIFTS), 2, 1 + codebooks)
    means = table[:, 0] / table[:, 1].clamp(min=1)
    parts = []
    if with_text and table[1, 1, 0]:
        parts.append(Part("text", tuple(means[:, 0].tolist()), math.log(model.vocab_size)))
    if with_audio and table[1, 1, 1:].any():
        uniform = math.log(model.audio_codebook_size)
        parts.append(Part("audio", tuple(means[:, 1:].mean(1).tolist()), uniform))
        for k, losses in enumerate(means[:, 1:].t().tolist()):
            parts.append(Part(f"codebook {k}", tuple(losses), uniform, CODEBOOK_ABOVE_UNIFORM))
    eos, labels = model.config.audio_stream_eos_id, [batch["audio_labels_KL"] for batch in batches]
    return Report(
        parts=parts,
        positions=sum(batch.positions for batch in batches),
        text_labels=sum(len(batch["text_labels"]) for batch in batches),
        audio_label_rows=sum(label.shape[1] for label in labels),
        eos_labels=sum(int((label == eos).sum()) for label in labels),
        segments=sum(batch.trained_segments for batch in batches),
        codebooks=codebooks,
        text=text,
    )
