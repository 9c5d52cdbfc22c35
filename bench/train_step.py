"""The training step, side by side with the public one: same weights, samples, LoRA targets and rank, alternating.

    python bench/train_step.py --size small [--pairs 5] [--lengths long | --shards SET] [--kernels triton] [--parts]

(a) public: batches of 2 samples padded by boson's collator, boson's forward, PEFT's layers, the text head at every
position, float32 logits, cross entropy. (b) packed peer: the strongest public technique (`models/packed_peer.py`), the
same samples as packs. (c) ours: the same packs, eager; and by the other `--kernels` that are named here. With --parts,
ours by plain operations under autograd besides: from (b) to it, the order of rows and the last layer's labelled rows
change; from it to (c), the fused layers.

A round runs forward and backward of every side over the same samples and adds up their gradients, each label weighted
by one over the labels of all samples, so loss and gradients must agree. In float32 loss, gradient norm and all
gradients together may differ from the public step's by 1e-3 (relative). In bfloat16 every side is off by its
rounding, so the public step also runs in float32, with the same weights: gradients may be as far from those as the
public step's own in bfloat16 are, and a quarter more; the loss may differ by 1e-2. Where a side is farther, the run
ends with an error after its results are written, and `choice` passes over that side. Batches are made beforehand (a
loader does that), and the optimizer, equal for all, is left out. Useful tokens are positions that are no padding. On
a CPU ours keeps the memory that it frees, as the trainer does; the public step and the peer leave that to the C
library, as a plain script does.
Without a GPU the ratio of CPU time stands beside that of time: other programs on the same cores change it less.
"""

from __future__ import annotations

import copy
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args
from unittest import mock

import torch
import torch.nn.functional as F  # noqa: N812
import tyro
from higgs_tune.shards.errors import UserError
from higgs_tune.shards.format import Arrays
from higgs_tune.shards.memory import keep_memory
from higgs_tune.shards.sequence import SpecialIds
from higgs_tune.train.data.batch import Batch, collate
from higgs_tune.train.metrics import PeakMemory
from higgs_tune.train.model.forward import ExecOptions, label_states
from higgs_tune.train.model.fused_linear import stack_layer
from higgs_tune.train.model.kernel_choice import KernelName, choose_kernels
from higgs_tune.train.model.load import HiggsAudioModel
from higgs_tune.train.model.loss import LossOptions, pack_loss
from higgs_tune.train.model.reference import boson_inputs
from machine import describe_machine, usual_memory
from models.packed_peer import attend_of, peer_step
from models.synthetic import (
    SIZES,
    VOCABULARY,
    SizeName,
    config_of,
    make_model,
    narrow,
    packs_of,
    parameter_count,
    samples_of,
    with_lora,
)
from peft import PeftModel
from torch import nn

LOSS = LossOptions()
TOLERANCES = {"float32": 1e-3, "bfloat16": 1e-2}  # of the loss; in float32, of the gradients too
FARTHER = 1.25  # than the public step in bfloat16 may gradients be from those in float32


@dataclass(frozen=True)
class Options:
    """Training step benchmark."""

    size: SizeName = "small"
    """Size of the model."""
    samples: int = 8
    """Samples in a round."""
    pairs: int = 5
    """Rounds; each runs every side once."""
    tokens_per_pack: int = 8192
    """Positions of a pack at most."""
    vocabulary: int = VOCABULARY
    """Text vocabulary; below the released one, text ids are taken modulo it."""
    public_batch: int = 2
    """Samples in a batch of the public step."""
    lengths: Literal["stated", "long"] = "stated"
    """Lengths of synthetic samples: as `models/synthetic.py` states, or long-form (40 to 80 s in all)."""
    shards: str | None = None
    """Shard set to take samples from, in place of synthetic ones."""
    kernels: tuple[KernelName, ...] = ()
    """Run ours with these --kernels, too: compiled, triton (on a GPU, or with TRITON_INTERPRET=1)."""
    parts: bool = False
    """Run ours by plain operations too."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Of the frozen weights and of what runs; by default bfloat16 on a GPU, float32 without."""
    out: Path | None = None
    """JSON file of the results."""


@dataclass
class Side:
    """One way to run the step: `step` runs forward and backward of one batch and returns its loss, on the device.

    keeps_memory: as the trainer does on a CPU; other programs leave that to the C library.
    """

    name: str
    batches: list[Any]
    step: Callable[[Any], torch.Tensor]
    keeps_memory: bool = True
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    loss: float = 0.0
    grad_norm: float = 0.0
    gradient: torch.Tensor | None = None
    memory_gb: float = 0.0

    def run(self, parameters: Sequence[nn.Parameter], device: torch.device) -> None:
        """One round."""
        for parameter in parameters:
            parameter.grad = None
        if device.type == "cpu":
            (keep_memory if self.keeps_memory else usual_memory)()
        began, cpu_began = time.perf_counter(), time.process_time()
        total = torch.zeros((), device=device)
        for batch in self.batches:
            total += self.step(batch)
        wait(device)
        self.seconds.append(time.perf_counter() - began)
        self.cpu_seconds.append(time.process_time() - cpu_began)
        self.loss = float(total)
        self.gradient = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
        self.grad_norm = float(self.gradient.norm())

    def warm_up(self, parameters: Sequence[nn.Parameter], device: torch.device) -> None:
        """A round that sets things up, and one that measures memory; neither is timed."""
        self.run(parameters, device)
        with PeakMemory(device) as memory:
            self.run(parameters, device)
        self.memory_gb = memory.more_gb
        self.seconds.clear()
        self.cpu_seconds.clear()


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def public_step(model: PeftModel, weights: torch.Tensor, inputs: dict[str, Any]) -> torch.Tensor:
    """What a plain training script does with boson's model, with the right shift of labels.

    On a GPU autocast makes float32 of a sum, so the sum of a frame's embeddings is taken outside of it: boson's forward
    cannot put float32 rows among bfloat16 ones.
    """
    device, base = weights.device, model.get_base_model()
    dtype = base.get_parameter("norm.weight").dtype
    embed: Any = base._embed_audio_ids

    def embed_as_it_is(ids: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device.type, enabled=False):
            return embed(ids)

    autocast = torch.autocast(device.type, dtype=dtype) if dtype != torch.float32 else nullcontext()
    with autocast, mock.patch.object(base, "_embed_audio_ids", embed_as_it_is):
        out = model(**inputs)
        logits = out.logits.float()[:, :-1]
        text = F.cross_entropy(logits.flatten(0, 1), out.expanded_labels[:, 1:].flatten(), reduction="sum")
        loss = text * weights[0]
        audio, labels = out.audio_logits.float(), inputs["label_audio_ids"]
        for k in range(len(labels)):
            loss = loss + F.cross_entropy(audio[:-1, k], labels[k, 1:], reduction="sum") * weights[1 + k]
    loss.backward()
    return loss.detach()


def our_step(model: HiggsAudioModel, weights: torch.Tensor, batch: Batch, exec_options: ExecOptions) -> torch.Tensor:
    states = label_states(model, batch, exec_options)
    loss = pack_loss(model, states, batch, weights, LOSS, at_labels=True).total
    loss.backward()
    return loss.detach()


def make_sides(
    options: Options, peft_model: PeftModel, model: HiggsAudioModel, samples: list[Arrays], ids: SpecialIds
) -> tuple[list[Side], torch.Tensor, int]:
    """Every side, the weights of a label, and the useful tokens of a round."""
    device = next(model.parameters()).device
    packs = [collate(pack, 0.0, ids) for pack in packs_of(samples, options.tokens_per_pack)]
    counts = torch.stack([torch.cat([pack["label_counts"], pack["pairs"]]) for pack in packs]).sum(0)
    assert counts[:-1].min() > 0, "every loss is to be measured"
    weights = LOSS.per_label(counts.float()).to(device)
    padded: list[dict[str, Any]] = []
    for start in range(0, len(samples), options.public_batch):
        pair = samples[start : start + options.public_batch]
        inputs = boson_inputs(pair, ids, model.config.pad_token_id)
        padded.append({k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()})
    batches = [pack.to(device) for pack in packs]
    for layer in model.layers:
        stack_layer(layer)
    sides = [
        Side("public", padded, lambda inputs: public_step(peft_model, weights, inputs), keeps_memory=False),
        Side(
            "packed peer",
            [(batch, attend_of(batch)) for batch in batches],
            lambda packed: peer_step(model, weights, *packed),
            keeps_memory=False,
        ),
        Side("ours", batches, lambda batch: our_step(model, weights, batch, ExecOptions())),
    ]
    ways = {"ours, plain": ExecOptions(plain=True)} if options.parts else {}
    for name in options.kernels:
        try:
            ways[f"ours, {name}"] = ExecOptions(choose_kernels(name, device))
        except UserError as error:
            print(f"left out: {error}")
    for name, way in ways.items():
        sides.append(Side(name, batches, partial(our_step, model, weights, exec_options=way)))
    return sides, weights, sum(pack.positions for pack in packs)


def in_float32(peft_model: PeftModel, weights: torch.Tensor, public: Side, device: torch.device) -> Side:
    """The public step in float32 with the same weights, run once."""
    model = copy.deepcopy(peft_model).float()
    side = Side("public, float32", public.batches, lambda inputs: public_step(model, weights, inputs))
    side.run([parameter for parameter in model.parameters() if parameter.requires_grad], device)
    return Side(side.name, [], torch.sum, loss=side.loss, grad_norm=side.grad_norm, gradient=side.gradient)


def differences(sides: Sequence[Side], exact: Side) -> dict[str, dict[str, float]]:
    """Relative differences of loss, gradient norm and all gradients together from those of `exact`."""
    assert exact.gradient is not None
    found: dict[str, dict[str, float]] = {}
    for side in sides:
        assert side.gradient is not None
        apart = float((side.gradient - exact.gradient).norm()) / exact.grad_norm
        found[side.name] = {"loss": abs(side.loss / exact.loss - 1), "gradients": apart,
                            "grad_norm": abs(side.grad_norm / exact.grad_norm - 1)}  # fmt: skip
    return found


def limits_of(apart: dict[str, dict[str, float]], dtype: str) -> dict[str, float]:
    """What each difference of a side must stay below."""
    tolerance = TOLERANCES[dtype]
    of_gradients = FARTHER * apart["public"]["gradients"] if "public" in apart else tolerance
    return {"loss": tolerance, "gradients": of_gradients, "grad_norm": of_gradients}


def measure(options: Options, device: torch.device) -> Iterator[dict[str, Any]]:
    """Run everything; the results so far after each round, so that a time limit does not lose all of them.

    Raises:
        SystemExit: the public side, the packed peer or ours does not run.
    """
    name = options.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    dtype = getattr(torch, name)
    samples, ids = samples_of(options.samples, options.shards, long=options.lengths == "long")
    if options.vocabulary < VOCABULARY:
        samples, ids = narrow(samples, ids, options.vocabulary)
    model = make_model(config_of(SIZES[options.size], options.vocabulary, ids), device, dtype)
    size = parameter_count(model)
    peft_model = with_lora(model)
    parameters = [parameter for parameter in peft_model.parameters() if parameter.requires_grad]
    sides, weights, useful = make_sides(options, peft_model, model, samples, ids)
    exact = in_float32(peft_model, weights, sides[0], device) if dtype == torch.bfloat16 else None
    if device.type == "cuda":
        torch.cuda.empty_cache()
    failed: dict[str, str] = {}
    for side in sides:
        began = time.perf_counter()
        try:
            side.warm_up(parameters, device)
            print(f"{side.name} is ready after {time.perf_counter() - began:.0f} s", flush=True)
        except RuntimeError as error:  # no compiler, or no memory for this side: the others count all the same
            failed[side.name] = f"{type(error).__name__}: {error}".splitlines()[0]
    if failed.keys() & {"public", "packed peer", "ours"}:
        raise SystemExit(f"a side does not run: {failed}")
    sides = [side for side in sides if side.name not in failed]
    about = {"size": options.size, "parameters": size, "dtype": name, "samples": len(samples),
             "packs": len(sides[2].batches), "vocabulary": options.vocabulary,
             "lengths": options.shards or options.lengths, "failed_sides": failed}  # fmt: skip
    for _ in range(options.pairs):
        for side in sides:
            side.run(parameters, device)
        yield about | result_of(sides, useful, name, exact)


def result_of(sides: Sequence[Side], useful: int, dtype: str, exact: Side | None) -> dict[str, Any]:
    """Rates, ratios and differences of the rounds so far."""
    public, peer = sides[:2]
    apart = differences(sides, exact) if exact else differences(sides[1:], public)
    limits = limits_of(apart, dtype)
    return {
        "pairs": len(public.seconds), "useful_tokens": useful,
        "sides": {side.name: {"seconds": side.seconds, "cpu_seconds": side.cpu_seconds,
                              "loss": side.loss, "grad_norm": side.grad_norm,
                              "peak_memory_gb": side.memory_gb,
                              "tokens_per_second": useful / statistics.median(side.seconds)} for side in sides},
        "ratios": {side.name: ratios(public.seconds, side.seconds) for side in sides[1:]},
        "peer_ratios": {side.name: ratios(peer.seconds, side.seconds) for side in sides[2:]},
        "cpu_ratios": {side.name: ratios(public.cpu_seconds, side.cpu_seconds) for side in sides[1:]},
        "cpu_peer_ratios": {side.name: ratios(peer.cpu_seconds, side.cpu_seconds) for side in sides[2:]},
        "choice": fastest(sides, apart, limits), "relative_differences": apart, "limits": limits,
        "exact": exact.name if exact else public.name,
    }  # fmt: skip


def ratios(theirs: Sequence[float], ours: Sequence[float]) -> list[float]:
    return [a / b for a, b in zip(theirs, ours, strict=True)]


def agrees(apart: dict[str, float], limits: dict[str, float]) -> bool:
    """Whether every difference is below its limit; NaN is not."""
    return all(value < limits[name] for name, value in apart.items())


def fastest(sides: Sequence[Side], apart: dict[str, dict[str, float]], limits: dict[str, float]) -> str | None:
    """The `--kernels` whose median round is shortest, among those of ours that agree with the public step, if any."""
    names = {"eager": "ours"} | {name: f"ours, {name}" for name in get_args(KernelName) if name != "eager"}
    medians = {side.name: statistics.median(side.seconds) for side in sides}
    sound = [name for name, side in names.items() if side in medians and agrees(apart[side], limits)]
    return min(sound, key=lambda name: medians[names[name]], default=None)


def show(result: dict[str, Any]) -> None:
    print(f"{result['size']}: {result['parameters'] / 1e6:,.0f} M parameters, {result['dtype']}, vocabulary "
          f"{result['vocabulary']:,}; {result['samples']} samples ({result['lengths']} lengths), "
          f"{result['useful_tokens']:,} useful tokens in {result['packs']} packs; {result['pairs']} pairs")  # fmt: skip
    print(f"{'':<16}{'tokens/s':>10}{'ratio':>8}{'spread':>16}{'peak GB':>9}{'loss':>12}{'grad norm':>12}")
    for name, side in result["sides"].items():
        found = result["ratios"].get(name, [1.0])
        spread = f"{min(found):.2f} to {max(found):.2f}"
        print(f"{name:<16}{side['tokens_per_second']:>10,.0f}{statistics.median(found):>7.2f}x{spread:>16}"
              f"{side['peak_memory_gb']:>9.2f}{side['loss']:>12.6f}{side['grad_norm']:>12.6f}")  # fmt: skip
    of_cpu = "of CPU time, " if not torch.cuda.is_available() else None
    for key, what, to in (("peer_ratios", "", "the packed peer"), ("cpu_ratios", of_cpu, "the public step"),
                          ("cpu_peer_ratios", of_cpu, "the packed peer")):  # fmt: skip
        for name, found in result[key].items() if what is not None else ():
            print(f"{what}{name} to {to}: {statistics.median(found):.2f}x ({min(found):.2f} to {max(found):.2f})")
    print(f"fastest of ours that agree: --kernels {result['choice']}")
    for name, found in result["relative_differences"].items():
        print(f"{name} from {result['exact']}: loss differs by {found['loss']:.1e}, gradient norm by "
              f"{found['grad_norm']:.1e}, all gradients by {found['gradients']:.1e} (relative)")  # fmt: skip
    for name, error in result["failed_sides"].items():
        print(f"{name} does not run here: {error}")


def main() -> None:
    options = tyro.cli(Options)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    result: dict[str, Any] = {}
    print(describe_machine(), flush=True)
    for found in measure(options, device):
        result = found | {"machine": describe_machine()}
        if options.out:
            options.out.write_text(json.dumps(result, indent=1) + "\n")
    show(result)
    for name, found in result["relative_differences"].items():
        if not agrees(found, result["limits"]):
            raise SystemExit(f"{name} differs from {result['exact']}: {found}, at most {result['limits']}")


if __name__ == "__main__":
    main()
