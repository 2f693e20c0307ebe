"""States that move: pausing, forks, the prefix cache; and any mixture with drafts."""

import contextlib
import dataclasses
import time
import types

import pytest

nnx = pytest.importorskip("flax.nnx")

import jax
import jax.numpy as jnp
import numpy as np

from jax_causal_conv import PAD_SLOT_ID
from jax_causal_conv.mamba2 import (
    Engine,
    Mamba2Config,
    Mamba2LM,
    QueueFull,
    Request,
    SamplingParams,
)
from jax_causal_conv.mamba2.engine import prefixes
from tests.support.interruptions import Interrupter, Timer
from tests.support.recall import VOCAB, Recall, answer

pytestmark = pytest.mark.usefixtures("quick_compilation")

BLOCK = 4


class Guesses:
    """A draft that knows the answers, and is wrong in some places."""

    def __init__(self, seed):
        self.rng = np.random.default_rng(seed)
        self.answers = {}

    def __call__(self, requests):
        guesses = []
        for tokens, limit, sampling in requests:
            future = self.answers.get((sampling.seed, tokens.tobytes()), [])
            count = int(self.rng.integers(0, limit + 1))
            wrong = self.rng.random(count) < 0.3
            known = (future + [0] * count)[:count]
            guesses.append((np.array(known, int) + wrong) % VOCAB)
        return guesses

    def learn(self, generation, tokens):
        for i in range(len(tokens) + 1):
            text = np.array([*generation.prompt, *tokens[:i]], np.int32)
            self.answers[generation.seed, text.tobytes()] = tokens[i:]


def make(prefix_slots=4, draft=None, **sizes):
    budget = 12 if draft is None else 21
    sizes = {"num_slots": 3, "max_tokens_per_step": budget, "max_drafts": 3, **sizes}
    usual = {
        "token_buckets": [sizes["max_tokens_per_step"]],
        "decode_buckets": [sizes["num_slots"]],
        "max_waiting": 20,
        "prefix_slots": prefix_slots,
        "prefix_block": BLOCK,
    }
    return Engine(Recall(), draft=draft, **{**usual, **sizes})


@pytest.fixture(scope="module")
def shared_engine():
    return make()


@pytest.fixture
def engine(shared_engine):
    """An engine with an empty prefix cache, which a test must leave idle."""
    shared_engine._schedule.shares[0].prefixes.clear()
    shared_engine._blocks._seen.clear()
    shared_engine.stats.steps.clear()
    yield shared_engine
    assert shared_engine.idle
    check_slots(shared_engine)


def check_slots(engine):
    """Every slot is free or has one owner."""
    schedule = engine._schedule.shares[0]
    cache = schedule.prefixes
    held = [g.slot % schedule._num_slots for g in schedule.running.values()]
    assert sorted([*held, *schedule.free]) == list(range(schedule._num_slots))
    snapshots = [s for found in cache._found.values() for s in found]
    slots = [s.slot for s in snapshots if s.slot != PAD_SLOT_ID]
    assert sorted([*slots, *cache.free]) == list(cache._slots)
    assert {s for s in snapshots if s.ready} == set(cache._by_use)
    promised = {s for own in cache._promised.values() for s in own}
    assert {s for s in snapshots if not s.ready} == promised
    assert set(cache._promised) <= set(schedule.running)


def poison(engine):
    """Another state in all slots but those whose states are needed."""
    state = engine._device.state
    needed = [g.slot for g in engine._schedule.running]
    needed += [
        snapshot.slot for snapshot in engine._schedule.shares[0].prefixes._by_use
    ]
    free = np.setdiff1d(np.arange(len(state.newest)), needed)
    engine._device.state = state._replace(cache=state.cache.at[free].set(12345))


def prompt_of(length, seed=0):
    return np.random.default_rng(seed).integers(0, VOCAB, length)


def read(engine):
    """How many tokens of prompts were read."""
    return sum(step.prefill_tokens for step in engine.stats.steps)


def assert_right(generations):
    for generation in generations:
        assert generation.tokens == answer(generation.request, generation.seed)
        assert generation.finish_reason in ("length", "stop")


# ---- Forks -------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 2, 5, 8, 30])
def test_forks_read_their_prompt_once_and_draw_with_seeds_of_their_own(engine, length):
    sampling = SamplingParams(1.0, seed=2**32 - 2)
    request = Request(prompt_of(length), 6, sampling)
    generations = engine.submit(request, n=5)  # more than there are slots
    engine.run()
    assert [g.seed for g in generations] == [2**32 - 2, 2**32 - 1, 0, 1, 2]
    assert_right(generations)
    assert len({tuple(g.tokens) for g in generations}) == 5
    assert read(engine) == length + 4
    assert engine.stats.prefix_hits == (4 if length > 1 else 0)
    assert engine.stats.prefix_tokens == 4 * (length - 1)
    assert [g.reused for g in generations] == [0, *[length - 1] * 4]


def test_greedy_forks_are_equal_and_those_without_a_seed_differ(engine):
    greedy = engine.submit(Request(prompt_of(7), 5), n=3)
    free = engine.submit(Request(prompt_of(7), 9, SamplingParams(1.5)), n=3)
    (alone,) = engine.submit(Request(prompt_of(7), 5), n=1)
    engine.run()
    assert_right([*greedy, *free, alone])
    assert len({tuple(g.tokens) for g in greedy}) == 1
    assert len({tuple(g.tokens) for g in free}) == 3


def test_what_is_wrong_with_n_is_refused(engine):
    request = Request([1, 2], 2)
    for wrong in 2.0, "2", True, [2], np.float32(2):
        with pytest.raises(TypeError, match="n must be an integer, got"):
            engine.submit(request, n=wrong)
    for wrong in 0, -1, np.int64(-5):
        with pytest.raises(ValueError, match="n must be at least 1, got"):
            engine.submit(request, n=wrong)
    with pytest.raises(QueueFull):
        engine.submit(request, n=24)
    assert engine.idle
    assert len(engine.submit(request, n=np.int8(23))) == 23  # 3 slots, 20 may wait
    engine.run()
    plain = make(prefix_slots=0)
    with pytest.raises(ValueError, match="n > 1 needs an engine with prefix_slots"):
        plain.submit(request, n=2)
    assert len(plain.submit(request, n=1)) == 1
    assert plain.run()


# ---- The prefix cache --------------------------------------------------------------


def test_a_repeated_and_a_continued_prompt_are_not_read_again(engine):
    first = engine.submit(Request(prompt_of(30), 4))
    engine.run()
    assert read(engine) == 30 and engine.stats.prefix_hits == 0
    again = engine.submit(Request(prompt_of(30), 7))
    continued = engine.submit(Request([*prompt_of(30), *first.tokens, 5], 4))
    other = engine.submit(Request([*prompt_of(29)[:-1], 60], 4))
    engine.run()
    assert_right([first, again, continued, other])
    assert (again.reused, continued.reused, other.reused) == (29, 29, 0)
    assert engine.stats.prefix_hits == 2 and engine.stats.prefix_tokens == 58
    assert read(engine) == 30 + 1 + 6 + 29


def test_a_shared_beginning_is_read_twice_and_then_never(engine):
    """The second prompt shows how long it is, to the block, and leaves the snapshot."""
    system = prompt_of(22)
    requests = [Request([*system, *prompt_of(5, i)], 3) for i in range(1, 6)]
    reused = []
    for request in requests:
        generation = engine.submit(request)
        engine.run()
        assert_right([generation])
        reused.append(generation.reused)
    assert reused == [0, 0, 20, 20, 20]


def test_a_burst_with_a_shared_beginning_reads_it_once(engine):
    system = prompt_of(40)
    requests = [Request([*system, *prompt_of(3, i)], 3) for i in range(1, 9)]
    generations = [engine.submit(request) for request in requests]
    engine.run()
    assert_right(generations)
    assert [g.reused for g in generations] == [0, *[40] * 7]
    assert read(engine) == 40 + 8 * 3


@pytest.mark.parametrize("what", ["cancel", "pause"])
def test_who_waits_for_a_snapshot_goes_on_if_it_will_not_come(engine, what):
    first, *waiting = engine.submit(Request(prompt_of(40), 3), n=3)
    engine.step()
    assert (first.scheduled, [g.scheduled for g in waiting]) == (12, [0, 0])
    assert getattr(engine, what)(first.id)
    engine.run()
    assert_right(waiting)
    assert [g.reused for g in waiting] == [0, 39]
    assert engine.resume(first.id) == (what == "pause")
    engine.run()
    assert first.tokens == (waiting[0].tokens if what == "pause" else [])


def test_the_least_recently_used_snapshot_makes_room(engine):
    requests = [Request(prompt_of(4, i), 2) for i in range(6)]

    def hit(i):
        generation = engine.submit(requests[i])
        engine.run()
        assert_right([generation])
        return generation.reused > 0

    assert [hit(i) for i in (0, 1, 2, 3)] == [False] * 4  # 4 slots
    assert hit(0)
    assert not hit(4)  # instead of 1
    assert [hit(i) for i in (0, 2, 3, 4)] == [True] * 4
    assert not hit(1)  # instead of 0
    assert [hit(i) for i in (2, 3, 4, 1)] == [True] * 4
    check_slots(engine)


def test_prompts_of_equal_hashes_are_told_apart(engine, monkeypatch):
    same = types.SimpleNamespace(digest=lambda: b"the same for all")
    monkeypatch.setattr(prefixes.hashlib, "blake2b", lambda *_, **__: same)
    requests = [Request(prompt_of(length, i), 3) for i in range(3) for length in (9, 8)]
    generations = [engine.submit(request) for request in requests for _ in range(2)]
    engine.run()
    assert_right(generations)
    assert engine.stats.prefix_hits >= 6


def test_the_longest_snapshot_is_found():
    """Among many that begin alike; compared with a look at each."""
    rng = np.random.default_rng(0)
    blocks = prefixes.Blocks(3)
    found = prefixes.Prefixes(range(9), blocks)
    kept, lengths = [], set()
    for id in range(300):
        prompt = rng.integers(0, 2, rng.integers(1, 12)).astype(np.int32)
        generation = types.SimpleNamespace(
            id=id, prompt=prompt, digests=blocks.digests(prompt)
        )
        blocks.saw(generation.digests)
        begins = [
            len(tokens)
            for tokens in kept
            if len(tokens) < len(prompt) and (tokens == prompt[: len(tokens)]).all()
        ]
        snapshot = found.find(generation)
        assert (0 if snapshot is None else len(snapshot.tokens)) == max(begins or [0])
        lengths.add(max(begins or [0]))
        found.promise(generation, 0)
        if rng.random() < 0.7:
            found.drop(generation)
        kept += [snapshot.tokens for snapshot in found.due(generation)]
    assert lengths >= set(range(9))


def test_only_so_many_blocks_are_remembered(engine, monkeypatch):
    monkeypatch.setattr(prefixes, "BLOCKS_REMEMBERED", 5)
    for i in range(4):
        engine.submit(Request(prompt_of(17, i), 1))
    engine.run()
    assert len(engine._blocks._seen) == 5


def test_sizes_of_the_prefix_cache_are_checked():
    for name, wrong in [("prefix_slots", -1), ("prefix_block", 0)]:
        with pytest.raises(ValueError, match=f"{name}.*got"):
            make(**{name: wrong})
    for name in "prefix_slots", "prefix_block", "max_drafts":
        with pytest.raises(TypeError, match=f"{name} must be an integer, got 2.5"):
            make(**{name: 2.5})


# ---- Pausing -----------------------------------------------------------------------


@pytest.mark.parametrize("steps", range(8))
def test_a_paused_request_goes_on_with_the_states_it_had(engine, steps):
    """Paused while it waits, between the chunks of its prompt, and while it decodes."""
    request = Request(prompt_of(30), 6, SamplingParams(1.0, seed=3))
    generation = engine.submit(request)
    for _ in range(steps):
        engine.step()
    assert engine.pause(generation.id)
    known = list(generation.tokens)
    assert (generation.slot, generation.paused) == (PAD_SLOT_ID, True)
    assert (engine.num_paused, engine.num_running, engine.num_waiting) == (1, 0, 0)
    assert not engine.pause(generation.id)
    # Others use all slots meanwhile, and what they leave there.
    others = [engine.submit(Request(prompt_of(9, i), 4)) for i in range(1, 5)]
    engine.run()
    poison(engine)
    assert_right(others)
    assert generation.tokens == known and generation.finish_reason is None
    assert engine.resume(generation.id) and not engine.resume(generation.id)
    assert engine.num_paused == 0 and not engine.idle
    engine.run()
    assert_right([generation])
    assert generation.saved is None
    assert read(engine) == 30 + 4 * 9


def test_requests_may_be_paused_again_and_again(engine):
    requests = [Request(prompt_of(5, i), 8) for i in range(5)]
    generations = [engine.submit(request) for request in requests]
    rng = np.random.default_rng(0)
    for _ in range(40):
        chosen = generations[rng.integers(5)]
        if not engine.resume(chosen.id):
            engine.pause(chosen.id)
        if rng.random() < 0.3:
            engine.step()
        check_slots(engine)
        assert [g.id for g in engine._schedule.waiting] == sorted(
            g.id for g in engine._schedule.waiting
        )
    for generation in generations:
        engine.resume(generation.id)
    engine.run()
    assert_right(generations)
    assert read(engine) == 25


def test_pausing_what_is_not_there_does_nothing(engine):
    generation = engine.submit(Request([1, 2], 2))
    assert not engine.resume(generation.id)  # It is not paused.
    engine.run()
    for call in engine.pause, engine.resume:
        assert not call(generation.id) and not call(10**9) and not call(-1)
        for wrong in None, 1.0, "1", True, generation:
            with pytest.raises(TypeError, match="id must be an integer, got"):
                call(wrong)
    assert_right([generation])


def test_a_request_that_ends_while_pause_waits_for_it_has_ended(engine):
    generation = engine.submit(Request([1, 2], 1))
    engine.step()
    assert not engine.pause(generation.id)
    assert [event.finish_reason for event in engine.run()] == ["length"]
    assert_right([generation])


def test_a_paused_request_may_be_cancelled(engine):
    generation = engine.submit(Request(prompt_of(5), 9))
    for _ in range(4):
        engine.step()
    engine.pause(generation.id)
    before = len(generation.tokens)
    assert engine.cancel(generation.id) and not engine.resume(generation.id)
    events = engine.run()
    assert events[-1].finish_reason == "cancelled"
    assert generation.tokens == answer(generation.request)[:before]
    assert engine.num_paused == 0 and generation.saved is None


def test_callbacks_may_pause_and_resume(engine):
    def pause(event):
        assert engine.pause(event.id) or paused.finish_reason is not None

    paused = engine.submit(Request([1, 2, 3], 4, on_event=pause))
    other = engine.submit(Request([3], 4, on_event=lambda _: engine.resume(paused.id)))
    engine.run()
    while engine.resume(paused.id):
        engine.run()
    assert_right([paused, other])


# ---- Everything at once ------------------------------------------------------------


def some_requests(rng, count):
    """Prompts that begin alike, repeat and continue each other."""
    systems = [prompt_of(length, length) for length in (0, 9, 16, 31)]
    requests = []
    for _ in range(count):
        system = systems[rng.integers(len(systems))]
        prompt = [*system, *rng.integers(0, VOCAB, int(rng.integers(1, 9)))]
        if requests and rng.random() < 0.3:
            prompt = [*requests[-1].prompt, *prompt[: int(rng.integers(0, 3))]]
        sampled = SamplingParams(1.0, seed=int(rng.integers(2**32)))
        requests.append(
            Request(
                prompt,
                int(rng.integers(1, 9)),
                sampled if rng.random() < 0.5 else SamplingParams(seed=0),
                stop_token_ids=rng.integers(0, VOCAB, 3),
            )
        )
    return requests


@pytest.fixture(scope="module")
def engine_of():
    made = {}

    def get(prefix_slots, drafts):
        if (prefix_slots, drafts) not in made:
            draft = Guesses(7) if drafts else None
            made[prefix_slots, drafts] = make(prefix_slots, draft)
        return made[prefix_slots, drafts]

    return get


def submit(engine, request, n):
    generations = engine.submit(request, n=n)
    if engine._drafting is not None:
        for generation in generations:
            known = answer(request, generation.seed)
            engine._drafting.draft.learn(generation, known)
    return generations


@pytest.mark.parametrize(
    ("prefix_slots", "drafts"),
    [(2, False), (8, True), (0, True)],
)
def test_whatever_happens_beside_it_a_request_draws_the_same(
    engine_of, prefix_slots, drafts
):
    engine = engine_of(prefix_slots, drafts)
    rng = np.random.default_rng(prefix_slots)
    pool = some_requests(rng, 25)
    generations, paused = [], []
    for _ in range(150):
        if rng.random() < 0.3 and engine.num_waiting < 10:
            n = int(rng.integers(1, 4)) if prefix_slots else 1
            generations += submit(engine, pool[rng.integers(len(pool))], n)
        if rng.random() < 0.2 and generations:
            chosen = generations[-int(rng.integers(1, len(generations) + 1))]
            action = rng.choice([engine.cancel, engine.pause, engine.pause])
            if action(chosen.id) and action == engine.pause:
                paused.append(chosen)
        if rng.random() < 0.3 and paused:
            engine.resume(paused.pop(rng.integers(len(paused))).id)
        if rng.random() < 0.3:
            poison(engine)
        engine.step()
        check_slots(engine)
    for generation in paused:
        engine.resume(generation.id)
    engine.run()
    ended = [g.finish_reason for g in generations]
    assert len(ended) - ended.count("cancelled") > 20 and "cancelled" in ended
    for generation in generations:
        whole = answer(generation.request, generation.seed)
        if generation.finish_reason == "cancelled":
            whole = whole[: len(generation.tokens)]
        assert generation.tokens == whole
    stats = engine.stats
    assert (stats.prefix_hits > 5) == (prefix_slots > 0)
    if drafts:
        assert 0.3 < stats.acceptance < 0.9 and stats.tokens_per_step > 1.3


def busy(engine, requests):
    """Pauses, resumes and forks while it steps, in an order of its own."""
    generations = [g for request in requests for g in submit(engine, request, 2)]
    yield generations
    for i in range(8):
        engine.step()
        engine.pause(generations[i % len(generations)].id)
        if i % 2:
            engine.resume(generations[(i - 1) % len(generations)].id)


def finish(engine, generations):
    for generation in generations:
        engine.resume(generation.id)
    engine.run()
    assert_right(generations)
    for generation in generations:
        assert engine.stats.requests.count(generation) == 1
        assert generation.token_times == sorted(generation.token_times)
        assert len(generation.token_times) == len(generation.tokens)
    assert engine.idle and engine._intact
    check_slots(engine)


def run_busy(engine, requests, context):
    work = busy(engine, requests)
    generations = next(work)
    with contextlib.suppress(KeyboardInterrupt), context as interrupter:
        next(work, None)
    finish(engine, generations)
    return interrupter


@pytest.mark.parametrize("drafts", [False, True])
def test_an_interruption_anywhere_changes_no_token(engine_of, drafts):
    engine = engine_of(8 if drafts else 2, drafts)
    requests = some_requests(np.random.default_rng(5), 3)
    total = run_busy(engine, requests, Interrupter()).count
    rng, where, trials = np.random.default_rng(6), set(), 60
    for i in range(trials):
        moment = 1 + (i * total + int(rng.integers(total))) // trials
        engine._schedule.shares[0].prefixes.clear()
        where.add(run_busy(engine, requests, Interrupter(moment)).where)
    assert where >= {"plan", "_collect", "pack"} and len(where) > 10, where


@pytest.mark.parametrize("name", ["SIGALRM", "SIGINT"])
def test_signals_at_many_moments_change_no_token(engine_of, name):
    signal = pytest.importorskip("signal")
    if not hasattr(signal, "setitimer"):
        pytest.skip("signals come to the main thread of POSIX systems")
    engine = engine_of(8, True)
    requests = some_requests(np.random.default_rng(8), 3)
    run_busy(engine, requests, contextlib.nullcontext())  # compiles the steps
    work = busy(engine, requests)
    generations = next(work)
    start = time.perf_counter()
    next(work, None)
    usual = time.perf_counter() - start
    finish(engine, generations)
    rng, hits = np.random.default_rng(9), 0
    with Timer(getattr(signal, name)) as timer:
        for _ in range(20):
            work = busy(engine, requests)
            generations = next(work)
            hits += timer.call(
                rng.uniform(0, usual), lambda work=work: next(work, None)
            )
            finish(engine, generations)
    assert hits >= 4


@pytest.mark.parametrize("what", ["pause", "resume", "submit"])
def test_an_interrupted_call_has_done_all_or_nothing(engine_of, what):
    engine = engine_of(2, False)
    request = Request(prompt_of(5), 4)
    outcomes = set()
    moment = hits = 0
    while hits == moment // 3:
        moment += 3
        ended = len(engine.stats.requests)
        generations = engine.submit(request, n=4)
        engine.step()
        engine.step()
        chosen = generations[hits % 4]
        if what == "resume":
            engine.pause(chosen.id)
        with contextlib.suppress(KeyboardInterrupt), Interrupter(moment) as interrupter:
            if what == "submit":
                engine.submit(request, n=2)
            else:
                getattr(engine, what)(chosen.id)
        hits += interrupter.where is not None
        engine.run()
        if what == "submit":
            outcomes.add(len(engine.stats.requests) - ended)
        else:
            outcomes.add(chosen.finish_reason)
        finish(engine, generations)
    assert hits > 10
    assert outcomes == ({4, 6} if what == "submit" else {None, "length"})


def test_lost_caches_lose_the_snapshots_but_not_what_is_paused(engine, monkeypatch):
    def failing(_params, state, _batch):
        jax.tree.map(lambda a: a.delete(), state)
        raise RuntimeError("out of memory")

    paused, running = (engine.submit(Request(prompt_of(9, i), 6)) for i in (1, 2))
    for _ in range(4):
        engine.step()
    assert engine.pause(paused.id) and paused.tokens
    with monkeypatch.context() as patch:
        patch.setattr(engine._device, "executable", lambda *_: failing)
        with pytest.raises(RuntimeError, match="out of memory"):
            engine.step()
    engine.run()
    before = read(engine)
    again = engine.submit(dataclasses.replace(running.request))
    assert engine.resume(paused.id)
    engine.run()
    assert_right([paused, running, again])
    assert again.reused == 8 and read(engine) == before + 1


# ---- The language model ------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    config = Mamba2Config(
        vocab_size=VOCAB,
        d_model=32,
        n_layers=1,
        d_state=16,
        headdim=16,
        chunk_size=8,
        tie_embeddings=False,
    )
    model = Mamba2LM(config, rngs=nnx.Rngs(0))
    # Logits with a standard deviation of about 5: who is the largest is never in doubt.
    model.lm_head.kernel[...] = model.lm_head.kernel[...] * 50
    mixer = model.layers[0].mixer  # a memory of about 70 tokens
    mixer.A_log[...] = jnp.full_like(mixer.A_log, np.log(0.02))
    mixer.dt_bias[...] = jnp.zeros_like(mixer.dt_bias)
    return model


def serve(model, requests, **how):
    """The tokens of the requests, the last of which are forks, and the statistics."""
    sizes = {"num_slots": 3, "max_tokens_per_step": 16}
    if how.get("draft") is not None:
        sizes["max_tokens_per_step"] = 21
    buckets = {"decode_buckets": [3], "token_buckets": [sizes["max_tokens_per_step"]]}
    engine = Engine(model, **sizes, **buckets, **how)
    generations = [engine.submit(request) for request in requests]
    if how:
        generations += engine.submit(requests[-1], n=2)
    else:
        seed = requests[-1].sampling.seed
        for sampling in (
            SamplingParams(1.0, seed=seed),
            SamplingParams(1.0, seed=seed + 1),
        ):
            again = dataclasses.replace(requests[-1], sampling=sampling)
            generations.append(engine.submit(again))
    for _ in range(12 if how else 0):
        for generation in generations[:3]:
            engine.resume(generation.id) or engine.pause(generation.id)
        poison_with_nan(engine)
        engine.step()
    for generation in generations:
        engine.resume(generation.id)
    engine.run()
    return [generation.tokens for generation in generations], engine.stats


def poison_with_nan(engine):
    needed = [g.slot for g in engine._schedule.running]
    needed += [
        snapshot.slot for snapshot in engine._schedule.shares[0].prefixes._by_use
    ]
    state = engine._device.state
    free = np.setdiff1d(np.arange(len(state.newest)), needed)
    cache = jax.tree.map(lambda a: a.at[free].set(jnp.nan), state.cache)
    engine._device.state = state._replace(cache=cache)


def test_a_language_model_draws_the_same_with_all_of_it(model):
    system = prompt_of(21)
    requests = [Request([*system, *prompt_of(4, i)], 9) for i in range(4)]
    sampling = SamplingParams(1.0, seed=5)
    requests += [
        dataclasses.replace(request, sampling=sampling) for request in requests
    ]
    plain, _ = serve(model, requests)
    assert len({tuple(tokens) for tokens in plain}) >= 8
    features = {"prefix_slots": 6, "prefix_block": 8}
    tokens, stats = serve(model, requests, **features, draft=model, max_drafts=3)
    assert tokens == plain
    # The draft is the model itself, and so is always right.
    assert stats.acceptance == 1 and stats.tokens_per_step > 2.5
    assert stats.prefix_hits >= 5 and stats.prefix_tokens > 80

    length = len(requests[0].prompt)
    forks = [dataclasses.replace(sampling, seed=5 + i) for i in range(2)]
    requested = requests + [
        dataclasses.replace(requests[-1], sampling=f) for f in forks
    ]

    def key(prompt, sampling):
        return (*prompt, sampling.temperature and sampling.seed)

    answers = {
        key(request.prompt, request.sampling): drawn
        for request, drawn in zip(requested, plain, strict=True)
    }

    def spoiled(asked):
        """The answers, each time with an error in another place, or none."""
        guesses = []
        for text, limit, sampling in asked:
            drawn = len(text) - length
            guess = answers[key(text[:length].tolist(), sampling)][drawn:][:limit]
            if (wrong := drawn % 3) < len(guess):
                guess[wrong] = (guess[wrong] + 1) % VOCAB
            guesses.append(guess)
        return guesses

    tokens, stats = serve(model, requests, **features, draft=spoiled, max_drafts=3)
    assert tokens == plain
    assert 0.1 < stats.acceptance < 0.8 and stats.tokens_per_step > 1.2
    assert stats.prefix_hits >= 5 and stats.prefix_tokens > 80


def test_logits_are_those_of_the_tokens_that_are_asked_for(model):
    tokens = prompt_of(12)
    wanted = np.array([11, 3, 3, -5, 99, 7])
    logits, _ = jax.jit(model.packed)(
        tokens, model.init_cache(2), np.array([0, 8, 12]), logits_at=wanted
    )
    rows = jax.jit(model)(np.stack([tokens[:8], [*tokens[8:], 0, 0, 0, 0]]))
    places = [(1, 3), (0, 3), (0, 3), (0, 0), (1, 3), (0, 7)]
    want = np.stack([rows[place] for place in places])
    np.testing.assert_allclose(logits, want, atol=1e-4 * abs(want).max())
