"""Diagnostics: predictions beside targets, norms of gradients and updates, and a check of the frozen parameters.

In: the model, a batch, the parameters. Out: one JSON object, and the same as text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
from higgs_tune.shards.errors import UserError, few
from higgs_tune.train.data.batch import Batch
from higgs_tune.train.model.forward import hidden_states
from higgs_tune.train.model.fsdp import local, whole
from higgs_tune.train.model.linear import linear, normed
from higgs_tune.train.model.load import HiggsAudioModel
from higgs_tune.train.model.lora import evaluating
from higgs_tune.train.model.loss import LossOptions
from torch import nn

EDGE_FRAMES = 4  # first and last frames that are shown
_GROUPS = (
    ("text attention", re.compile(r"\.self_attn\.")),
    ("audio attention", re.compile(r"\.audio_attn|audio_post_audio_attn_layer_norm")),
    ("audio FFN", re.compile(r"\.audio_mlp\.")),
    ("text FFN", re.compile(r"\.mlp\.")),
    ("heads", re.compile(r"lm_head")),
)


def group_of(name: str) -> str:
    """The part of the model that a parameter belongs to."""
    return next((group for group, pattern in _GROUPS if pattern.search(name)), "other")


def norms_by_group(tensors: dict[str, torch.Tensor]) -> dict[str, float]:
    """Norm over all tensors of each group."""
    squares: dict[str, torch.Tensor] = {}
    for name, value in tensors.items():
        square = whole(value.detach().float().pow(2).sum())
        squares[group_of(name)] = squares[group_of(name)] + square if group_of(name) in squares else square
    return {group: float(square.sqrt()) for group, square in squares.items()}


class UpdateNorms:
    """Gradient norms and update norms of one optimizer step, by group."""

    def __init__(self, parameters: dict[str, nn.Parameter]) -> None:
        self.parameters = parameters
        self.before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        self.gradients: dict[str, float] = {}

    def record_gradients(self) -> None:
        """Call between backward and the optimizer's step."""
        gradients = {name: p.grad for name, p in self.parameters.items() if p.grad is not None}
        self.gradients = norms_by_group(gradients)

    def norms(self) -> dict[str, dict[str, float]]:
        """Call after the optimizer's step."""
        moved = {name: parameter.detach() - self.before[name] for name, parameter in self.parameters.items()}
        return {"grad_norm": self.gradients, "update_norm": norms_by_group(moved)}


@torch.no_grad()
def compare_predictions(model: HiggsAudioModel, batch: Batch, tokenizer: Any, options: LossOptions) -> dict[str, Any]:
    """Teacher-forced predictions for the batch's first sample, beside its targets.

    Returns:
        `key`, `text` and `predicted_text`, `codes` and `predicted_codes` (the first and last labelled frames, one list
        of K a frame), `accuracy_per_codebook` over the whole batch.
    """
    with evaluating(model):
        hidden_NH = hidden_states(model, batch)
    first_end = batch.lengths[0]
    compared: dict[str, Any] = {"key": batch.keys[0]}
    if options.with_text:
        rows, labels = batch["text_rows"].long(), batch["text_labels"]
        own = batch["to_sorted"][rows] < first_end
        predicted = _argmax_per_group(model, model.audio_decoder_proj.text_lm_head, hidden_NH, rows[own], 1)[:, 0]
        compared["text"], compared["predicted_text"] = (
            tokenizer.decode(ids.tolist(), skip_special_tokens=False) for ids in (labels[own], predicted)
        )
    if options.with_audio:
        rows, labels_nK = batch["audio_rows"].long(), batch["audio_labels_KL"].t().long()
        predicted_nK = _argmax_per_group(
            model, model.audio_decoder_proj.audio_lm_head, hidden_NH, rows, labels_nK.shape[1]
        )
        labelled = labels_nK >= 0
        right = ((predicted_nK == labels_nK) & labelled).sum(0) / labelled.sum(0).clamp(min=1)
        compared["accuracy_per_codebook"] = right.tolist()
        own = batch["to_sorted"][rows] < first_end
        edges = (slice(None, EDGE_FRAMES), slice(-EDGE_FRAMES, None))
        for name, codes in (("codes", labels_nK[own]), ("predicted_codes", predicted_nK[own])):
            compared[name] = {side: codes[edge].tolist() for side, edge in zip(("first", "last"), edges, strict=True)}
    return compared


def _argmax_per_group(
    model: HiggsAudioModel, head: nn.Module, hidden_NH: torch.Tensor, rows: torch.Tensor, groups: int
) -> torch.Tensor:
    """The most likely class of each group at some rows: int64 [n, groups]."""
    normed_nH = normed(model.norm, hidden_NH.index_select(0, rows))
    return linear(head, normed_nH).view(len(rows), groups, -1).argmax(-1)


def isolated(text: str) -> str:
    """Text in Unicode isolates, so that right-to-left script does not reorder the text around it."""
    return f"\u2068{text}\u2069"


def format_diagnostics(diagnostics: dict[str, Any], step: int) -> str:
    """Diagnostics as lines of text."""
    lines = [f"step {step}, sample {diagnostics['key']}"]
    for name in ("text", "predicted_text"):
        if name in diagnostics:
            lines.append(f"  {name.replace('_', ' '):<16} {isolated(diagnostics[name])}")
    if "codes" in diagnostics:
        for side in ("first", "last"):
            for name in ("codes", "predicted_codes"):
                frames = " | ".join(" ".join(_code(code) for code in frame) for frame in diagnostics[name][side])
                lines.append(f"  {side} {name.replace('_', ' '):<16} {frames}")
        accuracy = " ".join(f"{value:.1%}" for value in diagnostics["accuracy_per_codebook"])
        lines.append(f"  accuracy by codebook  {accuracy}")
    for name in ("grad_norm", "update_norm"):
        values = ", ".join(f"{group} {value:.3g}" for group, value in diagnostics.get(name, {}).items())
        lines.append(f"  {name.replace('_', ' ')} by group  {values}")
    return "\n".join(lines)


def _code(code: int) -> str:
    return f"{code:4d}" if code >= 0 else "   ·"


@torch.no_grad()
def fingerprint(parameters: Iterable[tuple[str, nn.Parameter]]) -> dict[str, tuple[str, int]]:
    """Sum of values and version counter of every frozen parameter; both stay the same while it is frozen."""
    return {
        name: (str(float(local(parameter.detach()).sum(dtype=torch.float64))), parameter._version)
        for name, parameter in parameters
        if not parameter.requires_grad
    }


def assert_frozen(model: nn.Module, before: dict[str, tuple[str, int]]) -> None:
    """Check that the frozen parameters have not changed and do not train.

    Raises:
        UserError: names the parameters.
    """
    now = fingerprint(model.named_parameters())
    changed = [name for name, value in before.items() if now.get(name) != value]
    if changed:
        raise UserError(f"frozen parameters have changed: {few(changed, 5)}")
