"""What a request generates in the engine, whatever comes and goes beside it."""

import contextlib
import dataclasses
import functools
import itertools
import signal
import threading
import time
import types
from collections import deque
from typing import Any, NamedTuple

import pytest

nnx = pytest.importorskip("flax.nnx")

import jax
import jax.numpy as jnp
import numpy as np

from jax_causal_conv import PAD_SLOT_ID
from jax_causal_conv.mamba2 import (
    Bucket,
    Engine,
    Event,
    Mamba2Config,
    Mamba2LM,
    QueueFull,
    Request,
    SamplingParams,
    sample,
)
from tests.support import quick
from tests.support.interruptions import Interrupter, Timer
from tests.support.platforms import HAS_GPU

pytestmark = pytest.mark.usefixtures("quick_compilation")

VOCAB = 61
LONGEST = 96  # tokens of any request here
SHAPES = {
    "usual": {
        "num_slots": 4,
        "max_tokens_per_step": 16,
        "max_prefills_per_step": 2,
        "token_buckets": [8, 16],
        "decode_buckets": [2, 4],
        "max_waiting": 6,
    },
    "wide": {
        "num_slots": 8,
        "max_tokens_per_step": 64,
        "token_buckets": [64],
        "decode_buckets": [8],
    },
    "one at a time": {
        "num_slots": 1,
        "max_tokens_per_step": 5,
        "token_buckets": [5],
    },
}


@pytest.fixture(scope="module")
def model():
    config = Mamba2Config(
        vocab_size=VOCAB,
        d_model=32,
        n_layers=2,
        d_state=16,
        headdim=16,
        chunk_size=8,
        tie_embeddings=False,
    )
    model = Mamba2LM(config, rngs=nnx.Rngs(0))
    # Logits with a standard deviation of about 5: who is the largest is never in doubt.
    model.lm_head.kernel[...] = model.lm_head.kernel[...] * 50
    for layer in model.layers:  # a memory of about 70 tokens
        layer.mixer.A_log[...] = jnp.full_like(layer.mixer.A_log, np.log(0.02))
        layer.mixer.dt_bias[...] = jnp.zeros_like(layer.mixer.dt_bias)
    return model


class Bigram(nnx.Module):
    """A model without memory, which compiles at once."""

    def __init__(self, rngs):
        self.config = types.SimpleNamespace(vocab_size=VOCAB)
        self.logits = nnx.Param(jax.random.normal(rngs.params(), (VOCAB, VOCAB)))

    def packed(self, tokens, cache, query_start_loc, **_):
        return self.logits[tokens[jnp.maximum(query_start_loc[1:] - 1, 0)]], cache

    def init_cache(self, num_slots, *, dtype=None, ssm_dtype=None):
        return jnp.zeros((num_slots, 1), dtype)


@pytest.fixture(scope="module")
def warm_engine(model):
    """Engines by name, compiled once; a test gets them idle and leaves them idle."""

    @functools.cache
    def make(name):
        engine = Engine(model, **SHAPES[name])
        engine.warmup()
        poison(engine)
        return engine

    return make


@pytest.fixture
def engine(warm_engine):
    engine = warm_engine("usual")
    yield engine
    assert engine.idle and engine.num_running == 0
    assert sorted(engine._schedule.shares[0].free) == [0, 1, 2, 3], "slots are missing"


def poison(engine):
    """NaN in all slots that nobody has."""
    free = jnp.array(list(engine._schedule.shares[0].free), int)
    cache = jax.tree.map(lambda a: a.at[free].set(jnp.nan), engine._device.state.cache)
    engine._device.state = engine._device.state._replace(cache=cache)


def some_requests(count, seed=0):
    """Short and long prompts, beyond any budget too; greedy, and sampled in all ways.

    Every request has its own seed, so that it draws the same wherever it is submitted.
    """
    rng = np.random.default_rng(seed)
    lengths = [1, 70, 2, 5, 15, 16, 17, 33]
    settings = [
        {},
        {"temperature": 1.0},
        {"temperature": 0.8, "top_k": 5},
        {"temperature": 1.3, "top_p": 0.7},
        {"temperature": 2.0, "top_k": 20, "top_p": 0.9},
    ]
    return [
        Request(
            rng.integers(0, VOCAB, length),
            max_new_tokens=int(rng.integers(1, 14)),
            sampling=SamplingParams(seed=int(rng.integers(2**32)), **chosen),
        )
        for length, chosen, _ in zip(
            itertools.cycle(lengths),
            itertools.cycle(settings),
            range(count),
            strict=False,
        )
    ]


jitted_sample = quick.jit(sample)


def draw_one(logits, sampling, position):
    """The token at `position`, from `(1, V)` logits."""
    return int(
        jitted_sample(
            logits,
            np.array([sampling.seed or 0], np.uint32),
            np.array([position], np.int32),
            np.array([sampling.temperature], np.float32),
            np.array([sampling.top_k], np.int32),
            np.array([sampling.top_p], np.float32),
        )[0]
    )


@pytest.fixture(scope="module")
def alone(model):
    """The tokens of a request, by the whole text through `model.__call__` each time."""
    forward = jax.jit(model.__call__)
    known = {}

    def generate(request):
        if request not in known:
            text = np.zeros((1, LONGEST), np.int32)  # causal: what follows is not seen
            length = len(request.prompt)
            text[0, :length] = request.prompt
            end = length + request.max_new_tokens
            for position in range(length, end):
                logits = forward(text)[:, position - 1]
                text[0, position] = draw_one(logits, request.sampling, position)
            known[request] = text[0, length:end].tolist()
        return known[request]

    return generate


def assert_complete(generation, expected):
    assert generation.tokens == expected, generation.request.prompt
    assert generation.finish_reason == "length"
    assert generation.slot == PAD_SLOT_ID


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("shape", SHAPES)
def test_tokens_do_not_depend_on_batch_mates(warm_engine, alone, shape, seed):
    engine = warm_engine(shape)
    rng = np.random.default_rng(seed)
    requests = some_requests(16)
    generations = []
    for i in rng.permutation(len(requests)):
        for _ in range(rng.integers(0, 3)):
            engine.step()
        while engine.num_waiting >= 3:
            engine.step()
        generations.append(engine.submit(requests[i]))
    engine.run()
    for generation in generations:
        assert_complete(generation, alone(generation.request))


def test_tokens_equal_one_sequence_at_a_time_through_packed(model, alone):
    @jax.jit
    def packed(tokens, cache, count, seen):
        return model.packed(
            tokens, cache, jnp.array([0, count]), has_initial_state=seen[None]
        )

    for request in some_requests(8):
        count = position = len(request.prompt)
        tokens = jnp.zeros(LONGEST, jnp.int32).at[:count].set(request.prompt)
        cache, seen, got = model.init_cache(1), jnp.array(False), []
        while len(got) < request.max_new_tokens:
            logits, cache = packed(tokens, cache, count, seen)
            got.append(draw_one(logits, request.sampling, position))
            tokens, count, seen = jnp.full(1, got[-1]), 1, jnp.array(True)
            position += 1
        assert got == alone(request)


def test_states_may_be_bfloat16(model):
    """Then a token follows from states that were rounded after each step."""
    narrow = Engine(model, num_slots=2, max_tokens_per_step=16, ssm_dtype=jnp.bfloat16)
    request = Request(list(range(1, 9)), 4)
    generation = narrow.submit(request)
    narrow.run()

    packed = quick.jit(model.packed)
    cache = model.init_cache(1, ssm_dtype=jnp.bfloat16)
    assert {layer.ssm.dtype for layer in cache} == {jnp.dtype(jnp.bfloat16)}
    tokens, seen, want = request.prompt, False, []
    for _ in range(4):
        offsets = jnp.array([0, len(tokens)])
        logits, cache = packed(
            jnp.array(tokens), cache, offsets, has_initial_state=jnp.array([seen])
        )
        tokens, seen = [int(logits[0].argmax())], True
        want += tokens
    assert generation.tokens == want


def test_tokens_depend_on_the_whole_prompt(engine, alone):
    """So that equal tokens mean something: an early token matters much later."""
    prompt = some_requests(2)[1].prompt
    changed = prompt.copy()
    changed[:20] = (changed[:20] + 1) % VOCAB
    first, second = Request(prompt, 12), Request(changed, 12)
    generations = [engine.submit(first), engine.submit(second)]
    engine.run()
    assert generations[0].tokens == alone(first)
    assert generations[1].tokens == alone(second)
    assert generations[0].tokens != generations[1].tokens
    assert len(set(generations[0].tokens)) > 3


def test_reused_slots_leak_nothing(engine, alone):
    requests = some_requests(12, seed=3)
    generations = []
    while requests or not engine.idle:
        poison(engine)
        if requests and engine.num_waiting == 0:
            generations.append(engine.submit(requests.pop()))
        engine.step()
    assert len(generations) == 12
    for generation in generations:
        assert_complete(generation, alone(generation.request))


def test_no_compilation_after_warmup(engine, alone):
    compilations = []

    def listen(name, _seconds, **_):
        if name == "/jax/core/compile/backend_compile_duration":
            compilations.append(name)

    rng = np.random.default_rng(4)
    requests = some_requests(20, seed=4)
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        generations = []
        while requests or not engine.idle:
            if requests and engine.num_waiting < 3 and rng.random() < 0.3:
                generations.append(engine.submit(requests.pop()))
            engine.step()
        assert not compilations
        jax.jit(lambda x: x * 3.25 + len(generations))(1.0)
        assert compilations  # the listener does listen
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert engine.num_compilations == len(engine.buckets) == 4
    used = {step.bucket for step in engine.stats.steps}
    assert used == set(engine.buckets)
    for generation in generations:
        assert_complete(generation, alone(generation.request))


def test_without_warmup_buckets_are_compiled_on_first_use():
    engine = Engine(Bigram(nnx.Rngs(0)), num_slots=4, max_tokens_per_step=16)
    assert (engine.num_compilations, len(engine.buckets)) == (0, 4)
    engine.submit(Request([1], max_new_tokens=3))
    engine.run()
    assert engine.num_compilations == 1
    engine.submit(Request([1, 2], max_new_tokens=3))
    engine.run()
    assert engine.num_compilations == 2
    used = {step.bucket for step in engine.stats.steps}
    assert used == {Bucket(1, 1, 0), Bucket(16, 4, 4)}


def test_a_gpu_decodes_without_a_sampler_where_nothing_is_left_to_chance():
    engine = Engine(Bigram(nnx.Rngs(0)), num_slots=2, max_tokens_per_step=8)
    assert engine._device.has_greedy_steps == HAS_GPU
    engine._device.has_greedy_steps = True
    requests = Request([1, 2], 4), Request([3], 6, SamplingParams(1.0, seed=1))
    greedy = engine.submit(requests[0])
    engine.run()
    kinds = set(engine._device.executables)
    assert kinds == {(Bucket(8, 2, 2), False), (Bucket(1, 1, 0), True)}
    both = [engine.submit(request) for request in requests]
    engine.run()
    new = engine._device.executables.keys() - kinds
    assert new == {(Bucket(2, 2, 0), False), (Bucket(1, 1, 0), False)}
    steps = engine._device.executables
    assert "threefry" not in steps[Bucket(1, 1, 0), True].as_text()
    assert "threefry" in steps[Bucket(1, 1, 0), False].as_text()
    assert both[0].tokens == greedy.tokens
    as_on_a_cpu = Engine(Bigram(nnx.Rngs(0)), num_slots=2, max_tokens_per_step=8)
    as_on_a_cpu._device.has_greedy_steps = False
    again = [as_on_a_cpu.submit(request) for request in requests]
    as_on_a_cpu.run()
    assert [g.tokens for g in again] == [g.tokens for g in both]
    engine.warmup()
    assert engine.num_compilations == len(engine.buckets) + 2


def test_a_step_gets_one_array_from_the_host():
    """Each would be a transfer of its own."""
    engine = Engine(Bigram(nnx.Rngs(0)), num_slots=2, max_tokens_per_step=4)
    engine.warmup()
    sent = []

    def counting(executable):
        def run(*arguments):
            leaves = jax.tree.leaves(arguments)
            sent.append(sum(not isinstance(leaf, jax.Array) for leaf in leaves))
            return executable(*arguments)

        return run

    for bucket, executable in engine._device.executables.items():
        engine._device.executables[bucket] = counting(executable)
    engine.submit(Request([1, 2, 3], 3, SamplingParams(1.0)))
    engine.run()
    assert sent == [1, 1, 1]


def test_caches_are_donated(engine):
    engine.submit(Request([1, 2, 3], max_new_tokens=2))
    before = jax.tree.leaves(engine._device.state)
    engine.step()
    assert all(array.is_deleted() for array in before)
    engine.run()


# ---- How requests end --------------------------------------------------------------


def test_a_stop_token_ends_the_request_and_is_its_last(engine, alone):
    for request in some_requests(12, seed=5):
        whole = alone(request)
        stop = whole[len(whole) // 2]
        expected = whole[: whole.index(stop) + 1]
        # A stop token in the prompt stops nothing.
        stops = {stop, int(request.prompt[0])} - set(expected[:-1])
        generation = engine.submit(dataclasses.replace(request, stop_token_ids=stops))
        mate = engine.submit(request)
        events = [e for e in engine.run() if e.id == generation.id]
        assert generation.tokens == expected
        assert generation.finish_reason == "stop"
        assert [e.token for e in events] == expected
        assert [e.finish_reason for e in events[:-1]] == [None] * (len(expected) - 1)
        assert events[-1].finish_reason == "stop"
        assert_complete(mate, whole)


def test_one_new_token(engine, alone):
    requests = [Request([t], max_new_tokens=1) for t in range(9)]
    generations = [engine.submit(request) for request in requests]
    events = engine.run()
    assert [e.id for e in events] == [g.id for g in generations]
    assert all(event.finish_reason == "length" for event in events)
    for generation in generations:
        assert_complete(generation, alone(generation.request))
    # All but the last batch gave their slots away without waiting for the result.
    assert [s.decode_tokens + s.prefill_tokens for s in last(engine, 3)] == [4, 4, 1]


def last(engine, count):
    return list(engine.stats.steps)[-count:]


def test_cancelling_frees_the_slot_at_once(engine, alone):
    requests = some_requests(40, seed=6)
    long = [r for r in requests if len(r.prompt) == 70]
    mates = [engine.submit(Request(r.prompt[:7], 25)) for r in requests[:3]]
    prefilling = engine.submit(long[0])
    waiting = engine.submit(requests[0])
    heir = engine.submit(requests[2])
    engine.step()
    engine.step()
    assert (prefilling.slot, prefilling.prompt_left) > (-1, 0)
    assert heir.admitted is waiting.admitted is None
    slot = prefilling.slot
    assert engine.cancel(waiting.id) and engine.num_waiting == 1
    assert engine.cancel(prefilling.id)
    assert list(engine._schedule.shares[0].free) == [slot] and engine.num_running == 3
    assert waiting.finish_reason == prefilling.finish_reason == "cancelled"
    poison(engine)
    events = engine.step()
    assert heir.slot == slot
    for ended in waiting, prefilling:
        assert Event(ended.id, None, "cancelled") in events
        assert ended.tokens == [] and not engine.cancel(ended.id)

    while len(mates[0].tokens) < 5:
        engine.step()
    assert engine.cancel(mates[0].id)  # decoding, with a token on its way
    assert mates[0].slot == PAD_SLOT_ID and engine.num_running == 3
    events = engine.run()
    assert [e for e in events if e.id == mates[0].id] == [
        Event(mates[0].id, None, "cancelled")
    ]
    assert mates[0].tokens == alone(mates[0].request)[:5]
    for generation in *mates[1:], heir:
        assert_complete(generation, alone(generation.request))
    assert not engine.cancel(heir.id) and not engine.cancel(10**9)


def test_cancelling_between_the_last_dispatch_and_its_result(engine):
    generation = engine.submit(Request([1, 2], max_new_tokens=1))
    assert engine.step() == []
    assert generation.slot == PAD_SLOT_ID  # nothing more to compute
    assert engine.cancel(generation.id)
    assert engine.run() == [Event(generation.id, None, "cancelled")]
    assert generation.tokens == []


def test_random_arrivals_and_cancellations(engine, alone):
    rng = np.random.default_rng(7)
    pool = some_requests(10, seed=7)
    generations = []
    for _ in range(300):
        if rng.random() < 0.3 and engine.num_waiting < 6:
            generations.append(engine.submit(pool[rng.integers(len(pool))]))
        if rng.random() < 0.1 and generations:
            engine.cancel(generations[-rng.integers(1, 6) % len(generations)].id)
        if rng.random() < 0.2:
            poison(engine)
        engine.step()
        slots = [g.slot for g in generations if g.slot != PAD_SLOT_ID]
        assert sorted([*slots, *engine._schedule.shares[0].free]) == [0, 1, 2, 3]
    engine.run()
    reasons = [g.finish_reason for g in generations]
    assert min(reasons.count("length"), reasons.count("cancelled")) > 10
    for generation in generations:
        whole = alone(generation.request)
        if generation.finish_reason == "cancelled":
            assert generation.tokens == whole[: len(generation.tokens)]
        else:
            assert_complete(generation, whole)


# ---- Who is served when ------------------------------------------------------------


def test_submit_raises_when_the_queue_is_full_and_order_is_kept(engine, alone):
    requests = some_requests(12, seed=8)
    generations = [engine.submit(request) for request in requests[:10]]
    for _ in range(2):
        with pytest.raises(QueueFull):  # 4 will get slots, 6 may wait
            engine.submit(requests[10])
    engine.step()
    assert (engine.num_running, engine.num_waiting) == (4, 6)
    with pytest.raises(QueueFull):
        engine.submit(requests[10])
    while engine.num_waiting == 6:
        engine.step()
    generations += [engine.submit(requests[10])]
    with pytest.raises(QueueFull):
        engine.submit(requests[11])
    engine.run()
    admitted = [generation.admitted for generation in generations]
    assert admitted == sorted(admitted)
    assert [generation.id for generation in generations] == list(
        range(generations[0].id, generations[0].id + 11)
    )  # what was refused left no trace
    for generation in generations:
        assert_complete(generation, alone(generation.request))


def test_a_long_prompt_holds_up_no_decode(engine, alone):
    short = [engine.submit(Request([t], 30)) for t in range(3)]
    for _ in range(3):
        engine.step()
    long = engine.submit(some_requests(2)[1])
    before = [len(g.tokens) for g in short]
    first = len(engine.stats.steps)
    count = 0
    while long.first_token is None:
        engine.step()
        count += 1
        assert [len(g.tokens) for g in short] == [n + count for n in before]
    steps = list(engine.stats.steps)[first:][:count]
    mixed = [s for s in steps if s.prefill_tokens]
    # 70 tokens, 13 in each step beside 3 decodes.
    assert [s.prefill_tokens for s in mixed] == [13] * 5 + [5]
    assert all(s.decode_tokens == 3 for s in steps)
    engine.run()
    for generation in *short, long:
        assert_complete(generation, alone(generation.request))


def test_prompts_share_a_step_up_to_the_limit(engine):
    for _ in range(3):
        engine.submit(Request([1, 2, 3], 2))
    engine.submit(Request([4], 2))
    engine.run()
    first, second, _ = last(engine, 3)
    # Two prompts of three tokens; the third must wait, a single token need not.
    assert (first.prefill_tokens, first.prefill_rows) == (7, 3)
    assert (second.decode_tokens, second.prefill_tokens) == (3, 3)


def test_steps_account_for_every_token(engine):
    first = len(engine.stats.steps)
    done = len(engine.stats.requests)
    generations = []
    for request in some_requests(9, seed=9):
        generations.append(engine.submit(request))
    engine.run()
    steps = list(engine.stats.steps)[first:]
    assert sum(s.prefill_tokens for s in steps) == sum(
        len(g.prompt) for g in generations
    )
    # Every token but the last of each request is decoded once.
    assert sum(s.decode_tokens for s in steps) == sum(
        len(g.tokens) - 1 for g in generations
    )
    for s in steps:
        real = s.decode_tokens + s.prefill_tokens
        assert 0 < real <= 16 and real + s.padding == s.bucket.tokens
        assert s.padding >= 0 and s.running <= 4 and s.waiting <= 6
        assert s.decode_tokens + s.prefill_rows <= s.bucket.sequences
        assert min(s.host_seconds, s.dispatch_seconds, s.seconds) > 0
    elapsed = max(g.finished for g in generations) - steps[0].start
    assert sum(s.seconds for s in steps) <= elapsed * 1.001
    for g in generations:
        assert g.arrival <= g.admitted <= g.first_token <= g.finished
        assert len(g.token_times) == len(g.tokens)
        assert g.token_times == sorted(g.token_times)
        assert g.finished == g.token_times[-1]
    assert set(list(engine.stats.requests)[done:]) == set(generations)


def test_the_smallest_bucket_that_fits_is_used(engine):
    for lengths, bucket in [
        ([1], Bucket(2, 2, 0)),
        ([1, 1], Bucket(2, 2, 0)),
        ([1, 1, 1], Bucket(4, 4, 0)),
        ([2], Bucket(8, 4, 2)),
        ([1, 7], Bucket(8, 4, 2)),
        ([5, 4], Bucket(16, 4, 2)),
    ]:
        for length in lengths:
            engine.submit(Request([3] * length, 1))
        engine.run()
        assert last(engine, 1)[0].bucket == bucket, lengths


# ---- Streaming ---------------------------------------------------------------------


def test_events_stream_in_order_to_their_requests_and_from_step(engine):
    seen = []
    generations = []
    for request in some_requests(8, seed=10):
        streamed = dataclasses.replace(request, on_event=seen.append)
        generations.append(engine.submit(streamed))
    returned, lengths = [], []
    while not engine.idle:
        events = engine.step()
        lengths.append(len(events))
        assert len({event.id for event in events}) == len(events)
        returned += events
    assert returned == seen
    assert max(lengths) <= 4 < len(lengths)
    for generation in generations:
        own = [event for event in seen if event.id == generation.id]
        assert [event.token for event in own] == generation.tokens
        reasons = [event.finish_reason for event in own]
        assert reasons == [None] * (len(own) - 1) + ["length"]


def test_callbacks_may_submit_and_cancel(engine, alone):
    following = Request([5, 6], 4)
    submitted = []

    def follow(event):
        if event.finish_reason is not None:
            assert engine.cancel(victim.id)
            submitted.append(engine.submit(following))

    engine.submit(Request([1, 2, 3], 3, on_event=follow))
    victim = engine.submit(Request([4], 40))
    engine.run()
    assert victim.finish_reason == "cancelled" and 2 <= len(victim.tokens) <= 4
    assert victim.tokens == alone(victim.request)[: len(victim.tokens)]
    assert_complete(submitted[0], alone(following))


def test_a_callback_that_raises_loses_no_event(engine, alone):
    def once(event):
        if not raised:
            raised.append(event)
            raise RuntimeError("the client has gone")

    raised = []
    bad = engine.submit(Request([1], 5, on_event=once))
    good = engine.submit(Request([2], 5))
    engine.step()
    with pytest.raises(RuntimeError, match="the client has gone"):
        engine.step()
    events = engine.run()
    assert_complete(bad, alone(bad.request))
    assert_complete(good, alone(good.request))
    for generation in bad, good:
        tokens = [e.token for e in [*raised, *events] if e.id == generation.id]
        assert tokens == generation.tokens


def test_requests_without_a_seed_differ_and_those_with_one_repeat(engine):
    free, seeded = (SamplingParams(1.5, seed=seed) for seed in (None, 11))
    for sampling, distinct in (free, 4), (seeded, 1):
        generations = [engine.submit(Request([1, 2], 12, sampling)) for _ in range(4)]
        engine.run()
        assert len({tuple(g.tokens) for g in generations}) == distinct


# ---- What is refused ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (Request([]), "at least one integer"),
        (Request([[1, 2]]), "at least one integer"),
        (Request([1.5]), "at least one integer"),
        (Request([1, VOCAB]), r"must be in \[0, 61\)"),
        (Request([-1, 2]), r"must be in \[0, 61\)"),
        (Request([1], max_new_tokens=0), "max_new_tokens"),
    ],
    ids=["empty", "2-D", "float", "too large", "negative", "no new token"],
)
def test_bad_requests_are_refused_and_leave_no_trace(engine, wrong, message):
    with pytest.raises(ValueError, match=message):
        engine.submit(wrong)
    assert engine.idle and engine.step() == []


WRONG = {
    TypeError: {
        "prompt": [None, 5, "text", b"text", {1, 2}, {1: 2}, iter([1]), len, 2.5],
        "max_new_tokens": [
            *(2.5, 2.0, float("nan"), float("inf"), None, "3", True),
            *([3], np.float32(2), np.True_),
        ],
        "sampling": [None, 0.5, {"temperature": 1.0}, SamplingParams],
        "stop_token_ids": [5, None, "text", b"text", iter([1]), (t for t in [1]), len],
        "on_event": [5, "print", []],
    },
    ValueError: {
        "prompt": [
            *([[1, 2]], [[1], [2, 3]], [True], [1, True], ["1"], [None], [], [1, 2.0]),
            *(np.array(3), np.array([1.0]), np.array([True]), np.zeros(0, int)),
            *([2**70], [-1], np.array([2**63], np.uint64), jnp.array([[1]]), range(62)),
        ],
        "max_new_tokens": [0, -1, -(2**70), np.int64(-1)],
        "stop_token_ids": [
            *([1.5], ["a"], [True], [[1]], [None], [-1], {VOCAB}, [2**70], range(62)),
            *(np.array([[1]]), np.array([1.0]), np.array(1)),
        ],
    },
}


def test_what_is_wrong_with_a_request_comes_out_of_submit_and_harms_no_other(
    engine, alone
):
    good = Request([16, 5], 8)
    mate = engine.submit(good)
    count = 0
    for error, names in WRONG.items():
        for name, values in names.items():
            for value in values:
                wrong = Request(**{"prompt": [1], name: value})
                with pytest.raises(error, match=f"{name}.*got|got a {name}"):
                    engine.submit(wrong)
                count += 1
    assert count > 60
    for value in None, [1, 2], good.prompt, Request:
        with pytest.raises(TypeError, match="request must be a Request, got"):
            engine.submit(value)
    for value in None, 1.0, True, mate, "0":
        with pytest.raises(TypeError, match="id must be an integer, got"):
            engine.cancel(value)
    assert (engine.num_waiting, len(engine._active)) == (1, 1)
    engine.run()
    assert_complete(mate, alone(good))


def test_integers_of_any_kind_are_read_once_and_the_same(engine, alone):
    usual = Request([3, 1, 4, 1, 5], 6)
    whole = alone(usual)
    stop = whole[3]
    expected = whole[: whole.index(stop) + 1]
    given = [3, 1, 4, 1, 5]
    prompts = [given, tuple(given), deque(given), list(map(np.uint8, given))]
    prompts += [np.array(given, np.uint64), jnp.array(given), np.array([*given, 9])[:5]]
    stops = [[stop], (np.int32(stop),), {stop}, frozenset([stop]), {stop: 1}.keys()]
    stops += [np.array([stop, stop]), jnp.array([stop])]
    generations = []
    for prompt, stop_token_ids in zip(prompts, stops, strict=True):
        request = Request(prompt, np.int16(6), stop_token_ids=stop_token_ids)
        generations.append(engine.submit(request))
        assert generations[-1].request is request
    given[:] = [0] * 5  # What is changed later is not seen.
    stops[0].clear()
    with pytest.raises(ValueError, match="read-only"):
        generations[0].prompt[0] = 0
    engine.run()
    for generation in generations:
        assert (generation.tokens, generation.finish_reason) == (expected, "stop")
    for empty in [], (), set(), np.array([]), range(0):
        generation = engine.submit(dataclasses.replace(usual, stop_token_ids=empty))
        engine.run()
        assert_complete(generation, whole)


# ---- Interruptions -----------------------------------------------------------------


class Job(NamedTuple):
    """A request that was submitted, and what it should become."""

    generation: Any
    seen: list
    tokens: list
    reason: str


@pytest.fixture(scope="module")
def submit_all(alone):
    """Submits requests of all kinds: long, sampled, with stop tokens and callbacks."""
    known = []
    for i, some in enumerate(some_requests(7, seed=11)):
        request = dataclasses.replace(some, max_new_tokens=2 + i % 4)
        tokens = alone(request)
        if i % 3 == 1:
            tokens = tokens[: tokens.index(tokens[1]) + 1]
            stops = {tokens[-1]}
            request = dataclasses.replace(request, stop_token_ids=stops)
        known.append((request, tokens, "stop" if i % 3 == 1 else "length"))

    def submit(engine):
        jobs = []
        for i, (request, tokens, reason) in enumerate(known):
            seen = []
            own = dataclasses.replace(request, on_event=seen.append if i % 2 else None)
            jobs.append(Job(engine.submit(own), seen, tokens, reason))
        return jobs

    return submit


def drive(engine, jobs, moments=(), step=Engine.step):
    """Steps until idle, interrupted after so many instructions each; checks all.

    Returns:
        The number of instructions, and the functions that were interrupted.
    """
    returned, where, count = [], [], 0
    for moment in [*moments, None]:
        with contextlib.suppress(KeyboardInterrupt), Interrupter(moment) as interrupter:
            while not engine.idle:
                returned += step(engine)
        count += interrupter.count
        where.append(interrupter.where)
    # An interruption may come between the last instruction of a call and its caller.
    lost = {"step", "run", "take"} & set(where)
    missed = "deliver" in where  # and before the first instruction of a callback
    check(engine, jobs, None if lost else returned, missed)
    return count, where


def check(engine, jobs, returned=None, missed=False):
    """All that is known of the requests is complete, in order and there once."""
    for generation, seen, tokens, reason in jobs:
        assert (generation.tokens, generation.finish_reason) == (tokens, reason)
        assert len(generation.token_times) == len(tokens)
        assert generation.token_times == sorted(generation.token_times)
        assert generation.finished == generation.token_times[-1]
        assert engine.stats.requests.count(generation) == 1
        assert generation.slot == PAD_SLOT_ID
        id = generation.id
        events = [Event(id, token) for token in tokens[:-1]]
        events.append(Event(id, tokens[-1], reason))
        if generation.request.on_event is not None:
            left = iter(events)
            assert all(event in left for event in seen), "out of order, or twice"
            assert missed or seen == events
        elif returned is not None:
            assert [event for event in returned if event.id == id] == events
    assert engine.idle and engine._intact
    assert (
        not engine._schedule.running
        and not engine._schedule.waiting
        and not engine._flights
    )
    assert sorted(engine._schedule.shares[0].free) == [0, 1, 2, 3]


def test_an_interruption_between_any_two_instructions_changes_nothing(
    engine, submit_all
):
    rng = np.random.default_rng(0)
    total, _ = drive(engine, submit_all(engine))
    interrupted = set()
    trials = 80
    for i in range(trials):
        moment = 1 + (i * total + int(rng.integers(total))) // trials
        # A second one while the engine mends, or soon afterwards.
        moments = [moment, int(rng.integers(1, 1200))][: 1 + i % 2]
        step = Engine.run if i % 5 == 0 else Engine.step
        interrupted |= set(drive(engine, submit_all(engine), moments, step)[1])
    assert interrupted >= {"_dispatch", "_collect", "deliver", "pack", "settle"}


@pytest.fixture(scope="module")
def bigrams():
    """An engine that is cheap to run, and the tokens of three requests."""
    engine = Engine(
        Bigram(nnx.Rngs(0)), num_slots=2, max_tokens_per_step=2, decode_buckets=[2]
    )
    requests = [Request([1], 3), Request([2], 2), Request([3], 1)]
    generations = [engine.submit(request) for request in requests]
    engine.run()
    return engine, requests, [generation.tokens for generation in generations]


def test_every_few_instructions_a_short_run_may_be_interrupted(bigrams):
    engine, requests, expected = bigrams
    for moment in itertools.count(1, 5):
        generations = [engine.submit(request) for request in requests]
        with contextlib.suppress(KeyboardInterrupt), Interrupter(moment) as interrupter:
            engine.run()
        engine.run()
        assert [generation.tokens for generation in generations] == expected, moment
        assert engine.idle and sorted(engine._schedule.shares[0].free) == [0, 1]
        if interrupter.where is None:
            break
    assert moment > 1000


@pytest.mark.parametrize("what", ["submit", "cancel"])
def test_an_interrupted_submit_or_cancel_has_done_all_or_nothing(bigrams, what):
    engine, requests, expected = bigrams
    outcomes = set()
    moment = hits = 0
    while hits == moment:
        moment += 1
        generations = [engine.submit(request) for request in requests]
        before = len(engine.stats.requests)
        engine.step()  # The third still waits.
        victim = generations[moment % 3]
        with contextlib.suppress(KeyboardInterrupt), Interrupter(moment) as interrupter:
            if what == "submit":
                engine.submit(requests[0])
            else:
                engine.cancel(victim.id)
        hits += interrupter.where is not None
        events = engine.run()
        for generation, tokens in zip(generations, expected, strict=True):
            if generation.finish_reason == "cancelled":
                assert generation is victim and what == "cancel"
                assert Event(victim.id, None, "cancelled") in events
                assert generation.tokens == tokens[: len(generation.tokens)]
            else:
                assert (generation.tokens, generation.finish_reason) == (
                    tokens,
                    "length",
                )
        ended = list(engine.stats.requests)[before:]
        if what == "submit":
            outcomes.add(len(ended))
            assert all(g.tokens == expected[0] for g in set(ended) - set(generations))
        else:
            outcomes.add(victim.finish_reason)
            assert len(ended) == 3
        assert engine.idle and sorted(engine._schedule.shares[0].free) == [0, 1]
    assert hits > 50 and len(outcomes) == 2


@pytest.mark.skipif(
    not hasattr(signal, "setitimer")
    or threading.current_thread() is not threading.main_thread(),
    reason="signals come to the main thread of POSIX systems",
)
@pytest.mark.parametrize("name", ["SIGALRM", "SIGINT"])
def test_real_signals_at_many_moments_change_nothing(engine, submit_all, name):
    rng = np.random.default_rng(1)
    start = time.perf_counter()
    drive_jobs = submit_all(engine)
    engine.run()
    check(engine, drive_jobs)
    usual = time.perf_counter() - start
    hits = 0
    with Timer(getattr(signal, name)) as timer:
        for _ in range(25):
            jobs = submit_all(engine)
            while timer.call(rng.uniform(0, usual), engine.run):
                hits += 1
            engine.run()
            check(engine, jobs, missed=True)
    assert hits >= 5


def test_lost_caches_are_made_anew_and_the_failure_is_raised(
    engine, submit_all, monkeypatch
):
    """The device fails after it took the caches, or with the tokens of a step."""

    def failing(_params, state, _batch):
        jax.tree.map(lambda a: a.delete(), state)
        raise RuntimeError("out of memory")

    class Lost:
        def __array__(self, *_, **__):
            raise RuntimeError("the device is gone")

    for steps in 0, 1, 4, 7:
        jobs = submit_all(engine)
        returned = [event for _ in range(steps) for event in engine.step()]
        with monkeypatch.context() as patch:
            patch.setattr(engine._device, "executable", lambda *_: failing)
            for _ in range(2):
                with pytest.raises(RuntimeError, match="out of memory"):
                    engine.step()
        returned += engine.step()
        engine._flights[0] = engine._flights[0]._replace(tokens=Lost())
        with pytest.raises(RuntimeError, match="the device is gone"):
            engine.step()
        returned += engine.run()
        check(engine, jobs, returned)


def test_an_interruption_while_waiting_for_the_device_costs_nothing(
    engine, submit_all, monkeypatch
):
    jobs = submit_all(engine)
    returned = engine.step()
    caches = engine._device.state
    flight = engine._flights[0]

    class Slow:
        def __array__(self, *_, **__):
            raise KeyboardInterrupt

    engine._flights[0] = flight._replace(tokens=Slow())
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    assert caches is not engine._device.state and len(engine._flights) == 2
    assert engine._intact  # nothing has to be read again
    engine._flights[0] = flight
    returned += engine.run()
    check(engine, jobs, returned)
    prompts = sum(len(job.generation.prompt) for job in jobs)
    assert sum(s.prefill_tokens for s in since(engine, flight.stats.start)) == prompts


def since(engine, start):
    return [step for step in engine.stats.steps if step.start >= start]
