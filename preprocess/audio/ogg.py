"""Ogg page by page: the links of a chained stream. libsndfile plays the first link alone.

Page header: RFC 3533, section 6.
"""

from __future__ import annotations

from higgs_tune.preprocess.audio.parts import Data, LengthMismatch, Part

FIRST_PAGE, LAST_PAGE = 2, 4  # flags


def links(data: Data, at: int) -> tuple[list[Part], int]:
    """The links from `at` on, and where their pages end.

    Raises:
        LengthMismatch: the last page of a link is missing, or is not whole.
    """
    begins: list[int] = []
    ended, opening, size, end = True, False, len(data), at
    while (at := data.find(b"OggS", at)) >= 0:
        head = data[at : at + 27 + 255]
        page_end = at + 27 + head[26] + sum(head[27 : 27 + head[26]]) if len(head) > 26 else size + 1
        if head[4:5] > b"\0":  # no page, but bytes that look like one
            at += 4
            continue
        inner = data.find(b"OggS", at + 4) if data[page_end : page_end + 4] != b"OggS" else -1
        if page_end > size or at < inner < page_end:  # cut off, by the end of the file or by the next one
            ended = False
            break
        first = bool(head[5] & FIRST_PAGE)
        if first and not opening:
            _refuse_unended(ended, len(begins))
            begins.append(at)
        opening, ended, end, at = first, bool(head[5] & LAST_PAGE), page_end, page_end
    _refuse_unended(ended and bool(begins), len(begins))
    return [Part(((begin, after),)) for begin, after in zip(begins, [*begins[1:], end], strict=True)], end


def _refuse_unended(ended: bool, links: int) -> None:
    if not ended:
        which = f" number {links}" if links > 1 else ""
        raise LengthMismatch(f"the last page of the Ogg stream{which} is missing")
