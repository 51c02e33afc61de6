"""Tasks say what they seem to say, and their scores are those of one forward over everything."""

from __future__ import annotations

import re
from collections import Counter

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import DynamicCache, PreTrainedTokenizerFast

from kvq import KVQ, KVQCacheConfig
from kvq.errors import EvaluationError
from kvq.evaluation import recall
from kvq.evaluation.quality.candidates import Candidate, make_candidate
from kvq.evaluation.tasks.english import CHAINS, CITIES, HOPS, build_english_tasks
from kvq.evaluation.tasks.records import QUESTIONS, build_record_tasks
from kvq.evaluation.tasks.run import build_tasks, score_caches
from kvq.evaluation.tasks.scoring import TaskScore, score_tasks
from kvq.evaluation.tasks.task_set import NO_ANSWER, Question, build_task_set

LENGTH = 2400
FILLER = "and so the text goes on "


@pytest.fixture(scope="module")
def letters():
    """A tokenizer of one token for each byte, which writes anything."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.fixture(scope="module")
def filler(letters):
    return torch.tensor([letters(FILLER * 200)["input_ids"][:LENGTH]] * 2)


@pytest.fixture(scope="module")
def tasks(letters, filler):
    return {task.name: task for task in build_english_tasks(letters, filler, length=LENGTH, contexts=3)}


def read_rows(task, tokenizer):
    """Return context, questions with answers, and the answers of each row, as text."""
    for context, tail, answer_of in zip(task.contexts, task.tails, task.answer_of, strict=True):
        answers = [tokenizer.decode(tail[answer_of == number]) for number in range(int(answer_of.max()) + 1)]
        yield tokenizer.decode(context), tokenizer.decode(tail), answers


def test_every_code_is_asked_for_and_answered_by_its_needle(tasks, letters):
    for context, tail, answers in read_rows(tasks["several needles"], letters):
        codes = dict(re.findall(r"\nThe access code of (\w+) is (\d{5})\.\n", context))
        asked = re.findall(r"\nThe access code of (\w+) is (\d{5})", tail)
        assert set(codes) == {city for city, _ in asked} == set(CITIES)
        assert [codes[city] for city, _ in asked] == [code for _, code in asked] == [one.strip() for one in answers]
        assert list(codes) != [city for city, _ in asked]
        places = [context.index(f"of {city} is") for city in codes]
        assert max(places) - min(places) > LENGTH / 4


def test_a_value_is_found_by_following_its_variables(tasks, letters):
    for context, tail, answers in read_rows(tasks["variable tracking"], letters):
        given = dict(re.findall(r"\nVAR ([A-Z]{3}) = (?:VAR )?([A-Z]{3}|\d{5})\n", context))
        assert len(given) == CHAINS * (1 + HOPS)
        asked = re.findall(r"\nQuestion: what number is VAR ([A-Z]{3})\? It is", tail)
        assert len(asked) == CHAINS
        for name, answer in zip(asked, answers, strict=True):
            for _ in range(1 + HOPS):
                name = given[name]
            assert name == answer.strip()


def test_the_most_common_word_is_the_answer(tasks, letters):
    for context, tail, (answer,) in read_rows(tasks["common words"], letters):
        (line,) = re.findall(r"appear most often\.\n((?:[a-z]+, )+[a-z]+)", context)
        words = line.split(", ")
        (most, first), (_, second) = Counter(words).most_common(2)
        assert context.endswith(line)
        assert answer.strip() == most
        assert first > len(words) / 4 > 5 * second
        assert tail.count(answer) == 1


def test_the_text_stands_around_what_is_hidden(tasks, letters):
    for name in ("several needles", "variable tracking"):
        for context, _, _ in read_rows(tasks[name], letters):
            rest = re.sub(r"\n(?:The access code|VAR).*?\n", "", context)
            assert (rest + " ")[: len(FILLER) * 50] == FILLER * 50
            assert not context.startswith("\n")  # the first token stays


def test_contexts_and_questions_take_the_length(tasks):
    for task in tasks.values():
        assert task.contexts.shape[0] == len(task.tails) == 3
        assert task.contexts.shape[1] + task.tails.shape[1] == LENGTH
        assert len({tuple(row) for row in task.contexts.tolist()}) == 3
    assert [task.answers for task in tasks.values()] == [3 * len(CITIES), 3 * CHAINS, 3]


def test_a_seed_draws_the_same_and_another_one_others(letters, filler, tasks):
    same, other = (build_english_tasks(letters, filler, length=LENGTH, contexts=3, seed=seed)[0] for seed in (0, 1))
    assert torch.equal(same.contexts, tasks["several needles"].contexts)
    assert not torch.equal(other.tails, same.tails)


@pytest.mark.parametrize(("length", "message"), [(200, "at least 256"), (2401, "text of 2400"), (300, "no room")])
def test_too_little_room_is_told(letters, filler, length, message):
    with pytest.raises(EvaluationError, match=message):
        build_english_tasks(letters, filler, length=length, contexts=1)


def test_records_are_asked_for_as_the_model_was_trained():
    (task,) = build_record_tasks(length=800, contexts=2)
    assert task.contexts.shape[1] + task.tails.shape[1] <= 800
    for context, tail, answer_of in zip(task.contexts, task.tails, task.answer_of, strict=True):
        lines = re.findall(r"([A-Z]\w+) ([a-z ]+)\.", recall.decode_tokens(context[1:].tolist()))
        known = dict(lines)
        asked = re.findall(r"\? (\w+) ([a-z ]+)", recall.decode_tokens(tail.tolist()))
        assert len(asked) == QUESTIONS
        assert all(known[name] == answer.strip() for name, answer in asked)
        assert int((answer_of != NO_ANSWER).sum()) == QUESTIONS * recall.ANSWER_LENGTH
    with pytest.raises(EvaluationError, match="at least 256"):
        build_record_tasks(length=200, contexts=1)


def test_scores_are_those_of_one_forward(loaded):
    """Rows of unequal questions, read in steps and in batches: padding behind a row changes nothing."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda count: torch.randint(4, len(recall.VOCABULARY), (count,), generator=generator).tolist()  # noqa: E731
    contexts = [draw(90) for _ in range(3)]
    sizes = [[(2, 3)], [(3, 1), (1, 4)], [(2, 2)]]
    asked = [[Question(draw(ask), draw(answer)) for ask, answer in row] for row in sizes]
    model = loaded[0]
    task = build_task_set("drawn", contexts, asked)
    score = score_tasks(model, [task], lambda: DynamicCache(config=model.config), step=2, batch_size=2)["drawn"]
    likely, right, answers = [], [], []
    for context, questions in zip(contexts, asked, strict=True):
        read = list(context)
        for question in questions:
            read += question.ask
            with torch.inference_mode():
                logits = model(torch.tensor([[*read, *question.answer]])).logits[0, len(read) - 1 : -1].double()
            read += question.answer
            picked = torch.tensor(question.answer)
            likely.append(logits.log_softmax(-1).gather(-1, picked[:, None])[:, 0])
            right.append(logits.argmax(-1) == picked)
            answers += [len(right) - 1] * len(picked)
    assert torch.allclose(score.log_probability.double(), torch.cat(likely), atol=1e-3)
    assert torch.equal(score.right, torch.cat(right))
    assert score.answer_of.tolist() == answers == [0, 0, 0, 1, 2, 2, 2, 2, 3, 3]


def test_an_answer_is_right_if_all_of_it_is():
    right, answers = torch.tensor([True, True, False, True, True]), torch.tensor([0, 0, 1, 1, 2])
    score = TaskScore(torch.tensor([-1.0, -2, -3, 0, 0]), right, answers)
    assert score.mean_log_probability == pytest.approx(-1.2)
    assert score.tokens_right == pytest.approx(4 / 5)
    assert score.answers_right == pytest.approx(2 / 3)


@pytest.mark.filterwarnings("ignore:.*nbits_k.*below.*")
def test_few_bits_cost_answers_of_the_embedded_model(loaded):
    model = loaded[0]
    tasks = build_record_tasks(length=700, contexts=2)

    def score(make_cache):
        return score_tasks(model, tasks, make_cache, batch_size=2)["several needles"]

    plain = score(lambda: DynamicCache(config=model.config))
    exact = score(lambda: KVQ(KVQCacheConfig(residual_length=4096), model=model))
    plain_codes = dict(axis_value="per_token", rotation_k="none", rotation_v="none", balance_k="none")
    few = score(lambda: KVQ(KVQCacheConfig(nbits_k=2, nbits_v=2, **plain_codes), model=model))
    assert plain.answers_right > 0.9
    assert plain.mean_log_probability > -0.1
    assert exact.mean_log_probability == pytest.approx(plain.mean_log_probability, abs=1e-4)
    assert few.answers_right < plain.answers_right - 0.1
    assert few.mean_log_probability < plain.mean_log_probability - 0.2


def test_caches_follow_full_precision_and_a_peer_may_fail(loaded):
    model, tokenizer = loaded
    tasks = build_tasks(tokenizer, torch.zeros(1, 300, dtype=torch.long), length=300, contexts=1)
    assert [task.name for task in tasks] == ["several needles"]

    def fail(model):
        raise RuntimeError("no such cache\nat all")

    peer = Candidate("a peer", fail, {}, is_peer=True)
    own = make_candidate("exact", KVQCacheConfig(residual_length=4096))
    told = []
    plain, failed, exact = score_caches(model, tasks, [peer, own], step=8, batch_size=1, on_progress=told.append)
    assert told == ["full precision", "a peer", "exact"]
    assert (failed.failure, failed.to_dict()) == ("RuntimeError: no such cache", {})
    assert exact.to_dict()["several needles"] == pytest.approx(plain.to_dict()["several needles"], abs=1e-4)
    assert plain.to_dict()["several needles"]["tokens_right"] > 0.9
    with pytest.raises(RuntimeError, match="no such cache"):
        list(score_caches(model, tasks, [Candidate("ours", fail, {})], step=8, batch_size=1))
