"""What a stored sample says: the text of its last audio.

In: a sample of a shard set. Out: the text, in any prompt layout.
"""

from __future__ import annotations

from higgs_tune.shards.format import Sample
from higgs_tune.shards.layout import parts_of


def spoken_text(sample: Sample) -> str:
    """The text that a sample's last audio says: the text before it in its turn, else the last text of the turn before.

    The second is the layout in which the answer is audio alone.
    """
    messages = sample.meta["messages"]
    for at in range(len(messages) - 1, -1, -1):
        if any(part["type"] == "audio" for part in parts_of(messages[at])):
            for message in messages[at : at - 2 if at > 1 else None : -1]:
                texts = [part["text"] for part in parts_of(message) if part["type"] == "text" and part["text"].strip()]
                if texts:
                    return texts[-1].strip()
            return ""
    return ""
