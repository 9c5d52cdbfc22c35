"""The self-test before the first step: does the untrained run predict the next token, or is the training signal wrong?

In: the model before training, and real batches. Out: losses at shifts 0, 1 and 2, the loss of a uniform guess, and the
loss by the code that trains. At shift s, each target is compared with the prediction made s positions before it.

A trained checkpoint predicts the next token, so shift 1 must be the best. With unshifted labels the targets leak: the
audio loss of public trainers fell to 0 while the model learned to copy its input.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from higgs_tune.preprocess.checkpoints.checkpoint import load_tokenizer
from higgs_tune.shards.errors import UserError
from higgs_tune.train.data.batch import Batch
from higgs_tune.train.model.forward import hidden_states
from higgs_tune.train.model.linear import normed
from higgs_tune.train.model.load import HiggsAudioModel
from higgs_tune.train.model.lora import evaluating
from higgs_tune.train.model.loss import IGNORE, head_cross_entropy
from higgs_tune.train.model.pack_model import PackModel
from higgs_tune.train.monitor.diagnostics import isolated
from higgs_tune.train.state import Run

SHIFTS = (0, 1, 2)
POSITIONS = 8192  # of a rank; a few samples may all be of a language that the checkpoint does not speak
ABOVE_UNIFORM = 1.5  # nats above the uniform loss: checkpoint and data do not belong together
KNOWS_SOMETHING = 0.1  # nats below the uniform loss: the checkpoint counts as trained
CLEARLY_BETTER = 0.05  # nats by which another shift must beat shift 1
CHANCE = 3.0  # nats: a mean over n values strays by less than this / sqrt(n); 3 to 4 deviations with random weights
SAME_LOSS = 0.005  # largest relative difference between the training loss and the loss at shift 1, for rounding


@dataclass(frozen=True)
class PartLosses:
    """Mean losses at each shift, of text, of all codebooks or of one codebook.

    uniform: the loss of a uniform guess. labels: the number of labels of each mean.
    distinct: how many values the labels have, in effect (`distinct_values`): labels of one value err alike.
    """

    name: str
    losses: tuple[float, ...]
    uniform: float
    labels: int
    distinct: float

    def verdict(self) -> str:
        """`right`, `wrong shift`, `above uniform`, `not finite`, or `cannot tell` (nothing learned, or few labels)."""
        if not all(map(math.isfinite, self.losses)):
            return "not finite"
        chance = CHANCE / math.sqrt(max(1, self.distinct))
        if self.losses[1] > self.uniform + ABOVE_UNIFORM + chance:
            return "above uniform"
        if min(self.losses) > self.uniform - KNOWS_SOMETHING - chance:
            return "cannot tell"
        if self.losses[1] > min(self.losses) + CLEARLY_BETTER + chance:
            return "wrong shift"
        return "right" if self.losses[1] == min(self.losses) else "cannot tell"


@dataclass(frozen=True)
class SelfTestResult:
    """Losses and label counts of the self-test.

    training_loss: each part's mean loss by the code that trains, without smoothing; it must equal the loss at shift 1.
    without_features: mean losses by the same code of the same samples without their Whisper features; empty where the
        model takes none.
    eos_labels, segments: over the batches; there must be one end-of-stream label per segment and codebook.
    """

    parts: list[PartLosses]
    training_loss: dict[str, float]
    positions: int
    text_labels: int
    audio_label_rows: int
    eos_labels: int
    segments: int
    codebooks: int
    text: str
    without_features: dict[str, float] = field(default_factory=dict)

    @property
    def problems(self) -> list[str]:
        """The reasons not to train; empty if there are none."""
        problems = [
            f"{part.name}: {part.verdict()}"
            for part in self.parts
            if part.verdict() in ("above uniform", "wrong shift", "not finite")
        ]
        for part in self.parts:
            trained = self.training_loss.get(part.name, part.losses[1])
            if abs(trained - part.losses[1]) > SAME_LOSS * part.losses[1] + 1e-3:
                problems.append(
                    f"{part.name}: the training loss is {trained:.3f}, at shift 1 it is {part.losses[1]:.3f}"
                )
        if self.eos_labels != self.segments * self.codebooks:
            problems.append(
                f"{self.eos_labels} end-of-stream labels, expected {self.segments} segments x {self.codebooks}"
            )
        return problems

    def lines(self) -> list[str]:
        """The result as lines of text."""
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
        knows = {part.verdict() for part in self.parts if part.name in ("text", "audio")}
        unsure = ["the checkpoint looks untrained: the self-test cannot tell whether the signal is right"]
        return [
            head,
            *rows,
            *self._features_line(),
            *unsure * (knows == {"cannot tell"}),
            shares,
            f"first trained text: {self.text}",
        ]

    def _features_line(self) -> list[str]:
        """The losses with and without Whisper features."""
        if not self.without_features:
            return []
        have = {part.name for part in self.parts}
        losses = [(part, *(_part_loss(by_name, part) for by_name in (self.training_loss, self.without_features)))
                  for part in ("text", "audio") if part in have]  # fmt: skip
        told = "; ".join(f"{part} {given:.3f} with them, {without:.3f} without" for part, given, without in losses)
        return [f"Whisper features: {told}"]

    def to_dict(self) -> dict[str, Any]:
        parts = [asdict(part) | {"losses": [loss if math.isfinite(loss) else None for loss in part.losses]}
                 for part in self.parts]  # fmt: skip
        by_name = {
            losses: {name: loss if math.isfinite(loss) else None for name, loss in getattr(self, losses).items()}
            for losses in ("training_loss", "without_features")
        }
        values = asdict(self) | {"parts": parts, **by_name}
        return values | {"verdicts": {part.name: part.verdict() for part in self.parts}}


def _part_loss(by_name: dict[str, float], part: str) -> float:
    """The text loss, or the mean over codebooks."""
    losses = [loss for name, loss in by_name.items() if name == part or (part == "audio" and name != "text")]
    return sum(losses) / len(losses)


def raise_if_wrong(result: SelfTestResult) -> None:
    """Raise UserError if there is a reason not to train."""
    if result.problems:
        raise UserError(
            f"the training signal looks wrong: {'; '.join(result.problems)}",
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
    sums = []
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
        sums.append(torch.cat([text, audio], dim=1))
    return torch.stack(sums)


def _rows_at(batch: Batch, name: str, shift: int) -> torch.Tensor:
    """The rows `shift` positions before the targets of the labels under `name`."""
    positions = batch["to_sorted"][batch[name].long()] + 1 - shift
    return batch["to_sequence"][positions.long().clamp(0, batch.positions - 1)]


def _sums(
    model: HiggsAudioModel, head: torch.nn.Module, hidden_NH: torch.Tensor, rows: torch.Tensor, labels_nK: torch.Tensor
) -> torch.Tensor:
    normed_nH = normed(model.norm, hidden_NH.index_select(0, rows))
    weights = torch.ones(labels_nK.shape[1], device=labels_nK.device)
    _, stats_5K = head_cross_entropy(normed_nH, head, labels_nK, weights)
    return torch.stack([stats_5K[0], (labels_nK >= 0).sum(0).float()])


def run_selftest(run: Run, base: Path) -> SelfTestResult:
    """Run the self-test on every rank's first batches: about `POSITIONS` positions, at most one epoch.

    Args:
        base: the base checkpoint, for its tokenizer.
    """
    parts = {"with_text": run.loss_options.with_text, "with_audio": run.loss_options.with_audio}
    in_epoch = run.schedule.steps(run.schedule.plan(0)) * run.schedule.accumulation
    count = min(-(-POSITIONS // run.schedule.tokens_per_pack), in_epoch)
    batches = list(run.loader.peek(count))
    sums, bare = list[torch.Tensor](), list[torch.Tensor]()
    with evaluating(run.model):
        for batch in (each.to(run.context.device) for each in batches):
            with torch.no_grad():
                shifted = run.probe(batch, partial(shifted_sums, **parts))
            sums.append(torch.cat([shifted.flatten(), training_sums(run, batch)]))
        if run.schedule.features != "none":
            peeked = run.loader.peek(count, features="none")
            bare = [training_sums(run, each.to(run.context.device)) for each in peeked]
    total = run.context.all_sum(torch.stack(sums).sum(0).tolist())
    without = run.context.all_sum(torch.stack(bare).sum(0).tolist()) if bare else []
    tokenizer, first = load_tokenizer(base, run.special_ids), batches[0]
    labels = first["text_labels"][first["to_sorted"][first["text_rows"].long()] < first.lengths[0]]
    text = isolated(tokenizer.decode(labels.tolist(), skip_special_tokens=False))
    return make_result(total, batches, run.model, text, without, **parts)


@torch.no_grad()
def training_sums(run: Run, batch: Batch) -> torch.Tensor:
    """Sums of the losses by the code that trains: [1 + K] (text, then each codebook)."""
    options = replace(run.loss_options, smoothing=0.0, contrastive=0.0)
    weights = torch.ones(2 + run.codebooks, device=run.context.device)
    return run.probe(batch, lambda model, batch: PackModel(model, (), options)(batch, weights).sums.cross_entropy)


def distinct_values(labels: torch.Tensor) -> float:
    """1 / sum of squared shares of each value: the number of values if all are equally frequent; 0 without any."""
    counts = torch.unique(labels[labels >= 0], return_counts=True)[1].double()
    return float(counts.sum() ** 2 / (counts**2).sum()) if len(counts) else 0.0


def make_result(
    sums: list[float],
    batches: Sequence[Batch],
    model: HiggsAudioModel,
    text: str,
    without_features: Sequence[float] = (),
    *,
    with_text: bool,
    with_audio: bool,
) -> SelfTestResult:
    """Make the result from the summed losses.

    Args:
        sums: flat `shifted_sums`, then `training_sums`, over all batches and ranks.
        without_features: `training_sums` of the same samples without Whisper features, if they have any.
        batches: the batches of this rank.
        text: the first trained text, decoded.
    """
    codebooks = model.config.audio_num_codebooks
    audio_KL = torch.cat([batch["audio_labels_KL"] for batch in batches], dim=1)
    distinct_K = [distinct_values(labels) for labels in audio_KL]
    every = torch.tensor(sums, dtype=torch.float64)
    table = every[: -1 - codebooks].view(len(SHIFTS), 2, 1 + codebooks)
    means, counts = table[:, 0] / table[:, 1].clamp(min=1), table[1, 1].int().tolist()
    names = ["text", *(f"codebook {k}" for k in range(codebooks))]
    parts = []
    if with_text and counts[0]:
        distinct = distinct_values(torch.cat([batch["text_labels"] for batch in batches]))
        parts.append(PartLosses("text", tuple(means[:, 0].tolist()), math.log(model.vocab_size), counts[0], distinct))
    if with_audio and any(counts[1:]):
        uniform = math.log(model.audio_codebook_size)
        mean = tuple(means[:, 1:].mean(1).tolist())
        parts.append(PartLosses("audio", mean, uniform, sum(counts[1:]), sum(distinct_K)))
        rows = zip(names[1:], means[:, 1:].t().tolist(), counts[1:], distinct_K, strict=True)
        parts += [PartLosses(name, tuple(losses), uniform, count, distinct) for name, losses, count, distinct in rows]
    labels_1K = table[1, 1].clamp(min=1)
    training = every[-1 - codebooks :] / labels_1K
    bare = torch.tensor(without_features, dtype=torch.float64) / labels_1K if without_features else torch.zeros(0)
    return SelfTestResult(
        parts=parts,
        training_loss=dict(zip(names, training.tolist(), strict=True)),
        without_features=dict(zip(names, bare.tolist(), strict=False)),
        positions=sum(batch.positions for batch in batches),
        text_labels=sum(len(batch["text_labels"]) for batch in batches),
        audio_label_rows=audio_KL.shape[1],
        eos_labels=int((audio_KL == model.config.audio_stream_eos_id).sum()),
        segments=sum(batch.trained_segments for batch in batches),
        codebooks=codebooks,
        text=text,
    )
