"""Small cases of every op, and their gradients by the chain rule of reference.py.

A gradient is a sum of products, accumulated in float32 and rounded once to the dtype
of its primal. So it must lie within one unit in the last place of the float64 result,
plus the error of a float32 sum of that many terms, plus what the float32 error of
`silu'(z)` contributes to each term.
"""

import functools

import jax
import numpy as np
import pytest

import jax_causal_conv
from tests.support import cases, checks, quick, reference
from tests.support.cases import DenseShape, PackedShape, UpdateShape
from tests.support.draws import draw_dense, draw_packed, draw_update, ints, offsets_of

f32 = np.float32

OPS = {
    PackedShape: ("causal_conv1d_fn", "conv_states"),
    UpdateShape: ("causal_conv1d_update", "conv_state"),
    DenseShape: ("causal_conv1d", "initial_state"),
}


def names(case):
    """Names of the op, of its state, and of its float arguments."""
    op, state = OPS[type(case.shape)]
    return op, state, ("x", "weight", "bias", state)


def split(case):
    """Float arguments, to be differentiated, and the others."""
    floats = {name: case.arrays[name] for name in names(case)[2]}
    rest = {k: v for k, v in case.arrays.items() if k not in floats and v is not None}
    return floats, rest


def options(case, implementation, final=True):
    static = case.options | {"implementation": implementation}
    if isinstance(case.shape, DenseShape):
        static["return_final_state"] = final
    return static


@functools.cache
def jitted_pullback(op, static):
    """(floats, rest, cotangents) -> (results, gradients), compiled."""

    def pull(floats, rest, cotangents):
        def run(floats):
            return getattr(jax_causal_conv, op)(**floats, **rest, **dict(static))

        results, pullback = jax.vjp(run, floats)
        return results, pullback(cotangents)[0]

    return quick.jit(pull)


def pull(case, cotangents, implementation, *, metadata=None):
    """Gradients by name; `cotangents` a pair, or an array without a final state."""
    floats, rest = split(case)
    if isinstance(case.shape, PackedShape):
        if metadata is None and case.shape.block_m is not None:
            metadata = jax_causal_conv.build_metadata(
                rest["query_start_loc"], len(floats["x"]), block_m=case.shape.block_m
            )
        rest["metadata"] = metadata
    static = options(case, implementation, isinstance(cotangents, tuple))
    function = jitted_pullback(names(case)[0], tuple(sorted(static.items())))
    return checks.to_host(function(floats, rest, cotangents)[1])


def state_shape(case):
    """Shape and dtype of the returned state."""
    shape, state = case.shape, case.arrays[names(case)[1]]
    if state is not None:
        return state.shape, state.dtype
    x = case.arrays["x"]
    return (len(x), cases.reach(shape), shape.channels), x.dtype


def draw_cotangents(case, seed=0):
    rng = np.random.default_rng([seed, 99])
    x, (shape, dtype) = case.arrays["x"], state_shape(case)
    return cases.floats(rng, x.shape, x.dtype), cases.floats(rng, shape, dtype)


def requests_of(case):
    shape, (_, rest) = case.shape, split(case)
    num_slots, state_len = state_shape(case)[0][:2]
    if isinstance(shape, DenseShape):
        return reference.dense_requests(
            shape.num_rows, shape.num_tokens, state_len, **rest
        )
    pad = {"pad_slot_id": case.options.get("pad_slot_id", reference.PAD_SLOT_ID)}
    if isinstance(shape, PackedShape):
        offsets = rest.pop("query_start_loc")
        return reference.packed_requests(
            shape.num_tokens, num_slots, state_len, offsets, **rest, **pad
        )
    return reference.update_requests(
        shape.num_rows,
        shape.num_queries or 1,
        num_slots,
        state_len,
        cases.reach(shape),
        **rest,
        **pad,
    )


def expected_gradients(case, cotangents):
    """name -> (float64 gradient, allowed float32 error before the last rounding)."""
    if not isinstance(cotangents, tuple):
        size, dtype = state_shape(case)
        cotangents = cotangents, np.zeros(size, dtype)
    floats, _ = split(case)
    _, state_name, order = names(case)
    channels, width = case.shape.channels, case.shape.width
    states = floats[state_name]
    if states is None:
        states = np.zeros(*state_shape(case))
    double = floats["x"].dtype == np.float64
    eps = np.finfo(np.float64 if double else f32).eps
    activation = reference.ACTIVATIONS[case.options["activation"]]
    tokens = int(np.prod(floats["x"].shape[:-1]))

    def run(measure=None, dstates=cotangents[1]):
        return reference.gradients(
            floats["x"].reshape(tokens, channels),
            floats["weight"],
            floats["bias"],
            states,
            requests_of(case),
            case.options["activation"],
            cotangents[0].reshape(tokens, channels),
            dstates,
            dilation=case.options["dilation"],
            residual=case.options["residual"],
            measure=measure,
        )

    def size_of_dz(dy, z, terms):
        return abs(dy * activation.slope(z))

    def error_of_dz(dy, z, terms):
        error = (width + 2) * eps * terms
        if case.options["activation"] == "relu":  # which side of its step is z on?
            return abs(dy) * ((abs(z) <= error) & (terms > 0))
        if not activation.bent:
            return np.zeros_like(dy)
        # Those of z, and relative ones of exponentials. All slopes are less than
        # 2 s (1 + |z|), with s = sigmoid(z) or sigmoid(-z) where they are symmetric.
        sigmoid, relative = reference.sigmoid(z), 1e-15 if double else checks.FAST
        if case.options["activation"] in ("sigmoid", "tanh"):
            sigmoid = reference.sigmoid(-abs(z))
        slope_error = error * activation.bent
        return abs(dy) * (slope_error + 2 * relative * sigmoid * (1 + abs(z)))

    no_states = np.zeros_like(cotangents[1])
    with np.errstate(all="ignore"):
        exact = run()
        sizes = run(reference.Measure(size_of_dz, abs))
        errors = run(reference.Measure(error_of_dz, np.zeros_like), no_states)
    terms = (width + 4, tokens + 4, tokens + 4, width + 4)
    result = {}
    for name, value, size, error, count in zip(
        order, exact, sizes, errors, terms, strict=True
    ):
        if floats[name] is not None:
            allowed = count * eps * size + error
            shape = floats[name].shape
            result[name] = value.reshape(shape), allowed.reshape(shape)
    return result


def assert_gradient(got, exact, allowed, name, what):
    rounded = exact.astype(got.dtype).astype(np.float64)
    ulp = checks.unit_in_last_place(rounded, got.dtype)
    limit = np.where(allowed == 0, 0, allowed + ulp + checks.UNDERFLOW)
    error = abs(got.astype(np.float64) - rounded)
    bad = ~(error <= limit)
    if bad.any():
        where = tuple(int(i) for i in np.argwhere(bad)[0])
        raise AssertionError(
            f"{bad.sum()} of {bad.size} elements of the gradient of {name} are wrong; "
            f"first at {where}: got {got[where]!r}, float64 {exact[where]!r}, allowed "
            f"error {limit[where]!r}; largest error {error[bad].max()!r}\n{what}"
        )


def assert_gradients(got, case, cotangents):
    """Dtypes, shapes and values, and no gradient for what is absent."""
    floats, _ = split(case)
    want = expected_gradients(case, cotangents)
    for name, primal in floats.items():
        if primal is None:
            assert got[name] is None, f"gradient of an absent {name}"
            continue
        kind = (got[name].shape, got[name].dtype)
        wanted = (primal.shape, primal.dtype)
        assert kind == wanted, f"gradient of {name}: {kind}, expected {wanted}\n{case}"
        assert_gradient(got[name], *want[name], name, case)


def check_gradients(case, implementation, *, final=True, metadata=None, seed=0):
    cotangents = draw_cotangents(case, seed)
    if not final:
        cotangents = cotangents[0]
    got = pull(case, cotangents, implementation, metadata=metadata)
    assert_gradients(got, case, cotangents)
    return got, cotangents


# Few tokens and one block of 16 channels: the interpreter takes its time.
SMALL_DENSE = DenseShape(num_rows=2, num_tokens=13, channels=6, width=4, state_len=5)


SMALL_PACKED = PackedShape(
    num_tokens=24, num_seqs=4, num_slots=7, channels=6, width=4, state_len=5
)


MIXED = {  # prefills, a decode, a skipped one, uncovered tokens at head and tail
    "query_start_loc": offsets_of([6, 1, 3, 9], head=2),
    "cache_indices": ints(4, 0, -1, 2),
    "has_initial_state": np.array([True, True, True, False]),
    "num_rejected_tokens": ints(0, 2, 1, 3),
}


ROWS = {"conv_state_indices": ints(4, 0, -1, 2)}


def small_dense(seed=0, **changes):
    return draw_dense(seed, SMALL_DENSE, **changes)


def small_packed(seed=0, *, arrays=None, **changes):
    return draw_packed(seed, SMALL_PACKED, arrays=MIXED | (arrays or {}), **changes)


def small_update(seed=0, *, arrays=None, **changes):
    """Four rows, one of them skipped."""
    sizes = {"num_rows": 4, "num_slots": 6, "channels": 6, "num_queries": 2}
    sizes |= {"width": 4, "state_len": 5, "num_rejected_tokens": False}
    case = draw_update(seed, **(sizes | changes))
    return case.replace(**ROWS | (arrays or {}))


def small_ring(seed=0, positions=(0, 3, -7, 1001), **changes):
    arrays = {"cache_seqlens": ints(*positions)}
    changes = changes | {"cache_seqlens": True, "num_rejected_tokens": False}
    return small_update(seed, arrays=arrays, **changes)


def one_of_each_op(seed=0, **changes):
    rejected = {"num_rejected_tokens": ints(1, 0, 2, 5)}
    return [
        small_dense(seed, **changes),
        small_packed(seed, **changes),
        small_update(
            seed, arrays=rejected, **(changes | {"num_rejected_tokens": True})
        ),
        small_ring(seed, **changes),
    ]


EACH_OP = pytest.mark.parametrize(
    "number", range(4), ids=["dense", "packed", "update", "ring"]
)


def function(case, implementation):
    """(floats, rest) -> (out, state) of a case's op."""
    op = getattr(jax_causal_conv, names(case)[0])
    static = options(case, implementation)
    return lambda floats, rest: op(**floats, **rest, **static)


def weighted(results, cotangents):
    return sum((r * c).sum() for r, c in zip(results, cotangents, strict=True))


def loss_of(case, implementation):
    """(floats, rest, cotangents) -> a number whose gradient is the pullback."""
    run = function(case, implementation)
    return lambda floats, rest, cotangents: weighted(run(floats, rest), cotangents)


def assert_values(results, case, what=""):
    """out within the arithmetic's error, the state bit for bit."""
    exact, state, magnitude = checks.expected(case)
    out, got = checks.to_host(results)
    activation = case.options["activation"]
    residual = case.options["residual"]
    checks.assert_output(
        out, exact, magnitude, case.shape.width, activation, what, residual
    )
    checks.assert_same_bits(got, state, what)


def stack(trees):
    return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)


def pick(tree, i):
    return jax.tree.map(lambda leaf: np.asarray(leaf)[i], tree)
