"""Words of the sentences that `bench/prepare_truth.py` lets synthesisers say."""

from __future__ import annotations

from random import Random


def _parts(text: str) -> list[str]:
    return text.split("|")


SUBJECTS = _parts(
    "the captain|my older sister|a quiet farmer|the new teacher|our neighbour|the young doctor|an honest "
    "lawyer|the tired driver|the village baker|a famous painter|the night watchman|her little brother|the head "
    "gardener|one of the sailors"
)
VERBS = _parts(
    "carried|repaired|forgot|painted|sold|borrowed|discovered|described|returned|collected|measured|photographed|dropped|hid"
)
OBJECTS = _parts(
    "a wooden box|the broken window|seven silver coins|an old letter|the garden gate|a basket of apples|the blue "
    "bicycle|a map of the river|the kitchen table|a heavy suitcase|the morning paper|two warm blankets|a bottle "
    "of milk"
)
PLACES = _parts(
    "behind the station|near the harbour|in the middle of the forest|on top of the hill|at the end of the "
    "street|under the stone bridge|beside the church|inside the empty barn|across the frozen lake|outside the "
    "city hall"
)
TIMES = _parts(
    "before the sun came up|after a long winter|during the summer holidays|on a rainy Thursday|late in the "
    "evening|when the bells were ringing|while everybody was asleep|without saying a word|for the second time "
    "this year"
)
GERMAN = _parts(
    "Am Abend gehen wir gemeinsam durch den alten Garten hinter dem Haus.|Der Zug nach München fährt heute leider"
    " nicht.|Meine Schwester hat gestern ein neues Fahrrad gekauft.|Im Winter liegt hier oft sehr viel Schnee auf"
    " den Bergen.|Niemand wusste, wohin der Schlüssel verschwunden war.|Die Kinder spielen jeden Nachmittag am "
    "großen Fluss."
)


def make_sentence(rng: Random, said: set[str]) -> str:
    """A sentence that was not said yet."""
    while True:
        words = [rng.choice(part) for part in (SUBJECTS, VERBS, OBJECTS, PLACES)]
        if rng.random() < 0.6:
            words.insert(rng.choice((0, 4)), rng.choice(TIMES))
        text = " ".join(words)
        if text not in said:
            said.add(text)
            return f"{text[0].upper()}{text[1:]}."
