"""Diagnostics: predictions beside targets, norms of gradients and updates, and a check of the frozen parameters.

In: the model, a batch, the parameters. Out: one JSON object, and the same as text.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator
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

EDGE_FRAMES = 5  # first and last frames that are shown
MOST_MARKS = 3  # on one letter
_SPECIAL = re.compile(r"<\|\w+\|>")
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
        `key`, `text` and `predicted_text`; `codes` and `predicted_codes` of its first trained clip, without delay: the
        first and last frames of the audio, one list a codebook; `predicted_eos`: the code predicted at each codebook's
        end; `frames` of that clip; `accuracy_per_codebook` over the whole batch.
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
    if options.with_audio and len(batch["audio_rows"]):
        rows, labels_nK = batch["audio_rows"].long(), batch["audio_labels_KL"].t().long()
        predicted_nK = _argmax_per_group(
            model, model.audio_decoder_proj.audio_lm_head, hidden_NH, rows, labels_nK.shape[1]
        )
        labelled = labels_nK >= 0
        right = ((predicted_nK == labels_nK) & labelled).sum(0) / labelled.sum(0).clamp(min=1)
        compared["accuracy_per_codebook"] = right.tolist()
        own = batch["to_sorted"][rows] < first_end
        compared |= _undelayed(labels_nK[own], predicted_nK[own], model.config.audio_stream_eos_id)
    return compared


def _undelayed(labels_nK: torch.Tensor, predicted_nK: torch.Tensor, eos: int) -> dict[str, Any]:
    """The first clip of delayed labels, and the predictions for them: each codebook's labels up to its first EOS."""
    shown: dict[str, Any] = {name: {"first": [], "last": []} for name in ("codes", "predicted_codes")}
    shown |= {"predicted_eos": [], "frames": 0}
    for labels_n, predicted_n in zip(labels_nK.t().tolist(), predicted_nK.t().tolist(), strict=True):
        places = [place for place, label in enumerate(labels_n) if label >= 0]
        end = next((at for at, place in enumerate(places) if labels_n[place] == eos), len(places))
        frames = places[:end]
        for name, codes in (("codes", labels_n), ("predicted_codes", predicted_n)):
            shown[name]["first"].append([codes[place] for place in frames[:EDGE_FRAMES]])
            shown[name]["last"].append([codes[place] for place in frames[-EDGE_FRAMES:]])
        shown["predicted_eos"] += [predicted_n[places[end]]] if end < len(places) else []
        shown["frames"] = len(frames)
    return shown


def _argmax_per_group(
    model: HiggsAudioModel, head: nn.Module, hidden_NH: torch.Tensor, rows: torch.Tensor, groups: int
) -> torch.Tensor:
    """The most likely class of each group at some rows: int64 [n, groups]."""
    normed_nH = normed(model.norm, hidden_NH.index_select(0, rows))
    logits_nC = linear(head, normed_nH)
    return logits_nC.view(len(rows), groups, logits_nC.shape[1] // groups).argmax(-1)  # rows may be none


def isolated(text: str) -> str:
    """Text in Unicode isolates, so that right-to-left script does not reorder what stands around it.

    Special tokens within it are isolated, too. Of marks that pile up on one letter, as an untrained model says them,
    each from the fourth on gets a dotted circle.
    """
    marks, circled = 0, ""
    for character in text:
        marks = marks + 1 if unicodedata.combining(character) else 0
        circled += f"\u25cc{character}" if marks > MOST_MARKS else character
    return "\u2068" + _SPECIAL.sub("\u2066\\g<0>\u2069", circled) + "\u2069"


def format_diagnostics(diagnostics: dict[str, Any], step: int) -> str:
    """Diagnostics as lines of text: one block."""
    source = f", {diagnostics['source']}" if "source" in diagnostics else ""
    lines = [f"step {step}{source}, sample {diagnostics['key']}"]
    for name in ("text", "predicted_text"):
        if name in diagnostics:
            lines.append(f"  {name.replace('_', ' '):<16} {isolated(diagnostics[name])}")
    if "codes" in diagnostics:
        lines += _code_lines(diagnostics)
        accuracy = " ".join(f"{value:.1%}" for value in diagnostics["accuracy_per_codebook"])
        lines.append(f"  accuracy by codebook  {accuracy}")
    for name in ("grad_norm", "update_norm"):
        if name not in diagnostics:
            continue
        values = ", ".join(f"{group} {value:.3g}" for group, value in diagnostics[name].items())
        lines.append(f"  {name.replace('_', ' ')} by group  {values}")
    return "\n".join(lines)


def _code_lines(diagnostics: dict[str, Any]) -> Iterator[str]:
    """Target and predicted codes, a line a codebook: the first and the last frames, and the prediction at the end."""
    targets, predictions = diagnostics["codes"], diagnostics["predicted_codes"]
    width = 5 * max((len(codes) for codes in targets["first"]), default=0)
    heads = [f"{name:<{width}}" for name in ("target", "predicted") * 2]
    yield f"  codes of the first and the last {EDGE_FRAMES} of {diagnostics['frames']} frames, without delay"
    yield f"  codebook  {heads[0]} |{heads[1]}  …  {heads[2]} |{heads[3]}  at the end"
    ends = diagnostics["predicted_eos"] or [""] * len(targets["first"])
    for number, end in enumerate(ends):
        cells = ["".join(f"{code:5d}" for code in codes[side][number])
                 for side in ("first", "last") for codes in (targets, predictions)]  # fmt: skip
        yield f"  {number:8d}  {cells[0]} |{cells[1]}  …  {cells[2]} |{cells[3]}  {end}"


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
