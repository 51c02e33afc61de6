"""Facts hidden in a text: where they stand, and scores of the answers against a forward over everything."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from kvq import KVQ
from kvq.errors import EvaluationError
from kvq.evaluation.quality.needle import DEPTHS, ask_all, build_task
from kvq.evaluation.quality.prefix import Prefix
from kvq.evaluation.quality.run import evaluate

LENGTH = 400


class Letters:
    """A tokenizer of one token a letter."""

    def __len__(self):
        return 1000

    def __call__(self, text, **_):
        return {"input_ids": [ord(letter) for letter in text]}

    def decode(self, tokens):
        return "".join(map(chr, tokens))


@pytest.fixture(scope="module")
def task(loaded):
    return build_task(loaded[1], torch.zeros(1, 1), length=LENGTH, per_depth=3)


def test_records_stand_at_their_depths(task):
    for depth, questions, place in zip(DEPTHS, task.questions, task.answers, strict=True):
        for context, question in zip(task.contexts.tolist(), questions.tolist(), strict=True):
            record = question[1:]  # name, answer, full stop
            where = next(start for start in range(len(context)) if context[start : start + len(record)] == record)
            assert where / len(context) == pytest.approx(depth, abs=0.05)
            assert question[place] == record[1:5]
    total = task.contexts.shape[1] + sum(questions.shape[1] for questions in task.questions)
    assert LENGTH - 6 < total <= LENGTH


def test_sentences_stand_at_their_depths_and_their_digits_are_the_key():
    filler = torch.full((2, 3000), ord("x"))
    task = build_task(Letters(), filler, length=1500, per_depth=4)
    assert task.contexts.shape[0] == 4
    total = task.contexts.shape[1] + sum(questions.shape[1] for questions in task.questions)
    assert total == 1500
    texts = ["".join(map(chr, row)) for row in task.contexts.tolist()]
    cities = set()
    for depth, questions, place, keys in zip(DEPTHS, task.questions, task.answers, task.keys, strict=True):
        for text, question, key in zip(texts, questions.tolist(), keys.tolist(), strict=True):
            sentence = "".join(map(chr, question))
            assert text.index(sentence) / len(text) == pytest.approx(depth, abs=0.1)
            cities.add(sentence.split()[4])
            answer = "".join(map(chr, question[place]))
            assert 10000 <= int(answer) <= 99999
            assert answer[0] == " "
            assert key == [False, *[True] * 5]
    assert len(cities) == len(DEPTHS)
    with pytest.raises(EvaluationError, match="leave no room"):
        build_task(Letters(), filler, length=400, per_depth=1)


def test_scores_are_those_of_one_forward_over_everything(loaded, task):
    model, rows = loaded[0], slice(1, 3)
    cache = Prefix(model, task.contexts[rows]).cache
    found = list(ask_all(model, task, rows, cache))
    everything = torch.cat([task.contexts[rows], *(questions[rows] for questions in task.questions)], dim=1)
    with torch.inference_mode():
        likely = model(everything).logits.double().log_softmax(-1).numpy()
    assert cache.get_seq_length() == everything.shape[1]
    start = task.contexts.shape[1]
    for place, depth in enumerate(DEPTHS):
        for row in range(2):
            positions = np.arange(start + 2, start + 6)  # behind the question mark and the name: four words
            answer = everything[row, positions].numpy()
            chosen = likely[row, positions - 1]
            score = found[place][row]
            assert score.depth == depth
            assert score.log_probability == pytest.approx(chosen[np.arange(4), answer].sum(), abs=1e-3)
            right = chosen.argmax(-1) == answer
            assert (score.exact, score.right, score.tokens) == (right.all(), right.sum(), 4)
        start += task.questions[place].shape[1]


def test_the_recall_model_finds_its_needles_and_loses_them_with_a_bit(loaded, task):
    def ask(build):
        prefix, cache = Prefix(loaded[0], task.contexts), build()
        prefix.give_to(cache)
        return [score for scores in ask_all(loaded[0], task, slice(0, 3), cache) for score in scores]

    plain = ask(DynamicCache)
    broken = ask(lambda: KVQ(nbits_k=1, nbits_v=1, backend="native", residual_length=0))
    assert sum(score.exact for score in plain) >= len(plain) - 1
    assert sum(score.exact for score in broken) < len(plain) / 2
    assert sum(score.log_probability for score in broken) < 3 * sum(score.log_probability for score in plain) - 10


def test_a_run_asks_everything_once_whatever_the_batches(make_plan, task):
    fields = {"two": {"nbits_v": 2, "residual_length": 16}}
    records = [evaluate(make_plan(fields, needles=task, batch_size=size))[0] for size in (2, 5)]
    for record in records:
        assert set(record.needle_by_depth) == {f"{depth:g}" for depth in DEPTHS}
        assert sum(record.needle_by_depth.values()) == pytest.approx(5 * record.needle)
        assert record.reference_needle_log_probability > -0.1
    assert records[0].needle_tokens == records[1].needle_tokens
    likely = [record.needle_log_probability.mean for record in records]
    assert likely[0] == pytest.approx(likely[1], rel=1e-2)
