"""Drafts: what requests draw is the same, in fewer steps, whatever the draft says."""

import math

import pytest

pytest.importorskip("flax.nnx")

import numpy as np

from jax_causal_conv.mamba2 import Engine, NgramDraft, Request, SamplingParams
from jax_causal_conv.mamba2.engine import DraftRequest
from tests.support.recall import VOCAB, Recall, answer

pytestmark = pytest.mark.usefixtures("quick_compilation")

MAX_DRAFTS = 3


class Draft:
    """Answers with what a test gives it."""

    def __init__(self):
        self.seen = []

    def __call__(self, requests):
        self.seen += requests
        return self.answer(requests)


def no_idea(requests):
    return [()] * len(requests)


@pytest.fixture(scope="module")
def shared_engine():
    return Engine(
        Recall(),
        num_slots=3,
        max_tokens_per_step=21,
        token_buckets=[12, 21],
        decode_buckets=[3],
        draft=Draft(),
        max_drafts=MAX_DRAFTS,
    )


@pytest.fixture
def engine(shared_engine):
    shared_engine.stats.steps.clear()
    yield shared_engine
    assert shared_engine.idle and len(shared_engine._schedule.shares[0].free) == 3


@pytest.fixture
def draft(engine):
    draft = engine._drafting.draft
    draft.answer, draft.seen = no_idea, []
    return draft


REQUESTS = [
    Request([5, 9], 9),
    Request(range(20), 8, SamplingParams(1.0, seed=4)),
    Request([7], 10, SamplingParams(2.0, top_k=9, top_p=0.9, seed=2**32 - 1)),
    Request([1, 2, 3], 1),
    Request([1, 2, 3], 7, stop_token_ids=[answer(Request([1, 2, 3], 4))[3]]),
]


def future(requests, wrong_from=None):
    """What each of the requests will draw, and from some place on something else."""
    guesses = []
    for tokens, limit, sampling in requests:
        right = answer(Request(tokens, limit, sampling))
        if wrong_from is not None:
            right[wrong_from:] = [(t + 1) % VOCAB for t in right[wrong_from:]]
        guesses.append(right)
    return guesses


def test_prompts_as_short_as_decodes_need_no_prefill():
    """The model takes rows of a token and its drafts for decodes, prompts or not."""
    engine = Engine(
        Recall(),
        num_slots=5,
        max_tokens_per_step=20,
        max_prefills_per_step=1,
        token_buckets=[20],
        decode_buckets=[5],
        draft=no_idea,
        max_drafts=MAX_DRAFTS,
    )
    prompts = [[1] * length for length in (4, 5, 4, 5, 2)]
    generations = [engine.submit(Request(prompt, 1)) for prompt in prompts]
    engine.run()
    first, second = engine.stats.steps
    # Of the two longer ones the second must wait.
    assert (first.prefill_rows, second.prefill_rows) == (4, 1)
    assert generations[3].first_token > generations[4].first_token
    for generation in generations:
        assert generation.tokens == answer(generation.request)


@pytest.mark.parametrize("right", range(MAX_DRAFTS + 1))
def test_tokens_are_the_same_and_acceptance_is_counted(engine, draft, right):
    draft.answer = lambda requests: future(requests, right)
    generations = [engine.submit(request) for request in REQUESTS]
    engine.run()
    for generation in generations:
        assert generation.tokens == answer(generation.request)
        assert len(generation.token_times) == len(generation.tokens)
    drawn = sum(len(g.tokens) for g in generations)
    assert drawn > 25
    stats = engine.stats
    steps = [s for s in stats.steps if s.draft_tokens]
    decoded = sum(s.decode_tokens for s in stats.steps)
    accepted = sum(s.accepted_tokens for s in stats.steps)
    assert decoded + accepted == drawn - len(generations)  # the first come from prompts
    assert stats.tokens_per_step == (decoded + accepted) / decoded
    assert stats.acceptance == accepted / sum(s.draft_tokens for s in steps)
    assert (accepted == 0) == (right == 0)
    if right == 0:
        assert stats.acceptance == 0 and stats.tokens_per_step == 1
    if right == MAX_DRAFTS:  # All but what would come after a stop token is right.
        assert stats.acceptance > 0.9 and stats.tokens_per_step > 3
    for step in stats.steps:
        used = step.decode_tokens + step.draft_tokens + step.prefill_tokens
        assert used + step.padding == step.bucket.tokens and step.padding >= 0


def test_a_draft_sees_the_text_the_seed_and_how_much_is_wanted(engine, draft):
    generation = engine.submit(REQUESTS[1])
    engine.run()
    tokens = answer(REQUESTS[1])
    assert len(draft.seen) == 6  # after 1, ..., 6 of 8 tokens: one is always drawn
    for i, (text, limit, sampling) in enumerate(draft.seen, 1):
        assert text.tolist() == [*range(20), *tokens[:i]]
        assert text.dtype == np.int32 and not text.flags.writeable
        assert limit == min(MAX_DRAFTS, 8 - i - 1)
        assert sampling == SamplingParams(1.0, seed=generation.seed)
    assert math.isnan(engine.stats.acceptance) and engine.stats.tokens_per_step == 1


def test_without_guesses_steps_are_those_of_plain_decoding(engine, draft):
    engine.submit(Request([1, 2, 3, 4, 5], 6))
    engine.run()
    assert {s.bucket.tokens for s in engine.stats.steps} == {3, 12}


def test_guesses_may_be_integers_of_any_kind(engine, draft):
    kinds = [list, tuple, np.array, lambda guess: np.array(guess, np.uint8), range]
    kinds += [lambda guess: list(map(np.int64, guess)), lambda guess: np.array([])]
    for kind in kinds:

        def same(requests, kind=kind):
            if kind is range:
                return tuple(range(limit) for _, limit, _ in requests)
            return [kind(guess) for guess in future(requests)]

        draft.answer = same
        generation = engine.submit(REQUESTS[0])
        engine.run()
        assert generation.tokens == answer(REQUESTS[0]) and generation.drafts


WRONG_GUESSES = {
    TypeError: [None, 5, "ab", b"ab", iter([1]), {1: 2}, {1, 2}, frozenset([1]), 2.5],
    ValueError: [
        *([1] * (MAX_DRAFTS + 1), [VOCAB], [-1], [1, 2**70], [1.0], [True], ["1"]),
        *(np.array([1.0]), np.array([[1]]), np.array(1), np.zeros(1, bool), [None]),
        np.array([2**63], np.uint64),
    ],
}


def test_a_wrong_guess_is_an_error_and_costs_its_request_the_drafts(engine, draft):
    for error, wrongs in WRONG_GUESSES.items():
        for wrong in wrongs:
            draft.answer = no_idea
            generations = [engine.submit(request) for request in REQUESTS[:3]]
            victim = generations[1]
            while len(victim.tokens) < 2:
                engine.step()

            def sometimes(requests, wrong=wrong, seed=victim.seed):
                return [
                    wrong if request.sampling.seed == seed else guess
                    for request, guess in zip(requests, future(requests), strict=True)
                ]

            draft.answer = sometimes
            match = rf"draft for request {victim.id} must be at most \d tokens.*got"
            with pytest.raises(error, match=match) as caught:
                engine.step()
            assert caught.value.__notes__ == [
                f"The requests [{victim.id}] go on without drafts."
            ]
            events = engine.run()
            assert [g.drafts for g in generations] == [True, False, True]
            for generation in generations:
                assert generation.tokens == answer(generation.request)
                assert any(event.id == generation.id for event in events)


@pytest.mark.parametrize(
    ("result", "error"),
    [
        ([], TypeError),
        ([[1], [2], [3]], TypeError),
        (None, TypeError),
        (np.zeros((2, 1), int), TypeError),
        (iter([[1], [2]]), TypeError),
        (ZeroDivisionError("of the user"), ZeroDivisionError),
    ],
    ids=["none", "too many", "None", "array", "iterator", "raises"],
)
def test_a_draft_that_fails_is_an_error_and_is_not_asked_again(
    engine, draft, result, error
):
    def fail(requests):
        if isinstance(result, Exception):
            raise result
        return result

    generations = [engine.submit(request) for request in REQUESTS[:2]]
    engine.step()
    engine.step()
    engine.step()
    draft.answer = fail
    match = "of the user" if error is ZeroDivisionError else "sequence of 2, one item"
    with pytest.raises(error, match=match) as caught:
        engine.step()
    numbers = [g.id for g in generations]
    assert f"The requests {numbers} go on without drafts." in caught.value.__notes__
    count = len(draft.seen)
    engine.run()
    assert len(draft.seen) == count
    # New requests are drafted for.
    draft.answer = future
    generations.append(engine.submit(REQUESTS[2]))
    engine.run()
    assert len(draft.seen) > count and engine.stats.acceptance > 0
    for generation in generations:
        assert generation.tokens == answer(generation.request)


def test_an_interrupted_draft_is_asked_again(engine, draft):
    def interrupted(requests):
        draft.answer = future
        raise KeyboardInterrupt

    generation = engine.submit(REQUESTS[0])
    draft.answer = interrupted
    with pytest.raises(KeyboardInterrupt):
        engine.run()
    engine.run()
    assert generation.tokens == answer(REQUESTS[0])
    assert generation.drafts and engine.stats.acceptance == 1
    assert engine.stats.steps[0].prefill_tokens == 2 and engine._intact


def test_a_draft_may_cancel_and_pause(engine, draft):
    first, second = (engine.submit(request) for request in REQUESTS[:2])

    def meddle(requests):
        engine.cancel(first.id)
        engine.pause(second.id)
        return future(requests)

    draft.answer = meddle
    engine.run()
    draft.answer = future
    assert engine.resume(second.id)
    engine.run()
    assert first.finish_reason == "cancelled"
    assert first.tokens == answer(REQUESTS[0])[: len(first.tokens)]
    assert second.tokens == answer(REQUESTS[1])


def test_engines_say_what_is_wrong_with_a_draft():
    sizes = {"num_slots": 2, "max_tokens_per_step": 11}
    for wrong in "ngram", 4, [1]:
        with pytest.raises(TypeError, match=r"draft must be callable.*got"):
            Engine(Recall(), draft=wrong, **sizes)
    with pytest.raises(ValueError, match="max_drafts must be at least 1, got 0"):
        Engine(Recall(), draft=NgramDraft(), max_drafts=0, **sizes)
    with pytest.raises(ValueError, match=r"\(1 \+ max_drafts\), got 11 < 12"):
        Engine(Recall(), draft=NgramDraft(), max_drafts=5, **sizes)


# ---- Lookup of n-grams -------------------------------------------------------------


def guess(text, limit=3, **sizes):
    request = DraftRequest(np.array(text, np.int32), limit, SamplingParams())
    (tokens,) = NgramDraft(**sizes)([request])
    return list(tokens)


def test_what_followed_the_last_tokens_before_is_guessed_again():
    assert guess([1, 2, 3, 4, 5, 9, 1, 2]) == [3, 4, 5]
    assert guess([1, 2, 3, 4, 5, 9, 1, 2], limit=1) == [3]
    assert guess([1, 2, 3, 1, 2]) == [3, 1, 2]
    assert guess([1, 2, 3, 1, 2, 4, 1, 2]) == [4, 1, 2]  # the latest
    # The latest that is followed by enough: else a cycle would cut its own guess short.
    assert guess([7] * 9) == [7, 7, 7]
    assert guess([1, 2, 1, 2, 1, 2, 1, 2]) == [1, 2, 1]
    assert guess([3, 1, 2, 1, 2], limit=9) == [1, 2]
    # A longer match counts more than a later one.
    assert guess([7, 1, 2, 3, 8, 1, 2, 4, 7, 1, 2], limit=1) == [3]
    assert guess([7, 1, 2, 3, 8, 1, 2, 4, 7, 1, 2], limit=1, longest=2) == [4]
    assert guess([5, 5, 5, 5]) == [5]  # nothing but one token comes after it
    assert guess([1, 2, 3, 4]) == guess([1]) == guess([1, 1]) == []
    assert guess([1, 9, 1]) == []
    assert guess([1, 9, 1], shortest=1) == [9, 1]
    # However far back it was,
    assert guess([1, 2, 3, 4, 5, *range(10, 999), 1, 2]) == [3, 4, 5]
    assert guess([*range(10, 999), 1, 2, 3, 4, 5, 6, 7, 1, 2, 3, 4]) == [5, 6, 7]
    # and not where the bytes are the same, but of other tokens.
    assert guess([1, 1, 5, 6, 7, 256, 256, 0, 9, 9, 9, 1, 1], longest=2) == [5, 6, 7]


def test_sizes_of_n_grams_are_checked():
    for sizes in (0, 0), (2, 3), (-1, -2):
        with pytest.raises(ValueError, match=r"shortest must be in \[1, longest\]"):
            NgramDraft(*sizes)
