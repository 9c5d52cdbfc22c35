"""A look inside, every `--diagnostics_steps`: what is predicted, how large gradients and updates are, what is frozen.

In: the model, one batch, its parameters. Out: one JSON object and a text for people. Never: a change to the model.
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
from higgs_tune.train.model.load import HiggsAudioModel
from higgs_tune.train.model.lora import evaluating, normed
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
    """Which part of the model a parameter belongs to."""
    return next((group for group, pattern in _GROUPS if pattern.search(name)), "other")


def norms_by_group(tensors: dict[str, torch.Tensor]) -> dict[str, float]:
    """The norm of all tensors of each group together."""
    squares: dict[str, torch.Tensor] = {}
    for name, value in tensors.items():
        square = whole(value.detach().float().pow(2).sum())
        squares[group_of(name)] = squares[group_of(name)] + square if group_of(name) in squares else square
    return {group: float(square.sqrt()) for group, square in squares.items()}


class UpdateWatch:
    """Gradient norms and update norms of one optimizer step, by group."""

    def __init__(self, parameters: dict[str, nn.Parameter]) -> None:
        self.parameters = parameters
        self.before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        self.gradients: dict[str, float] = {}

    def see_gradients(self) -> None:
        """Call between backward and the optimizer's step."""
        gradients = {name: p.grad for name, p in self.parameters.items() if p.grad is not None}
        self.gradients = norms_by_group(gradients)

    def norms(self) -> dict[str, dict[str, float]]:
        """Call after the optimizer's step."""
        moved = {name: parameter.detach() - self.before[name] for name, parameter in self.parameters.items()}
        return {"grad_norm": self.gradients, "update_norm": norms_by_group(moved)}


@torch.no_grad()
def look_at_predictions(model: HiggsAudioModel, batch: Batch, tokenizer: Any, options: LossOptions) -> dict[str, Any]:
    """What the model predicts for the batch's first sample, teacher-forced, beside what it should.

    Returns:
        `key`, `text` and `predicted_text`, `codes` and `predicted_codes` (first and last frames that are labelled, one
        list of K a frame), `accuracy_per_codebook` over the whole batch.
    """
    with evaluating(model):
        hidden_NH = hidden_states(model, batch)
    first_end = batch.lengths[0]
    found: dict[str, Any] = {"key": batch.keys[0]}
    if options.with_text:
        rows, labels = batch["text_rows"].long(), batch["text_labels"]
        own = batch["to_sorted"][rows] < first_end
        predicted = _likeliest(model, model.audio_decoder_proj.text_lm_head, hidden_NH, rows[own], 1)[:, 0]
        found["text"], found["predicted_text"] = (
            tokenizer.decode(ids.tolist(), skip_special_tokens=False) for ids in (labels[own], predicted)
        )
    if options.with_audio:
        rows, labels_nK = batch["audio_rows"].long(), batch["audio_labels_KL"].t().long()
        predicted_nK = _likeliest(model, model.audio_decoder_proj.audio_lm_head, hidden_NH, rows, labels_nK.shape[1])
        labelled = labels_nK >= 0
        right = ((predicted_nK == labels_nK) & labelled).sum(0) / labelled.sum(0).clamp(min=1)
        found["accuracy_per_codebook"] = right.tolist()
        own = batch["to_sorted"][rows] < first_end
        edges = (slice(None, EDGE_FRAMES), slice(-EDGE_FRAMES, None))
        for name, codes in (("codes", labels_nK[own]), ("predicted_codes", predicted_nK[own])):
            found[name] = {side: codes[edge].tolist() for side, edge in zip(("first", "last"), edges, strict=True)}
    return found


def _likeliest(
    model: HiggsAudioModel, head: nn.Module, hidden_NH: torch.Tensor, rows: torch.Tensor, groups: int
) -> torch.Tensor:
    """The likeliest class of each group at some rows: int64 [n, groups]."""
    normed_nH = normed(model.norm, hidden_NH.index_select(0, rows))
    weight = head.weight
    assert isinstance(weight, torch.Tensor)
    return (normed_nH @ weight.to(normed_nH.dtype).t()).view(len(rows), groups, -1).argmax(-1)


def isolated(text: str) -> str:
    """Text in Unicode isolates, so that right-to-left script does not reorder what stands around it."""
    return f"\u2068{text}\u2069"


def as_text(found: dict[str, Any], step: int) -> str:
    """Diagnostics as people read them."""
    lines = [f"step {step}, sample {found['key']}"]
    for name in ("text", "predicted_text"):
        if name in found:
            lines.append(f"  {name.replace('_', ' '):<16} {isolated(found[name])}")
    if "codes" in found:
        for side in ("first", "last"):
            for name in ("codes", "predicted_codes"):
                frames = " | ".join(" ".join(_code(code) for code in frame) for frame in found[name][side])
                lines.append(f"  {side} {name.replace('_', ' '):<16} {frames}")
        accuracy = " ".join(f"{value:.1%}" for value in found["accuracy_per_codebook"])
        lines.append(f"  accuracy by codebook  {accuracy}")
    for name in ("grad_norm", "update_norm"):
        values = ", ".join(f"{group} {value:.3g}" for group, value in found.get(name, {}).items())
        lines.append(f"  {name.replace('_', ' ')} by group  {values}")
    return "\n".join(lines)


def _code(code: int) -> str:
    return f"{code:4d}" if code >= 0 else "   ·"


@torch.no_grad()
def fingerprint(parameters: Iterable[tuple[str, nn.Parameter]]) -> dict[str, tuple[str, int]]:
    """Sum of values and version counter of every frozen parameter: what must be the same at every save."""
    return {
        name: (str(float(local(parameter.detach()).sum(dtype=torch.float64))), parameter._version)
        for name, parameter in parameters
        if not parameter.requires_grad
    }


def assert_frozen(model: nn.Module, before: dict[str, tuple[str, int]]) -> None:
    """Raise UserError where a parameter that should be frozen has changed, or trains.

    Raises:
        UserError: names the parameters.
    """
    now = fingerprint(model.named_parameters())
    changed = [name for name, value in before.items() if now.get(name) != value]
    if changed:
        raise UserError(f"frozen parameters have changed: {few(changed, 5)}")
