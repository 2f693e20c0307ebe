"""Checks that only a real GPU can make: `python -m tests.on_device`.

Donated buffers keep their address, others their contents; outputs and the gradient of x
are written to the last element, in memory that held NaN; many repetitions give the same
bits, of the SSD as well; offsets pass 2³¹ elements in real memory; where there are two
GPUs, what `tests.on_devices` checks. `--short` makes a run that a memory checker can
follow (`compute-sanitizer python -m tests.on_device --short`).
The rest of the suite runs there as well: `pytest -k triton`, `python -m
tests.support.fuzz`.
"""

import argparse
import functools
import itertools
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

import jax_causal_conv as jcc
from jax_causal_conv.mamba2 import DraftStates

_WIDTH = 4
_call = functools.partial(
    jcc.causal_conv1d_fn, activation="silu", implementation="triton"
)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _normal(shape: tuple[int, ...], seed: int) -> jax.Array:
    """Random bfloat16, by hashing: quick and small for arrays of any size."""
    row = jax.lax.broadcasted_iota(jnp.uint32, shape, 0)
    rest = jnp.arange(np.prod(shape[1:]), dtype=jnp.uint32).reshape(1, *shape[1:])
    bits = (row * jnp.uint32(0x9E3779B1) ^ rest * jnp.uint32(0x85EBCA77)) + jnp.uint32(
        seed
    )
    bits = (bits ^ bits >> 15) * jnp.uint32(0x2C1B3C6D)
    bits = (bits ^ bits >> 13) * jnp.uint32(0x297A2D39)
    return ((bits >> 16).astype(jnp.float32) / 32768 - 1).astype(jnp.bfloat16)


def _batch(dim: int, lengths: list[int], slots: int) -> dict:
    rng = np.random.default_rng(0)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return {
        "x": _normal((int(offsets[-1]), dim), 1),
        "weight": _normal((dim, _WIDTH), 2),
        "bias": _normal((dim,), 3),
        "query_start_loc": offsets,
        "cache_indices": rng.permutation(slots)[: len(lengths)].astype(np.int32),
        "has_initial_state": rng.random(len(lengths)) < 0.7,
        "metadata": jcc.build_metadata(offsets, int(offsets[-1])),
    }


@jax.jit
def _same(one, other) -> jax.Array:
    """Have two trees the same bits?"""

    def equal(a, b):
        kind = f"uint{8 * a.dtype.itemsize}"
        cast = functools.partial(jax.lax.bitcast_convert_type, new_dtype=kind)
        return (cast(a) == cast(b)).all()

    return jnp.array(jax.tree.leaves(jax.tree.map(equal, one, other))).all()


_MIXED = [1] * 60 + [449, 77, 3, 2, 130]


def donation() -> str:
    """The donated cache is updated in place, another one not at all."""
    batch = _batch(1000, _MIXED, 128)
    step = jax.jit(lambda states, batch: _call(conv_states=states, **batch))
    donated = jax.jit(
        lambda states, batch: _call(conv_states=states, **batch), donate_argnums=0
    )
    states, kept = _normal((128, 3, 1000), 4), _normal((128, 3, 1000), 4)
    out, new = step(states, batch)
    assert _same(states, kept), "a cache that was not donated has changed"
    assert new.unsafe_buffer_pointer() != states.unsafe_buffer_pointer()
    before = states.unsafe_buffer_pointer()
    out_in_place, new_in_place = donated(states, batch)
    assert new_in_place.unsafe_buffer_pointer() == before, "the cache was copied"
    assert _same((out, new), (out_in_place, new_in_place))
    return "one address before and after"


def poison() -> str:
    """Outputs that are made where NaN lay hold none, whatever nobody owns in them."""
    number = np.arange(len(_MIXED), dtype=np.int32)
    slots = {
        "mixed": number,
        "with skipped sequences": np.where(number % 3, number, -1),
        "nothing but padding": np.full_like(number, -1),
    }
    count = 0
    for dim, (name, indices) in itertools.product((1000, 1001, 5376), slots.items()):
        batch = _batch(dim, _MIXED, 128)
        # Tokens of nobody in front and behind.
        batch["query_start_loc"] = np.clip(batch["query_start_loc"], 3, 700)
        batch["cache_indices"] = indices
        del batch["metadata"]
        states = _normal((128, 3, dim), 4)

        def forward(batch, states, implementation):
            call = functools.partial(_call, implementation=implementation)
            return call(conv_states=states, **batch)[0]

        def backward(batch, states, implementation):
            def of_x(x):
                return forward({**batch, "x": x}, states, implementation)

            return jax.vjp(of_x, batch["x"])[1](batch["x"])[0]

        for function in (forward, backward):
            step = jax.jit(function, static_argnums=2)
            want = np.asarray(step(batch, states, "xla"), np.float32)
            step(batch, states, "triton").block_until_ready()
            # What is freed last is used first.
            bad = [jnp.full(want.shape, jnp.nan, jnp.bfloat16) for _ in range(4)]
            jax.block_until_ready(bad)
            places = [array.unsafe_buffer_pointer() for array in bad]
            del bad
            got = step(batch, states, "triton")
            message = f"{function.__name__}, {name}, D = {dim}"
            start, size = got.unsafe_buffer_pointer(), got.nbytes
            reused = any(abs(start - place) < size for place in places)
            assert reused, f"{message}: made elsewhere, so nothing is known"
            got = np.asarray(got, np.float32)
            np.testing.assert_allclose(got, want, 0.02, 0.02, err_msg=message)
            count += 1
    return f"{count} outputs agree with XLA's"


def repetitions(count: int) -> str:
    """Forward, decode and both backward passes, the same bits every time."""
    for dim in (1000, 5376):
        batch = _batch(dim, _MIXED, 128)
        states = _normal((128, 3, dim), 4)
        rows = _normal((3, 700, dim), 5)
        few = _batch(dim, [1] * 100, 128)

        def everything(states, batch, few, rows):
            def packed(x, weight, bias, states):
                rest = {**batch, "x": x, "weight": weight, "bias": bias}
                return _call(conv_states=states, **rest)

            arguments = batch["x"], batch["weight"], batch["bias"], states
            forward, pullback = jax.vjp(packed, *arguments)
            decoded = jcc.causal_conv1d_update(
                few["x"],
                states,
                few["weight"],
                few["bias"],
                "silu",
                conv_state_indices=few["cache_indices"],
                implementation="triton",
            )
            dense = jax.vjp(
                lambda x, weight, bias: jcc.causal_conv1d(
                    x, weight, bias, activation="silu", implementation="triton"
                ),
                rows,
                batch["weight"],
                batch["bias"],
            )
            return (
                forward,
                pullback(forward),
                _call(conv_states=states, **few),
                decoded,
                dense[0],
                dense[1](rows),
            )

        step = jax.jit(everything)
        first = step(states, batch, few, rows)
        results = [_same(step(states, batch, few, rows), first) for _ in range(count)]
        wrong = count - int(sum(map(int, results)))
        assert not wrong, f"{wrong} of {count} runs differ from the first (D = {dim})"
    return f"{count} repetitions each of 2 sizes are identical"


def ssd_repetitions(count: int, sizes: Sequence[tuple[int, int, int, int]]) -> str:
    """Every kernel of the SSD, the same bits every time.

    Args:
        count: so many times.
        sizes: heads, channels of a head, groups and state size, of each that is tried.
    """
    call = functools.partial(
        jcc.ssd_packed, dt_softplus=True, max_prefills=5, implementation="triton"
    )
    drafts = 2
    slots = 3 * len(_MIXED)  # of sequences, of snapshots, and to be written
    number = np.arange(len(_MIXED), dtype=np.int32)
    offsets = np.concatenate([[0], np.cumsum(_MIXED)]).astype(np.int32)
    batch = {
        "query_start_loc": offsets,
        "cache_indices": number,
        "has_initial_state": number % 3 > 0,
    }
    few = {**batch, "query_start_loc": np.arange(len(_MIXED) + 1, dtype=np.int32)}
    moved = {
        "write_indices": 2 * len(_MIXED) + number,
        "snapshot_ends": np.array(_MIXED, np.int32) // 2,
        "snapshot_indices": len(_MIXED) + number,
    }
    for heads, dim, groups, size in sizes:
        tokens = int(offsets[-1])
        arrays = {
            "x": _normal((tokens, heads, dim), 1),
            "dt": _normal((tokens, heads), 2),
            "A": -jnp.arange(1, heads + 1, dtype=jnp.float32),
            "B": _normal((tokens, groups, size), 3),
            "C": _normal((tokens, groups, size), 4),
            "D": jnp.ones(heads, jnp.float32),
        }
        states = _normal((slots, heads, dim, size), 5).astype(jnp.float32)
        recent = [
            _normal((slots, drafts, *arrays[name].shape[1:]), 6)
            for name in ("x", "dt", "B")
        ]

        def everything(arrays, states, recent):
            def rows(arrays):
                long = {
                    name: array[None] if array.ndim > 1 else array
                    for name, array in arrays.items()
                }
                return jcc.ssd(**long, dt_softplus=True, implementation="triton")

            one_each = {
                n: a[: len(_MIXED)] if a.ndim > 1 else a for n, a in arrays.items()
            }
            y, pullback = jax.vjp(rows, arrays)
            ring = DraftStates(states, recent[0], abs(recent[1]), recent[2])
            rejected = {"num_rejected_tokens": number % (drafts + 1)}
            return (
                call(**arrays, ssm_states=states, **batch),
                call(**arrays, ssm_states=states, **batch, **moved),
                call(**arrays, ssm_states=ring, **batch, **rejected),
                call(**one_each, ssm_states=states, **few, max_prefills=0),
                call(**one_each, ssm_states=ring, **few, **rejected, max_prefills=0),
                y,
                pullback(y),
            )

        step = jax.jit(everything)
        first = step(arrays, states, recent)
        finite = [jnp.isfinite(array).all() for array in jax.tree.leaves(first)]
        assert all(finite), f"NaN or inf in result {finite.index(False)}"
        results = [_same(step(arrays, states, recent), first) for _ in range(count)]
        wrong = count - int(sum(map(int, results)))
        assert not wrong, f"{wrong} of {count} runs differ from the first ({heads=})"
    return f"{count} repetitions each of {len(sizes)} sizes are identical"


def large() -> str:
    """Tokens, slots and gradients behind element 2³¹, against a batch of their own."""
    dim, tail = 5376, 1000
    tokens = 2**31 // dim + tail  # the last sequence begins before, and ends behind
    lengths = [tokens - tail - 5, 5, tail]
    slots = 2**31 // (3 * dim) + 10
    batch = _batch(dim, lengths, 8)
    batch["cache_indices"] = np.array([0, slots - 1, slots - 2], np.int32)
    batch["has_initial_state"] = np.array([True, True, True])
    step = jax.jit(
        lambda states, batch: _call(conv_states=states, **batch), donate_argnums=0
    )
    states = _normal((slots, 3, dim), 4)
    last = states[-2:]
    out, states = step(states, batch)
    small = _batch(dim, lengths[1:], 2)
    small["x"] = batch["x"][-(tail + 5) :]
    small["cache_indices"] = np.array([1, 0], np.int32)
    small["has_initial_state"] = np.array([True, True])
    want, want_states = step(last, small)
    assert _same(out[-(tail + 5) :], want), "tokens behind element 2^31 are wrong"
    assert _same(states[-2:], want_states), "slots behind element 2^31 are wrong"
    del states

    @jax.jit
    def gradients(x, dy):
        dense = functools.partial(
            jcc.causal_conv1d, activation="silu", implementation="triton"
        )
        return jax.vjp(lambda x: dense(x, batch["weight"], batch["bias"]), x)[1](dy)[0]

    dx = gradients(batch["x"][None], out[None])[0, -tail:]
    x, dy = batch["x"][-2 * tail :], out[-2 * tail :]
    assert _same(dx, gradients(x[None], dy[None])[0, -tail:]), "dx behind 2^31 is wrong"
    return f"x of {tokens * dim:,} and states of {slots * 3 * dim:,} elements"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--short", action="store_true", help="few, and small")
    parser.add_argument("--repetitions", type=int, default=1000)
    arguments = parser.parse_args()
    if jax.default_backend() != "gpu":
        parser.error("needs a GPU")
    count = 2 if arguments.short else arguments.repetitions
    checks = [donation, functools.partial(repetitions, count)]
    # Two groups of odd sizes, whose sequences are cut into stretches; and Mamba2-2.7B.
    sizes = [(6, 50, 2, 100), (80, 64, 1, 128)]
    sizes = sizes[: 1 if arguments.short else None]
    checks.append(functools.partial(ssd_repetitions, max(2, count // 10), sizes))
    if not arguments.short:
        checks += [poison, large]
    if len(jax.devices()) > 1 and not arguments.short:
        from tests import on_devices

        checks += on_devices.CHECKS
    for check in checks:
        began = time.perf_counter()
        name = getattr(check, "func", check).__name__
        found = check()
        print(f"{name}: {found} ({time.perf_counter() - began:.0f} s)", flush=True)


if __name__ == "__main__":
    main()
