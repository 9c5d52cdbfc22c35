"""Texts of the miniature: spoken numbers, times and dates in English and Arabic, and a few general sentences.

Every sentence comes from a `random.Random` that the caller seeds. Words are spelled out, so a sentence is exactly what
is said; Arabic carries its vowel marks, which espeak-ng needs.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from pathlib import Path
from random import Random

Maker = Callable[[Random], str]


def _words(text: str, separator: str | None = None) -> list[str]:
    return text.split(separator)


ONES = _words(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
)
TENS = _words("twenty thirty forty fifty sixty seventy eighty ninety")
MONTHS = _words("january february march april may june july august september october november december")
DAYS = _words("monday tuesday wednesday thursday friday saturday sunday")
ORDINALS = _words("first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth thirteenth")

UNITS_AR = _words("صِفْر وَاحِد اِثْنَان ثَلَاثَة أَرْبَعَة خَمْسَة سِتَّة سَبْعَة ثَمَانِيَة تِسْعَة عَشَرَة")
TEENS_AR = (
    *("أَحَدَ عَشَر", "اِثْنَا عَشَر", "ثَلَاثَةَ عَشَر", "أَرْبَعَةَ عَشَر", "خَمْسَةَ عَشَر"),
    *("سِتَّةَ عَشَر", "سَبْعَةَ عَشَر", "ثَمَانِيَةَ عَشَر", "تِسْعَةَ عَشَر"),
)
TENS_AR = _words("عِشْرُون ثَلَاثُون أَرْبَعُون خَمْسُون سِتُّون سَبْعُون ثَمَانُون تِسْعُون")
HUNDREDS_AR = (
    *("مِئَة", "مِئَتَان", "ثَلَاثُمِئَة", "أَرْبَعُمِئَة", "خَمْسُمِئَة"),
    *("سِتُّمِئَة", "سَبْعُمِئَة", "ثَمَانِمِئَة", "تِسْعُمِئَة"),
)
MONTHS_AR = _words("يَنَايِر فِبْرَايِر مَارِس أَبْرِيل مَايُو يُونْيُو يُولْيُو أَغُسْطُس سِبْتَمْبِر أُكْتُوبِر نُوفَمْبِر دِيسَمْبِر")
GENERAL_AR = Path(__file__).parents[1] / "arabic" / "sentences.txt"

NOUNS = _words("bridge fish valley joke church thief mother owl choir boys garden ship lawyer beach judge village")
VERBS = _words("found watched threw joined changed pushed heard bought measured sang thanked followed")
PLACES = _words(
    "near the old mill|under a yellow moon|beyond the hedge|with great joy|on a foggy road|in our house", "|"
)


def without_marks(text: str) -> str:
    """Arabic as it is written, without the vowel marks that espeak-ng needs."""
    return "".join(letter for letter in text if not unicodedata.combining(letter))


def arabic_words() -> list[str]:
    """The words of Arabic numbers, as they are and with "and" before them."""
    words = [*UNITS_AR, *dict.fromkeys(word for teen in TEENS_AR for word in teen.split()), *TENS_AR, *HUNDREDS_AR]
    return [spoken for word in words for spoken in (word, f"وَ{word}")]


def english_number(number: int) -> str:
    """A number below 1,000 in words."""
    if number < 20:
        return ONES[number]
    if number < 100:
        tens, ones = divmod(number, 10)
        return TENS[tens - 2] + (f" {ONES[ones]}" if ones else "")
    hundreds, rest = divmod(number, 100)
    return f"{ONES[hundreds]} hundred" + (f" and {english_number(rest)}" if rest else "")


def arabic_number(number: int) -> str:
    """A number below 1,000 in words."""
    if number <= 10:
        return UNITS_AR[number]
    if number < 20:
        return TEENS_AR[number - 11]
    if number < 100:
        tens, ones = divmod(number, 10)
        return (f"{UNITS_AR[ones]} وَ" if ones else "") + TENS_AR[tens - 2]
    hundreds, rest = divmod(number, 100)
    return HUNDREDS_AR[hundreds - 1] + (f" وَ{arabic_number(rest)}" if rest else "")


def _digits(rng: Random) -> str:
    return " ".join(ONES[rng.randrange(10)] for _ in range(rng.randint(3, 6)))


def _numbers(rng: Random) -> str:
    return ", ".join(english_number(rng.randrange(rng.choice((20, 100, 1000)))) for _ in range(rng.randint(1, 3)))


def _time(rng: Random) -> str:
    hour, minute = rng.randint(1, 12), rng.choice((*range(10, 60), 30, 15, 45))
    near = {15: f"quarter past {ONES[hour]}", 30: f"half past {ONES[hour]}", 45: f"quarter to {ONES[hour]}"}
    return near.get(minute, f"{ONES[hour]} {english_number(minute)}")


def _date(rng: Random) -> str:
    return f"{rng.choice(DAYS)}, the {rng.choice(ORDINALS)} of {rng.choice(MONTHS)}"


def _general(rng: Random) -> str:
    first, second = rng.sample(NOUNS, 2)
    return f"the {first} {rng.choice(VERBS)} the {second} {rng.choice(PLACES)}"


def _digits_ar(rng: Random) -> str:
    return " ".join(UNITS_AR[rng.randrange(10)] for _ in range(rng.randint(2, 5)))


def _numbers_ar(rng: Random) -> str:
    return "، ".join(arabic_number(rng.randrange(rng.choice((20, 100, 1000)))) for _ in range(rng.randint(1, 2)))


def _time_ar(rng: Random) -> str:
    return f"السَّاعَة {arabic_number(rng.randint(1, 12))} وَ{arabic_number(rng.randint(1, 59))}"


def _date_ar(rng: Random) -> str:
    return f"{arabic_number(rng.randint(1, 31))} {rng.choice(MONTHS_AR)}"


def _general_ar(rng: Random) -> str:
    return rng.choice(GENERAL_AR.read_text().split("\n")[:-1])


KINDS: dict[str, dict[str, Maker]] = {
    "en": {"digits": _digits, "numbers": _numbers, "time": _time, "date": _date, "general": _general},
    "ar": {"digits": _digits_ar, "numbers": _numbers_ar, "time": _time_ar, "date": _date_ar, "general": _general_ar},
}


def make_sentence(language: str, kinds: tuple[str, ...], rng: Random) -> str:
    """One sentence of `language` (en, ar), of one of `kinds` (digits, numbers, time, date, general)."""
    return KINDS[language][rng.choice(kinds)](rng)
