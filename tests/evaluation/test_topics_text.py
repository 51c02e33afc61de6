"""The prose of Python's help topics: two parts that share no text, the same in every version of Python."""

from __future__ import annotations

import sys

import pytest

from kvq.errors import EvaluationError
from kvq.evaluation.quality.text import load_dataset
from kvq.evaluation.topics_text import leave_out_repeated, part_of, read_topics


def lines_of(part):
    return {" ".join(line.split()) for _, text in read_topics(part) for line in text.splitlines() if len(line) > 60}


def test_the_parts_share_no_text_to_speak_of():
    calibration, report = lines_of("calibration"), lines_of("report")
    assert min(len(calibration), len(report)) > 1000
    assert len(calibration & report) < 0.005 * len(report)


def test_each_part_is_about_half_of_some_hundred_pages():
    sizes = [sum(len(text) for _, text in read_topics(part)) for part in ("calibration", "report")]
    assert all(150_000 < size < 350_000 for size in sizes)
    assert max(sizes) < 1.2 * min(sizes)


def test_no_paragraph_is_read_twice():
    paragraphs = [
        " ".join(paragraph.split())
        for part in ("calibration", "report")
        for _, text in read_topics(part)
        for paragraph in text.split("\n\n")
        if len(paragraph) > 200
    ]
    assert len(paragraphs) > 400
    assert len(paragraphs) - len(set(paragraphs)) <= 3


@pytest.mark.parametrize(
    ("name", "part"), [("compound", "calibration"), ("formatstrings", "calibration"), ("types", "report")]
)
def test_a_topic_stays_in_its_part(name, part):
    """A SHA-256 by hand: `printf compound | sha256sum` begins with an even byte, that of `types` with an odd one."""
    assert part_of(name) == part
    assert name in dict(read_topics(part))


def test_what_stands_in_a_longer_topic_is_left_out():
    whole = "\n\n".join(f"Paragraph {number} of the chapter." for number in range(6))
    section = "   Paragraph 2 of\n   the chapter.\n\n   Paragraph 3 of the chapter.\n"
    half = "Paragraph 4 of the chapter.\n\nSomething else about as long."
    other = "Nothing of it stands elsewhere."
    topics = {"section": section, "half": half, "whole": whole, "other": other}
    assert leave_out_repeated(topics) == {"whole": whole, "half": half, "other": other}


def test_of_two_equal_topics_one_is_kept():
    assert list(leave_out_repeated({"b": "The same.", "a": "The same.", "empty": ""})) == ["a"]


def test_a_dataset_is_cut_from_its_part(word_tokenizer):
    text = load_dataset("topics-report", word_tokenizer, sequences=2, length=50)
    assert text.name == "topics-report"
    assert text.sequences.shape == (2, 50)
    first = next(iter(read_topics("report")))[1]
    assert word_tokenizer.decode(text.sequences[0]) == " ".join(first.split()[:50])


def test_a_python_without_its_topics_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(EvaluationError, match=r"installed without pydoc_data\.topics; give another text"):
        list(read_topics("report"))


@pytest.fixture
def word_tokenizer():
    """A tokenizer that knows each word of the first topics to report on."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = sorted({word for _, text in read_topics("report") for word in text.split()})
    known = {word: number for number, word in enumerate(["<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(known, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
