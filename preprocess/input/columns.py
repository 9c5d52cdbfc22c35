"""The columns of manifests under the names that other tools give them, and of lists without a header.

In: column names, or the cells of rows without names. Out: our names (`audio`, `text`, `speaker`, `ref_audio`,
`ref_text`, `id`, `text_file`, `offset`, `duration`, `language`); other columns keep theirs. A column that has our name
already wins; where two others mean the same, the list is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from difflib import SequenceMatcher

from higgs_tune.shards.errors import UserError

SYNONYMS: dict[str, tuple[str, ...]] = {
    "audio": (
        *("audio_file", "audio_path", "audio_filepath", "audio_filename", "audio_url", "audiopath", "file_name"),
        *(
            "filename",
            "file",
            "file_path",
            "filepath",
            "path",
            "wav",
            "wav_path",
            "wav_file",
            "wav_filename",
            "wavpath",
        ),
        *("clip", "clip_path", "vocal_path", "target_audio"),
    ),
    "text": ("transcription", "transcript", "sentence", "transcript_text", "target_text", "utterance"),
    "speaker": ("speaker_id", "speaker_name", "speakerid", "spk", "spk_id", "spk_name", "client_id", "voice"),
    "ref_audio": (
        *("reference_audio", "ref_audio_path", "ref_audio_file", "ref_wav", "ref_path", "ref_audio_filepath"),
        *("prompt_audio", "prompt_wav", "prompt_audio_path", "reference_audio_path"),
    ),
    "ref_text": ("reference_text", "ref_transcript", "ref_transcription", "prompt_text", "prompt_transcript"),
    "text_file": ("transcript_file", "text_path", "transcript_path", "txt", "txt_path"),
    "ref_text_file": ("ref_transcript_file", "ref_text_path", "ref_transcript_path"),
    "id": ("utt_id", "utterance_id", "uttid"),
    "language": ("lang", "locale"),
    "offset": (),
    "duration": (),
}
_OURS = {other: name for name, others in SYNONYMS.items() for other in (name, *others)}
NAMELESS = "index"  # a column without a name, as pandas writes its index
NORMALIZED = re.compile(r"\W+")
ALIKE = 0.6  # similarity of a text and its normalized form
HEADERS = "audio|text, or audio|speaker|text"


def our_names(names: Iterable[str], where: object) -> dict[str, str]:
    """Our name of each column.

    Raises:
        UserError: two columns mean the same, and none of them has our name.
    """
    plain = {name: _plain(name) or NAMELESS for name in names}
    meanings: dict[str, list[str]] = {}
    for name, lowered in plain.items():
        if lowered in _OURS:
            meanings.setdefault(_OURS[lowered], []).append(name)
    chosen: dict[str, str] = {}
    for ours, given in meanings.items():
        exact = [name for name in given if name == ours] or [name for name in given if plain[name] == ours]
        if len(exact or given) > 1:
            hint = f"Name the one to use {ours}."
            raise UserError(f"several columns may be the {ours}", where=where, got=", ".join(given), hint=hint)
        chosen[(exact or given)[0]] = ours
    return {name: chosen.get(name, NAMELESS if not name.strip() else name) for name in plain}


def has_audio(names: Iterable[str]) -> bool:
    """Whether a column has a name for audio, by any tool."""
    return any(_OURS.get(_plain(name)) == "audio" for name in names)


def _plain(name: str) -> str:
    return re.sub(r"[\s-]+", "_", name.strip().lower())


def nameless_columns(rows: Sequence[Sequence[str]], is_audio: Callable[[str], bool], where: object) -> list[str]:
    """Names for the columns of a list without a header, as the tools mean them that write such lists.

    audio|text; LJSpeech's audio|text|normalized text, of which the last is spoken; audio|speaker|text, audio|text|
    speaker, where the contents tell which is which; GPT-SoVITS's and Bert-VITS2's audio|speaker|language|text.

    Raises:
        UserError: the number or the contents of the columns do not tell.
    """
    columns = list(zip(*rows, strict=True))
    refusal = UserError(
        "the columns of this list have no names, and their contents do not tell them",
        where=where,
        got=" | ".join(rows[0])[:120],
        hint=f"Write a header as its first line: {HEADERS}.",
    )
    if len(columns) < 2 or not is_audio(rows[0][0]):
        raise refusal
    roles = _roles(columns[1:])
    if roles is None:
        raise refusal
    return ["audio", *roles]


def _roles(columns: list[tuple[str, ...]]) -> list[str] | None:
    """The names of the columns after the audio; None where they are not clear."""
    spoken = [any(" " in cell.strip() for cell in column) for column in columns]
    if len(columns) == 1:
        return ["text"]
    if len(columns) == 2:
        if _alike(*columns):
            return ["raw_text", "text"]
        return {(True, False): ["text", "speaker"], (False, True): ["speaker", "text"]}.get((spoken[0], spoken[1]))
    language = all(re.fullmatch(r"[A-Za-z]{2,3}([-_]\w{2,4})?", cell.strip()) for cell in columns[1])
    if language and len(columns) in (3, 6) and not spoken[0] and any(map(str.strip, columns[2])):
        return ["speaker", "language", "text", *("phones", "tones", "word2ph")[: len(columns) - 3]]
    return None


def _alike(one: Sequence[str], other: Sequence[str]) -> bool:
    """Whether a column is the normalized form of another: most cells are nearly equal."""
    pairs = list(zip(one, other, strict=True))[:50]
    alike = [_letters(a) == _letters(b) or SequenceMatcher(None, a, b).ratio() > ALIKE for a, b in pairs]
    return sum(alike) > 0.5 * len(alike)


def _letters(text: str) -> str:
    return NORMALIZED.sub("", text).lower()
