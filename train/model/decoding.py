"""Batched generation with a static key/value cache, over the same layers as training.

In: requests, each a prompt (a `Sample` up to where generation begins). Out: the number and result of each, as it ends.
Guarantees: under greedy choice the same tokens as boson's `generate`; a request's result does not depend on the batch
it runs in: on a CPU its logits are the same bit by bit, on a GPU up to rounding (test_decoding.py).

All running sequences take one step together. A sequence that ends leaves its slot of the cache, the last one moves into
it, and a waiting request joins. Prompts are packed like training samples (`data/batch.py`), and each layer is
`forward.decoder_layer`; only its attention differs: keys and values go to the cache and come from it.

The rules of a step are those of boson-multimodal 0.1.1 (`HiggsAudioModel._sample`): codebook k starts k steps after
codebook 0; when a codebook samples the end of stream, all before it end too, and the others follow one a step.

Shapes: B running sequences, K codebooks, V classes, h heads, g heads of a group that share one of k key heads, L cached
positions, D head size, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from higgs_tune.shards.format import Sample
from higgs_tune.shards.sequence import SpecialIds, expand, segment_positions
from higgs_tune.train.data.batch import collate
from higgs_tune.train.model.embed import embed_audio, embed_text, embed_tokens
from higgs_tune.train.model.forward import (
    ExecOptions,
    PackContext,
    Span,
    decoder_layer,
    kernels_of,
    make_context,
)
from higgs_tune.train.model.kv_cache import KeyValueCache
from higgs_tune.train.model.linear import linear, normed
from higgs_tune.train.model.load import HiggsAudioModel
from higgs_tune.train.model.sampling import Request, Said, Sampling, said

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Span], torch.Tensor]


@dataclass
class _Sequence:
    """A request while it runs.

    next_token: the text token of the next position, or None for an audio position; then `columns[-1]` stands there.
    columns: [K] each, all audio positions since generation began, with delay. earlier: columns of the prompt's last
    output segment, for repetition-aware sampling. started: codebooks that have begun. ending: steps until the last
    codebook ends; None while no codebook has.
    """

    number: int
    request: Request
    generator: torch.Generator
    earlier: list[np.ndarray]
    next_token: int | None
    tokens: list[int] = field(default_factory=list)
    columns: list[np.ndarray] = field(default_factory=list)
    first_audio: list[np.ndarray] | None = None
    started: int = 0
    ending: int | None = None
    audio_positions: int = 0
    done: bool = False

    def take_token(self, token: int) -> None:
        self.tokens.append(token)
        self.next_token = token

    def close_audio(self) -> None:
        """The audio has ended; the next one begins anew."""
        self.first_audio = self.first_audio or self.columns
        self.earlier, self.columns = self.columns, []
        self.started, self.ending = 0, None


@torch.no_grad()
def generate_batch(
    model: HiggsAudioModel,
    requests: Sequence[Request],
    ids: SpecialIds,
    sampling: Sampling,
    *,
    batch_size: int = 16,
    features: str = "none",
) -> Iterator[tuple[int, Said]]:
    """Generate all requests; gives each one's number and result as it ends.

    Args:
        model: boson's model, perhaps with adapters inside; in evaluation mode.
        batch_size: sequences that run at once.
        features: Whisper features of the prompts that the model takes.
    """
    if requests:
        yield from _Decoder(model, requests, ids, sampling, batch_size, features).run()


class _Decoder:
    def __init__(
        self,
        model: HiggsAudioModel,
        requests: Sequence[Request],
        ids: SpecialIds,
        sampling: Sampling,
        batch_size: int,
        features: str,
    ) -> None:
        self.model, self.ids, self.sampling, self.features = model, ids, sampling, features
        self.warpers = sampling.warpers()
        self.waiting = list(enumerate(requests))[::-1]
        self.running: list[_Sequence] = []
        self.slots = min(batch_size, len(requests))
        capacity = max(self._capacity(request) for request in requests)
        self.cache = KeyValueCache(self.slots, capacity)
        weight = model.embed_tokens.weight
        assert isinstance(weight, torch.Tensor)
        self.device = weight.device
        # on a CPU nothing depends on the batch: products (`linear`), attention (`KeyValueCache`) and prompts (`_join`)
        self.exact = self.device.type == "cpu"
        self.kernels = kernels_of(ExecOptions(plain=self.exact))
        # positions held by each slot: of all rows, of text rows, of audio rows
        self.held = {kind: np.zeros(self.slots, np.int64) for kind in ("every", "text", "audio")}

    def _capacity(self, request: Request) -> int:
        batch = collate([request.prompt], 0.0, self.ids, features=self.features)
        return batch.positions + self._limit(request)

    def _limit(self, request: Request) -> int:
        return segment_positions(request.max_frames, self.ids.codebooks) + request.max_tokens

    def run(self) -> Iterator[tuple[int, Said]]:
        while self.waiting or self.running:
            while self.waiting and len(self.running) < self.slots:
                self._join()
            self._step()
            for slot in reversed(range(len(self.running))):
                if self.running[slot].done:
                    yield self._leave(slot)

    def _join(self) -> None:
        """Run waiting prompts that fit, packed together, into free slots; where results are exact, one by one."""
        free = range(len(self.running), self.slots)[: 1 if self.exact else None]
        joining = [self.waiting.pop() for _ in free if self.waiting]
        batch = collate([request.prompt for _, request in joining], 0.0, self.ids, features=self.features)
        batch = batch.to(self.device)
        slots = list(free)[: len(joining)]
        hidden_NH = torch.cat([embed_text(self.model, batch), embed_audio(self.model, batch["codes_KA"])])
        kernels = replace(self.kernels, attend=self._attend_prompts(slots))
        hidden_NH = self._layers(hidden_NH, make_context(self.model, batch, hidden_NH, kernels))
        lengths = {"every": batch.lengths, "text": batch.text_lengths, "audio": batch.audio_lengths}
        for kind, held in self.held.items():
            held[slots] = lengths[kind]
        ends = np.cumsum(batch.lengths) - 1
        last = batch["to_sequence"][torch.from_numpy(ends).to(self.device)]
        states_BH = hidden_NH.index_select(0, last)
        fresh = [self._sequence(number, request) for number, request in joining]
        self.running += fresh
        self._choose(fresh, states_BH)

    def _sequence(self, number: int, request: Request) -> _Sequence:
        generator = torch.Generator().manual_seed(request.seed)
        last_token = int(request.prompt.tokens_2L[0, -1])
        return _Sequence(number, request, generator, self._last_output(request.prompt), last_token)

    def _last_output(self, prompt: Sample) -> list[np.ndarray]:
        """Columns of the prompt's last output segment, as many as repetition-aware sampling looks at."""
        if not self.sampling.ras_window:
            return []
        expanded = expand([prompt], self.ids)
        ends = np.cumsum(expanded.segment_width)
        outputs = np.flatnonzero(expanded.segment_is_out)
        if not len(outputs):
            return []
        end, width = ends[outputs[-1]], expanded.segment_width[outputs[-1]]
        return list(expanded.codes_KA[:, max(end - self.sampling.ras_window, end - width) : end].T)

    def _layers(self, hidden_NH: torch.Tensor, context: PackContext) -> torch.Tensor:
        self.cache.begin()
        for layer in self.model.layers:
            hidden_NH = decoder_layer(layer, hidden_NH, context)
        return hidden_NH

    def _attend_prompts(self, slots: list[int]) -> Attend:
        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, span: Span) -> torch.Tensor:
            self.cache.store(k, v, span.lengths, slots)
            return self.kernels.attend(q, k, v, span)

        return attend

    def _step(self) -> None:
        """Run one position of every sequence, and choose the next."""
        is_text = np.array([sequence.next_token is not None for sequence in self.running])
        order = np.concatenate([np.flatnonzero(is_text), np.flatnonzero(~is_text)])  # sorted row -> slot
        text, audio = order[: is_text.sum()], order[is_text.sum() :]
        tokens = [self.running[slot].next_token or 0 for slot in text]
        columns = [self.running[slot].columns[-1] for slot in audio]
        codes_KB = np.stack(columns, 1) if columns else np.zeros((self.ids.codebooks, 0), np.int64)
        hidden_BH = torch.cat([
            embed_tokens(self.model, self._tensor(np.array(tokens, np.int64))),
            embed_audio(self.model, self._tensor(codes_KB)),
        ])  # fmt: skip
        context = self._context(hidden_BH, order, text, audio)
        hidden_BH = self._layers(hidden_BH, context)
        for kind, slots in (("every", order), ("text", text), ("audio", audio)):
            self.held[kind][slots] += 1
        assert context.every.to_sequence is not None
        self._choose(self.running, hidden_BH.index_select(0, context.every.to_sequence))

    def _context(self, hidden_BH: torch.Tensor, order: np.ndarray, text: np.ndarray, audio: np.ndarray) -> PackContext:
        """One row of each sequence; in sequence order they stand by slot."""
        positions = self._tensor(self.held["every"][order])
        cos, sin = (table[0] for table in self.model.rotary_emb(hidden_BH, positions[None]))
        rows = len(text)
        spans = {
            "every": Span(cos, sin, [1] * len(order), positions, self._tensor(np.argsort(order)), self._tensor(order)),
            "text": Span(cos[:rows], sin[:rows], [1] * rows, positions),
            "audio": Span(cos[rows:], sin[rows:], [1] * len(audio), positions),
        }
        every = np.arange(len(order))
        slots = {kind: self._tensor(rows) for kind, rows in (("every", every), ("text", text), ("audio", audio))}
        held = {kind: self._tensor(self.held[kind])[slots[kind]] for kind in spans}
        kind_of = {id(span): kind for kind, span in spans.items()}

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, span: Span) -> torch.Tensor:
            kind = kind_of[id(span)]
            return self.cache.attend(q, k, v, slots[kind], held[kind])

        return PackContext(text_rows=rows, **spans, kernels=replace(self.kernels, attend=attend))

    def _tensor(self, values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values).to(self.device)

    def _choose(self, sequences: Sequence[_Sequence], states_BH: torch.Tensor) -> None:
        """From the last states of sequences, what stands at their next positions."""
        normed_BH = normed(self.model.norm, states_BH)
        opening = self.model.audio_out_bos_token_id
        in_audio = [i for i, sequence in enumerate(sequences) if sequence.next_token is None]
        opened = [i for i, sequence in enumerate(sequences) if sequence.next_token == opening]
        in_text = [i for i, sequence in enumerate(sequences) if sequence.next_token not in (None, opening)]
        heads = self.model.audio_decoder_proj
        if in_audio:
            logits_BKV = linear(heads.audio_lm_head, normed_BH[in_audio]).float()
            logits_BKV = logits_BKV.unflatten(1, (self.ids.codebooks, -1)).cpu()
            for i, codes_K in zip(
                in_audio, self._draw_codes([sequences[i] for i in in_audio], logits_BKV), strict=True
            ):
                self._take_column(sequences[i], codes_K)
        if in_text:
            logits_BV = linear(heads.text_lm_head, normed_BH[in_text]).float().cpu()
            logits_BV[:, [self.ids.audio_in, self.ids.audio_out]] = -torch.inf  # placeholders are set by the loop alone
            for i, token in zip(in_text, self._draw([sequences[i] for i in in_text], logits_BV[:, None]), strict=True):
                sequences[i].take_token(int(token[0]))
        for i in opened:
            self._open_audio(sequences[i])
        for sequence in sequences:
            self._stop(sequence)

    def _draw(self, sequences: Sequence[_Sequence], logits_BKV: torch.Tensor) -> np.ndarray:
        """A class for each row of logits, by each sequence's own generator: int64 [B, K]."""
        scores = self.warpers(None, logits_BKV.flatten(0, 1))  # pyright: ignore[reportArgumentType]
        if not self.sampling.temperature:
            return scores.argmax(-1).view(logits_BKV.shape[:2]).numpy()
        return _inverse_cdf(scores.view_as(logits_BKV), sequences)

    def _draw_codes(self, sequences: Sequence[_Sequence], logits_BKV: torch.Tensor) -> np.ndarray:
        """Codes of the next frame, with repetition-aware sampling: int64 [B, K]."""
        codes_BK = self._draw(sequences, logits_BKV)
        window = self.sampling.ras_window
        if window is None:
            return codes_BK
        for sequence, codes_K, logits_KV in zip(sequences, codes_BK, logits_BKV, strict=True):
            recent_WK = np.stack([*sequence.earlier, *sequence.columns][-window:])
            repeated = np.flatnonzero((recent_WK == codes_K).sum(0) >= self.sampling.ras_repeats)
            if len(repeated):
                codes_K[repeated] = _inverse_cdf(logits_KV[None, repeated], [sequence])[0]
        return codes_BK

    def _take_column(self, sequence: _Sequence, codes_K: np.ndarray) -> None:
        """Apply the delay pattern to a frame's codes, and append it; boson's `_sample_audio_tokens`."""
        codebooks, eos = self.ids.codebooks, self.ids.stream_eos
        if sequence.started + 1 < codebooks:
            codes_K[sequence.started + 1 :] = self.ids.stream_bos
            sequence.started += 1
        if sequence.ending is not None:
            codes_K[: codebooks - sequence.ending] = eos
            sequence.ending -= 1
        elif len(ends := np.flatnonzero(codes_K == eos)):
            codes_K[: ends[0]] = eos
            sequence.ending = codebooks - int(ends[0]) - 1
        sequence.columns.append(codes_K)
        if sequence.ending is not None and sequence.ending <= 0:  # boson goes on with text; this column is not fed
            sequence.close_audio()
            sequence.take_token(self.model.config.audio_eos_token_id)
        else:
            sequence.audio_positions += 1

    def _open_audio(self, sequence: _Sequence) -> None:
        sequence.columns.append(np.full(self.ids.codebooks, self.ids.stream_bos, np.int64))
        sequence.tokens.append(self.ids.audio_out)
        sequence.next_token, sequence.audio_positions = None, sequence.audio_positions + 1

    def _stop(self, sequence: _Sequence) -> None:
        positions = len(sequence.tokens) + sequence.audio_positions - sequence.tokens.count(self.ids.audio_out)
        ended = bool(sequence.tokens) and sequence.tokens[-1] == sequence.request.stop_token
        sequence.done = ended or positions >= self._limit(sequence.request)

    def _leave(self, slot: int) -> tuple[int, Said]:
        """Take a sequence out; the last one moves into its slot."""
        sequence, last = self.running[slot], self.running.pop()
        if last is not sequence:
            self.running[slot] = last
            self.cache.move(len(self.running), slot)
            for held in self.held.values():
                held[slot] = held[len(self.running)]
        return sequence.number, said(sequence.tokens, sequence.first_audio or sequence.columns or None, self.ids)


def _inverse_cdf(scores_BKV: torch.Tensor, sequences: Sequence[_Sequence]) -> np.ndarray:
    """Draw from softmax(scores) by one uniform number a row, of each sequence's generator: int64 [B, K]."""
    uniform_BK = torch.stack([
        torch.rand(scores_BKV.shape[1], generator=sequence.generator, dtype=torch.float64) for sequence in sequences
    ])  # fmt: skip
    cumulative_BKV = scores_BKV.double().softmax(-1).cumsum(-1)
    drawn = torch.searchsorted(cumulative_BKV, (uniform_BK * cumulative_BKV[..., -1])[..., None], right=True)
    return drawn[..., 0].clamp(max=scores_BKV.shape[-1] - 1).numpy()
