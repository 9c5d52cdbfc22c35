"""One sample on the terminal: its messages, and its sequence as a table.

In: a sample of a set. Out: text on stdout. Texts are wrapped in Unicode isolates, which keep right-to-left text within
its cell.

Guarantees: control characters from the data never reach the terminal (tests/test_inspect.py).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable

from higgs_tune.inspect.checkpoints import Checkpoints
from higgs_tune.inspect.packing import Packed
from higgs_tune.inspect.view import Position, facts, positions, printable, segments_of, turns_of, visible
from higgs_tune.shards.errors import UserError
from higgs_tune.shards.format import Sample
from higgs_tune.shards.layout import layout_of
from higgs_tune.shards.reader import ShardSet
from higgs_tune.shards.sequence import SpecialIds
from rich.console import Console
from rich.table import Table
from rich.text import Text

ISOLATE, END_ISOLATE = "\u2068", "\u2069"  # first strong isolate: the text's own direction decides
STYLES = {"text": "", "whisper": "magenta", "audio_in": "cyan", "audio_out": "green"}
NO_LABEL = "·"
WHO_SENDS = {
    "serve": "Boson's engine and transformers' processor send it; vllm-omni 0.30 with <|audio_out_bos|> and "
    "<|audio_eos|> of a reference twice; mlx-audio without the system turn",
    "chat": "higgs-speak sends it to models trained on it; no stock engine does",
    "other": "no engine sends it",
}
WIDE = 250  # characters; the widest table needs less


def isolated(text: str) -> str:
    """A text whose direction does not reach its neighbours; unchanged where the output has no Unicode."""
    unicode = (sys.stdout.encoding or "utf-8").lower().startswith("utf")
    return f"{ISOLATE}{text}{END_ISOLATE}" if unicode else text


def open_console(width: int | None = None) -> Console:
    """A console for texts, as wide as the terminal; in a file, or for tables of numbers, WIDE: no number is cut."""
    width = width if sys.stdout.isatty() else WIDE
    return Console(width=width, height=width and 25)  # rich takes a width on a dumb terminal only with a height


def print_header(console: Console, sample: Sample, shards: ShardSet, row: int) -> None:
    """Print key, index row, messages and segments."""
    console.print(Text(f"{sample.key}  row {row}", "bold"))
    known = facts(sample, shards.index[row])
    shown = (f"{name} {isolated(printable(str(value)))}" for name, value in known.items() if value is not None)
    console.print(Text("  ".join(shown)))
    segments = segments_of(sample, shards.special_ids)
    for turn in turns_of(sample):
        console.print(Text(f"{turn.role}{' (trained)' if turn.trained else ''}", "bold"))
        for part in turn.parts:
            shown = isolated(printable(part)) if isinstance(part, str) else f"[audio {printable(segments[part].label)}]"
            console.print(Text(f"  {shown}"), soft_wrap=True)


def print_sequence(console: Console, sample: Sample, shards: ShardSet, checkpoints: Checkpoints) -> None:
    """Print every position of the expanded sequence; a label stands at the position of the token that it names."""
    ids = shards.special_ids
    console.print(Text("label: id supervised at this position and predicted by the position before; ·: none"))
    rows = positions(sample, ids, shards.features)
    _print_table(("position",), (((str(row.number),), row) for row in rows), checkpoints, ids)


def print_prompt(console: Console, sample: Sample, shards: ShardSet, checkpoints: Checkpoints) -> None:
    """Print what is sent to speak the sample's text: every position up to the one that predicts its first frame.

    Raises:
        UserError: the sample ends without audio, so nothing is spoken.
    """
    ids, rows = shards.special_ids, list(positions(sample, shards.special_ids, shards.features))
    spoken = [row.modality == "audio_out" for row in rows]
    if not any(spoken):
        raise UserError("the sample has no audio of the assistant, so there is no prompt", where=sample.key)
    start = next(n for n in reversed(range(len(rows))) if spoken[n] and not (n and spoken[n - 1]))
    layout = layout_of(sample.meta["messages"])
    console.print(Text(f"prompt layout {layout}: {WHO_SENDS[layout]}"))
    console.print(Text(f"{start} positions; the next one is the column of stream starts, then frames are generated"))
    unlabelled = (Position(r.number, r.modality, r.token, r.codes, None, None) for r in rows[:start])
    _print_table(("position",), (((str(row.number),), row) for row in unlabelled), checkpoints, ids)


def _print_table(
    numbers: tuple[str, ...],
    rows: Iterable[tuple[tuple[str, ...], Position]],
    checkpoints: Checkpoints,
    ids: SpecialIds,
) -> None:
    books = range(ids.codebooks)
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    for name in ("modality", "id", "token", "label", *(f"c{k}" for k in books), *(f"l{k}" for k in books)):
        table.add_column(name, justify="left" if name in ("modality", "token") else "right", no_wrap=True)
    for own, position in rows:
        cells = (*own, *_cells(position, checkpoints, ids.codebooks))
        table.add_row(*(Text(cell) for cell in cells), style=STYLES[position.modality])
    open_console(WIDE).print(table)


def _cells(position: Position, checkpoints: Checkpoints, codebooks: int) -> tuple[str, ...]:
    codes = [str(code) for code in position.codes or ()] or [""] * codebooks
    audio_labels = [str(label) if label >= 0 else NO_LABEL for label in position.audio_labels or ()]
    token = "" if position.token is None else str(position.token)
    text = isolated(visible(checkpoints.token_text(position.token))) if position.token is not None else ""
    label = (NO_LABEL if token else "") if position.text_label is None else str(position.text_label)
    return (position.modality, token, text, label, *codes, *(audio_labels or [""] * codebooks))


def print_raw(console: Console, sample: Sample, shards: ShardSet, row: int) -> None:
    """Print the stored values: location, metadata, tokens, labels, raw codes of each segment, features."""
    entry = shards.index[row]
    place = f"{shards.manifest['shards'][int(entry['shard'])]['name']}, bytes {entry['offset']} to "
    console.print(Text(f"{sample.key}  {place}{entry['offset'] + entry['length']}, xxh3 {int(entry['xxh3']):016x}"))
    console.print(Text(printable(json.dumps(sample.meta, ensure_ascii=False, indent=1))), soft_wrap=True)
    for name, values in zip(("input_ids", "label_ids"), sample.tokens_2L, strict=True):
        console.print(
            Text(f"{name} {values.dtype}[{len(values)}]\n{' '.join(map(str, values.tolist()))}"), soft_wrap=True
        )
    for segment in segments_of(sample, shards.special_ids):
        shape = ", ".join(map(str, segment.codes_KT.shape))
        console.print(Text(f"codes of segment {printable(segment.label)} {segment.codes_KT.dtype}[{shape}]"))
        for codes in segment.codes_KT.tolist():
            console.print(Text(" ".join(f"{code:4d}" for code in codes)), soft_wrap=True)
    for number, mel in enumerate(sample.mels):
        low, high = (float(mel.min()), float(mel.max())) if mel.size else (0.0, 0.0)
        console.print(Text(f"features {number} {mel.dtype}{list(mel.shape)}, {low:.3f} to {high:.3f}"))


def print_as_trained(
    console: Console, sample: Sample, shards: ShardSet, checkpoints: Checkpoints, packed: Packed
) -> None:
    """Print the sample's place in its pack, its neighbours, and its sequence with labels as in the loss."""
    fill = f"{packed.length} of {packed.tokens_per_pack} positions, fill {packed.length / packed.tokens_per_pack:.1%}"
    console.print(Text(f"pack {packed.pack} of {packed.packs}: {fill}"))
    homes = {neighbour.location for neighbour in packed.neighbours}
    for neighbour in packed.neighbours:
        home = f"  {neighbour.location}" if len(homes) > 1 else ""
        console.print(Text(f"{'>' if neighbour.is_sample else ' '} {neighbour.start:>7}  {neighbour.key}{home}"))
    start = next(neighbour.start for neighbour in packed.neighbours if neighbour.is_sample)
    console.print(Text("position: in the sample, as used by the rotary embedding; attention stays within the sample"))
    console.print(Text("label: the token of the next position, which this position is trained to predict; ·: none"))
    rows = list(positions(sample, shards.special_ids, packed.features))
    numbered = (((str(start + p.number), str(p.number)), p) for p in shifted(rows))
    _print_table(("in pack", "position"), numbered, checkpoints, shards.special_ids)


def shifted(rows: list[Position]) -> Iterable[Position]:
    """The positions, each with the labels of the next one."""
    for row, following in zip(rows, [*rows[1:], None], strict=True):
        text = following.text_label if following else None
        audio = following.audio_labels if following else None
        yield Position(row.number, row.modality, row.token, row.codes, text, audio)
