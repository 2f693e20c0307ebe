"""Requests served over many steps end where the same requests end in one go.

`Server` is a small continuous-batching server: bucketed shapes with padding, slot
allocation, chunked prefill beside decodes, speculative drafts that are rejected in the
next step, sequences that are skipped for a step.
"""

import dataclasses

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from jax_causal_conv import (
    PAD_SLOT_ID,
    build_metadata,
    causal_conv1d_fn,
    causal_conv1d_update,
)
from tests.support import cases, checks, reference
from tests.support.cases import FLOATS
from tests.support.draws import exhaustive

pytestmark = pytest.mark.forward_only

BUCKET, MAX_SEQS, NUM_SLOTS, CHANNELS, WIDTH, STATE_LEN = 24, 4, 6, 16, 4, 7
MAX_DRAFTS = STATE_LEN - (WIDTH - 1)


@dataclasses.dataclass(eq=False)
class Request:
    x: np.ndarray
    slot: int
    done: int = 0  # tokens whose output is final
    rejected: int = 0  # drafts in the slot that the next step must roll back
    drafted: bool = False
    started: bool = False
    out: list = dataclasses.field(default_factory=list)

    @property
    def left(self):
        return len(self.x) - self.done


@dataclasses.dataclass
class Work:
    """What one request does in one step: `tokens` of its own, then `drafts`."""

    request: Request
    tokens: int
    drafts: int = 0
    skipped: bool = False


class Server:
    def __init__(self, implementation, seed, dtype=FLOATS[0]):
        self.implementation = implementation
        self.rng = np.random.default_rng(seed)
        self.dtype = dtype
        self.weight = cases.floats(self.rng, (CHANNELS, WIDTH), dtype)
        self.bias = cases.floats(self.rng, CHANNELS, dtype)
        # What former users left in the slots must not matter.
        shape = (NUM_SLOTS, STATE_LEN, CHANNELS)
        self.states = cases.random_patterns(self.rng, shape, dtype)
        self.free = list(range(NUM_SLOTS))

    def admit(self, length, slot_choice=0):
        x = cases.floats(self.rng, (length, CHANNELS), self.dtype)
        slot = self.free.pop(slot_choice % len(self.free))
        return Request(x, slot)

    def finish(self, request):
        """Checks outputs and final state against the request in one go."""
        assert request.left == 0
        zeros = np.zeros((1, STATE_LEN, CHANNELS), self.dtype)
        case = (request.x, self.weight, self.bias, zeros, [0, len(request.x)])
        exact, state = reference.causal_conv1d_fn(*case)
        magnitude, _ = reference.causal_conv1d_fn(*map(np.abs, case), activation=None)
        out = np.concatenate(request.out)
        checks.assert_output(out, exact, magnitude, WIDTH, "silu", request.slot)
        if request.rejected == 0:
            # A rollback zero-fills old rows that the filter no longer needs.
            rows = WIDTH - 1 if request.drafted else STATE_LEN
            got = self.states[request.slot, STATE_LEN - rows :]
            checks.assert_same_bits(got, state[0, STATE_LEN - rows :])
        self.free.append(request.slot)

    def inputs_of(self, work):
        drafts = cases.floats(self.rng, (work.drafts, CHANNELS), self.dtype)
        start = work.request.done
        return np.concatenate([work.request.x[start : start + work.tokens], drafts])

    def settle(self, work, out):
        if work.skipped:
            np.testing.assert_array_equal(out, 0)
        elif len(out):
            work.request.out.append(out[: work.tokens])
            work.request.done += work.tokens
            work.request.rejected = work.drafts
            work.request.drafted |= work.drafts > 0
            work.request.started = True

    def step(self, batch, head=0, with_metadata=False):
        """One packed call: every Work is a sequence, in order."""
        parts = [self.inputs_of(work) for work in batch]
        x = cases.floats(self.rng, (BUCKET, CHANNELS), self.dtype)  # padding is noise
        x[head : head + sum(map(len, parts))] = np.concatenate([x[:0], *parts])
        offsets = np.cumsum([head, *map(len, parts)])
        offsets = np.append(offsets, [offsets[-1]] * (MAX_SEQS - len(batch)))
        offsets = offsets.astype(np.int32)
        padding = [PAD_SLOT_ID] * (MAX_SEQS - len(batch))
        slots = [PAD_SLOT_ID if w.skipped else w.request.slot for w in batch] + padding
        started = [w.request.started for w in batch] + [False] * len(padding)
        rejected = [w.request.rejected for w in batch] + [0] * len(padding)
        metadata = build_metadata(offsets, BUCKET, block_m=8) if with_metadata else None
        out, self.states = checks.to_host(
            checks.jitted(causal_conv1d_fn)(
                x,
                self.weight,
                self.bias,
                self.states,
                offsets,
                cache_indices=np.array(slots, np.int32),
                has_initial_state=np.array(started),
                num_rejected_tokens=np.array(rejected, np.int32),
                metadata=metadata,
                implementation=self.implementation,
            )
        )
        for i, work in enumerate(batch):
            self.settle(work, out[offsets[i] : offsets[i + 1]])
        outside = np.r_[out[:head], out[offsets[-1] :]]
        np.testing.assert_array_equal(outside, 0)

    def decode(self, batch):
        """One update call with as many tokens in every row, padded to MAX_SEQS rows."""
        parts = [self.inputs_of(work) for work in batch]
        x = cases.floats(self.rng, (MAX_SEQS, len(parts[0]), CHANNELS), self.dtype)
        x[: len(batch)] = parts
        padding = [PAD_SLOT_ID] * (MAX_SEQS - len(batch))
        slots = [PAD_SLOT_ID if w.skipped else w.request.slot for w in batch] + padding
        rejected = [w.request.rejected for w in batch] + [0] * len(padding)
        out, self.states = checks.to_host(
            checks.jitted(causal_conv1d_update)(
                x,
                self.states,
                self.weight,
                self.bias,
                "silu",
                conv_state_indices=np.array(slots, np.int32),
                num_rejected_tokens=np.array(rejected, np.int32),
                implementation=self.implementation,
            )
        )
        for i, work in enumerate(batch):
            self.settle(work, out[i])
        np.testing.assert_array_equal(out[len(batch) :], 0)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_request_token_by_token_equals_one_go(implementation, dtype):
    for op in ("packed", "update"):
        server = Server(implementation, 1, dtype)
        request = server.admit(12)
        server.step([Work(request, 1)])
        while request.left:
            work = [Work(request, 1)]
            server.step(work) if op == "packed" else server.decode(work)
        server.finish(request)


@pytest.mark.parametrize("seed", range(5))
def test_request_in_chunks_with_random_cuts_equals_one_go(implementation, seed):
    server = Server(implementation, seed, FLOATS[seed % 3])
    request = server.admit(60)
    while request.left:
        chunk = min(int(server.rng.integers(1, 20)), request.left)
        server.step([Work(request, chunk)], head=seed, with_metadata=seed % 2 == 0)
    server.finish(request)


def test_prefill_and_decodes_in_one_call_equal_each_alone(implementation):
    server = Server(implementation, 2)
    one, two, three = server.admit(10), server.admit(30, 3), server.admit(5, 1)
    server.step([Work(one, 8), Work(two, 11)])
    server.step([Work(one, 1), Work(three, 3), Work(two, 13)])
    server.step([Work(two, 6), Work(one, 1), Work(three, 2)])
    for request in (one, two, three):
        server.finish(request)


def test_rejected_drafts_leave_no_trace(implementation):
    server = Server(implementation, 3)
    one, two = server.admit(16), server.admit(16)
    server.step([Work(one, 4, drafts=3), Work(two, 5)])
    server.step([Work(one, 1, drafts=4), Work(two, 1, drafts=2)])
    server.step([Work(one, 2, drafts=1), Work(two, 1, drafts=3, skipped=True)])
    server.decode([Work(two, 2, drafts=1), Work(one, 2, drafts=1)])
    server.decode([Work(one, 2, skipped=True), Work(two, 2)])
    server.step([Work(two, 6), Work(one, 7)])
    server.finish(one)
    server.finish(two)


def test_reused_slot_forgets_its_former_request(implementation):
    server = Server(implementation, 4)
    for _ in range(4):
        request = server.admit(9, slot_choice=server.free.index(0))
        server.step([Work(request, 2)])
        server.step([Work(request, 7)])
        server.finish(request)


def draw_step(data, server, active, draining):
    """A random batch out of the active requests, in random order."""
    batch, room = [], BUCKET - 2
    for number in data.draw(st.permutations(range(len(active))), label="order"):
        request = active[number]
        tokens = min(request.left, room)
        if not draining:
            tokens = data.draw(st.integers(0, min(tokens, 9)), label="tokens")
        most = min(MAX_DRAFTS, room - tokens) if tokens and not draining else 0
        drafts = data.draw(st.integers(0, most), label="drafts")
        skipped = not draining and data.draw(st.booleans(), label="skipped")
        if tokens or data.draw(st.booleans(), label="empty sequence"):
            batch.append(Work(request, tokens, drafts, skipped))
            room -= tokens + drafts
    return batch


def run_random_schedule(data, implementation, steps):
    dtype = data.draw(st.sampled_from(FLOATS), label="dtype")
    server = Server(implementation, data.draw(st.integers(0, 99), label="seed"), dtype)
    active = []
    for number in range(100):
        draining = number >= steps
        while not draining and len(active) < MAX_SEQS and data.draw(st.booleans()):
            length = data.draw(st.integers(1, 30), label="length")
            slot = data.draw(st.integers(0, NUM_SLOTS - 1), label="slot")
            active.append(server.admit(length, slot))
        if draining and not active:
            return
        batch = draw_step(data, server, active, draining)
        same = {work.tokens + work.drafts for work in batch}
        decodes = all(work.request.started for work in batch) and batch
        if decodes and len(same) == 1 and same <= {1, 2, 3} and not draining:
            server.decode(batch)
        else:
            head = data.draw(st.integers(0, 2), label="head")
            server.step(batch, head, data.draw(st.booleans(), label="metadata"))
        for request in [request for request in active if not request.left]:
            active.remove(request)
            server.finish(request)
    raise AssertionError(f"requests that never end: {active}")


def test_random_mixed_batches_over_many_steps_equal_one_go(implementation):
    fast = exhaustive(implementation)

    @settings(
        max_examples=60 if fast else 15,
        phases=[Phase.generate, Phase.shrink] if fast else [Phase.generate],
        deadline=None,
        derandomize=True,
        database=None,
    )
    @given(st.data())
    def serve(data):
        run_random_schedule(data, implementation, steps=8)

    serve()
