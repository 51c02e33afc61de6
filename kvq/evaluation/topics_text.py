"""English prose that every machine has: the help topics of Python, chapters of its manual, split by topic.

They come with the standard library as `pydoc_data.topics`: some 370,000 to 420,000 characters of long technical prose
with examples, from Python 3.10 to 3.13. Many topics repeat sections of longer ones (`try` is a section of `compound`):
those are left out, since a text to report on must not be known from the one to choose on. A topic belongs to the same
part in every version of Python, as the hash of its name decides; what it says changes somewhat from version to version.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Literal, get_args

from kvq.errors import EvaluationError

TopicsPart = Literal["calibration", "report"]
"""Topics to choose settings on, and topics to report figures on: about half of the text each."""
TOPICS_PARTS: tuple[TopicsPart, ...] = get_args(TopicsPart)

_MODULE = "pydoc_data.topics"
_MOST_REPEATED = 0.5
_BLANK_LINES = re.compile(r"\n\s*\n")


def read_topics(part: TopicsPart, topics: Mapping[str, str] | None = None) -> Iterator[tuple[str, str]]:
    """Yield name and text of each topic of one part, in the order of the names' hashes.

    Args:
        part: the part whose topics are read.
        topics: texts by name; those of the running Python unless given.

    Raises:
        EvaluationError: this Python was installed without its help topics.
    """
    kept = leave_out_repeated(_load_topics() if topics is None else topics)
    for name in sorted(kept, key=_digest):
        if part_of(name) == part:
            yield name, kept[name]


def part_of(name: str) -> TopicsPart:
    """Return the part that a topic belongs to."""
    return TOPICS_PARTS[_digest(name)[0] % 2]


def leave_out_repeated(topics: Mapping[str, str]) -> dict[str, str]:
    """Return the topics of which less than half, in characters, stands in longer ones, paragraph by paragraph."""
    kept: dict[str, str] = {}
    known: set[str] = set()
    for name in sorted(topics, key=lambda name: (-len(topics[name]), name)):
        paragraphs = _split(topics[name])
        repeated = sum(len(paragraph) for paragraph in paragraphs if paragraph in known)
        if repeated < _MOST_REPEATED * sum(map(len, paragraphs)):
            kept[name] = topics[name]
            known.update(paragraphs)
    return kept


def _load_topics() -> Mapping[str, str]:
    try:
        topics: Mapping[str, str] = import_module(_MODULE).topics
    except ImportError as error:
        raise EvaluationError(f"this Python was installed without {_MODULE}; give another text") from error
    return topics


def _split(text: str) -> list[str]:
    """Return the paragraphs of a text, without their indentation, which differs where a section is repeated."""
    found = (" ".join(paragraph.split()) for paragraph in _BLANK_LINES.split(text))
    return [paragraph for paragraph in found if paragraph]


def _digest(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()
