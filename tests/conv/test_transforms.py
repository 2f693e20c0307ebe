"""Gradients and values of the ops under jax's transformations.

Each result is compared with the same float64 reference as without transformation: a
transformation may change the order of sums, but not what is summed.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_causal_conv
from jax_causal_conv import build_metadata, causal_conv1d, causal_conv1d_fn
from tests.support import checks, quick
from tests.support.draws import draw_dense, draw_packed, ints, offsets_of
from tests.support.gradients import (
    EACH_OP,
    SMALL_PACKED,
    assert_gradient,
    assert_gradients,
    assert_values,
    draw_cotangents,
    expected_gradients,
    function,
    loss_of,
    names,
    one_of_each_op,
    options,
    pick,
    small_dense,
    small_packed,
    small_update,
    split,
    stack,
    weighted,
)

f32, i32 = np.float32, np.int32


@EACH_OP
@pytest.mark.parametrize("remat", [False, True])
def test_value_and_gradient_under_jit_and_remat(implementation, number, remat):
    case = one_of_each_op(1)[number]
    cotangents = draw_cotangents(case)
    loss = loss_of(case, implementation)
    run = function(case, implementation)

    def both(*args):
        return loss(*args), run(*args[:2])

    both = jax.checkpoint(both) if remat else both
    args = (*split(case), cotangents)
    # None is what users run: it compiles as it does for them.
    jit = jax.jit if implementation is None and not remat else quick.jit
    (_, results), got = jit(jax.value_and_grad(both, has_aux=True))(*args)
    assert_values(results, case)
    assert_gradients(checks.to_host(got), case, cotangents)


WAYS = {
    "eager": jax.grad,
    "grad of jit": lambda f: jax.grad(jax.jit(f)),
    "grad of remat of jit": lambda f: jax.grad(jax.checkpoint(jax.jit(f))),
}


@pytest.mark.parametrize("way", WAYS)
def test_gradient_outside_jit(implementation, way):
    case = small_dense(1)
    cotangents = draw_cotangents(case)
    with quick.compilation():  # operation by operation
        got = WAYS[way](loss_of(case, implementation))(*split(case), cotangents)
    assert_gradients(checks.to_host(got), case, cotangents)


def test_gradient_under_cond(implementation):
    case = small_dense(2)
    cotangents = draw_cotangents(case)
    loss = loss_of(case, implementation)

    @jax.jit
    @jax.grad
    def gradient(floats, flag, rest):
        return jax.lax.cond(
            flag, loss, lambda *_: jnp.zeros(()), floats, rest, cotangents
        )

    floats, rest = split(case)
    got = checks.to_host(gradient(floats, True, rest))
    assert_gradients(got, case, cotangents)
    for name, array in gradient(floats, False, rest).items():
        np.testing.assert_array_equal(array, 0, err_msg=name)


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("state_len", [3, 7])
def test_scan_over_time_chunks_carries_the_state(implementation, state_len, remat):
    # 4 chunks of 3 tokens are one row of 12; gradients flow back through the carry.
    case = small_dense(3, num_tokens=12, state_len=state_len, segment_ids=False)
    dout, dstate = cotangents = draw_cotangents(case)

    def loss(floats):
        def step(state, x):
            out, state = causal_conv1d(
                x,
                floats["weight"],
                floats["bias"],
                initial_state=state,
                activation="silu",
                return_final_state=True,
                implementation=implementation,
            )
            return state, out

        chunks = floats["x"].reshape(2, 4, 3, 6).swapaxes(0, 1)
        step = jax.checkpoint(step) if remat else step
        state, outs = jax.lax.scan(step, floats["initial_state"], chunks)
        out = outs.swapaxes(0, 1).reshape(2, 12, 6)
        return weighted((out, state), (dout, dstate)), (out, state)

    got, results = quick.jit(jax.grad(loss, has_aux=True))(split(case)[0])
    assert_values(results, case)
    assert_gradients(checks.to_host(got), case, cotangents)


def test_scan_over_decode_steps_carries_the_cache(implementation):
    # 6 steps of one token each are one step of 6 tokens.
    case = small_update(4, num_queries=6)
    cotangents = draw_cotangents(case)
    floats, rest = split(case)
    step_of = function(case, implementation)

    def loss(floats):
        def step(state, x):
            out, state = step_of(floats | {"x": x, "conv_state": state}, rest)
            return state, out

        xs = floats["x"].swapaxes(0, 1)
        state, outs = jax.lax.scan(step, floats["conv_state"], xs)
        results = outs.swapaxes(0, 1), state
        return weighted(results, cotangents), results

    got, results = quick.jit(jax.grad(loss, has_aux=True))(floats)
    assert_values(results, case)
    assert_gradients(checks.to_host(got), case, cotangents)


def three(draw):
    """Three cases of one shape with different numbers in every array."""
    return [draw(seed) for seed in (5, 6, 7)]


def integers_of(number):
    """Three cases of op `number` whose integers differ too."""
    cases = three(lambda seed: one_of_each_op(seed)[number])
    slots = [ints(4, 0, -1, 2), ints(1, -1, 3, 5), ints(0, 1, 2, 3)]
    if number == 1:
        offsets = [[6, 1, 3, 9], [1, 1, 0, 20], [0, 13, 2, 5]]
        changes = [
            {"cache_indices": s, "query_start_loc": offsets_of(q, head=2 - i)}
            for i, (s, q) in enumerate(zip(slots, offsets, strict=True))
        ]
    elif number > 1:
        changes = [{"conv_state_indices": s} for s in slots]
    else:  # dense: drawn with the case
        changes = [{}] * 3
    return [case.replace(**new) for case, new in zip(cases, changes, strict=True)]


@EACH_OP
def test_vmap_over_every_array(implementation, number):
    batch = integers_of(number)
    run = quick.jit(jax.vmap(function(batch[0], implementation)))
    results = run(*stack([split(case) for case in batch]))
    for i, case in enumerate(batch):
        assert_values(pick(results, i), case, f"example {i}\n{case}")


@EACH_OP
def test_vmap_of_gradients_over_every_array(implementation, number):
    batch = integers_of(number)
    cotangents = [draw_cotangents(case, i) for i, case in enumerate(batch)]
    gradient = quick.jit(jax.vmap(jax.grad(loss_of(batch[0], implementation))))
    floats, rest = stack([split(case) for case in batch])
    got = gradient(floats, rest, stack(cotangents))
    for i, case in enumerate(batch):
        assert_gradients(pick(got, i), case, cotangents[i])


@EACH_OP
def test_gradient_through_vmap_with_shared_parameters(implementation, number):
    # weight and bias are not mapped: their gradients are sums over the examples.
    batch = three(lambda seed: one_of_each_op(seed)[number])
    shared = {name: batch[0].arrays[name] for name in ("weight", "bias")}
    batch = [
        batch[0].replace(**{k: v for k, v in case.arrays.items() if k not in shared})
        for case in batch
    ]
    cotangents = [draw_cotangents(case, i) for i, case in enumerate(batch)]
    floats, rest = stack([split(case) for case in batch])
    floats |= shared
    axes = {name: None if name in shared else 0 for name in floats}
    run = jax.vmap(function(batch[0], implementation), in_axes=(axes, 0))
    gradient = quick.jit(jax.grad(lambda *args: weighted(run(*args[:2]), args[2])))
    got = checks.to_host(gradient(floats, rest, stack(cotangents)))
    want = [
        expected_gradients(case, c) for case, c in zip(batch, cotangents, strict=True)
    ]
    for name in floats:
        exact = np.stack([one[name][0] for one in want])
        allowed = np.stack([one[name][1] for one in want])
        if name in shared:
            # Three more terms of the sum: each adds less than its own bound again.
            exact, allowed = exact.sum(axis=0), 2 * allowed.sum(axis=0)
        assert_gradient(got[name], exact, allowed, name, batch[0])


CACHED_OPS = pytest.mark.parametrize("number", (1, 2, 3))


@CACHED_OPS
def test_vmap_over_one_array_alone(number):
    first, *others = integers_of(number)
    parts = split(first)
    for name in parts[0] | parts[1]:
        batch = [first] + [
            first.replace(**{name: case.arrays[name]}) for case in others
        ]
        stacked = stack([split(case) for case in batch])
        axes = tuple({k: 0 if k == name else None for k in part} for part in parts)
        args = tuple(
            part | {k: a for k, a in mapped.items() if k == name}
            for part, mapped in zip(parts, stacked, strict=True)
        )
        results = quick.jit(jax.vmap(function(first, None), in_axes=axes))(*args)
        for i, case in enumerate(batch):
            assert_values(pick(results, i), case, f"{name}, example {i}")


@CACHED_OPS
@pytest.mark.parametrize("outer", (jax.vmap, lambda f: lambda a: jax.lax.map(f, a)))
def test_nested_vmap_and_map_of_cached_ops(number, outer):
    batch = integers_of(number)
    run = function(batch[0], None)
    rows = stack([split(case) for case in batch])
    pairs = jax.tree.map(lambda a: np.stack([a, a[::-1]]), rows)
    results = quick.jit(outer(jax.vmap(lambda args: run(*args))))(pairs)
    for row, order in enumerate((batch, batch[::-1])):
        for i, case in enumerate(order):
            assert_values(pick(pick(results, row), i), case, f"row {row}, {i}")


MAPPED = [("x",), ("weight",), ("bias",), ("initial_state",), ("segment_ids",)]


@pytest.mark.parametrize("mapped", [*MAPPED, ("weight", "bias"), ("x", "segment_ids")])
def test_vmap_of_the_dense_op_over_some_arrays(implementation, mapped):
    first, *others = three(lambda seed: small_dense(seed, num_tokens=9))
    batch = [first] + [
        first.replace(**{name: case.arrays[name] for name in mapped}) for case in others
    ]
    axes = {name: 0 if name in mapped else None for name in first.arrays}
    arrays = {
        name: np.stack([case.arrays[name] for case in batch]) if axis == 0 else array
        for (name, array), axis in zip(first.arrays.items(), axes.values(), strict=True)
    }
    static = options(first, implementation)
    run = jax.vmap(lambda a: causal_conv1d(**a, **static), in_axes=(axes,))
    results = quick.jit(run)(arrays)
    for i, case in enumerate(batch):
        assert_values(pick(results, i), case, f"example {i} of {mapped}")


def test_nested_vmap_over_batch_and_weights(implementation):
    # x and state of 2 x 3 examples, weights of 3.
    grid = [[small_dense(10 * i + j, num_tokens=7) for j in range(3)] for i in range(2)]
    for row in grid:
        for j in range(3):
            same = {name: grid[0][j].arrays[name] for name in ("weight", "bias")}
            row[j] = row[j].replace(**same)
    floats, rest = stack([stack([split(case) for case in row]) for row in grid])
    for name in ("weight", "bias"):
        floats[name] = floats[name][0]
    cotangents = [
        [draw_cotangents(case, 3 * i + j) for j, case in enumerate(row)]
        for i, row in enumerate(grid)
    ]
    loss = loss_of(grid[0][0], implementation)
    inner = jax.vmap(jax.grad(loss))
    axes = {name: None if name in ("weight", "bias") else 0 for name in floats}
    outer = quick.jit(jax.vmap(inner, in_axes=(axes, 0, 0)))
    got = outer(floats, rest, stack([stack(row) for row in cotangents]))
    for i, row in enumerate(grid):
        for j, case in enumerate(row):
            assert_gradients(pick(got, (i, j)), case, cotangents[i][j])


@pytest.mark.parametrize("axis", [1, 2])
def test_vmap_over_another_axis(implementation, axis):
    batch = three(lambda seed: small_dense(seed, num_tokens=7, segment_ids=False))
    batch = [
        batch[0].replace(x=c.arrays["x"], initial_state=c.arrays["initial_state"])
        for c in batch
    ]
    first = batch[0].arrays

    def run(x, state):
        return causal_conv1d(
            x,
            first["weight"],
            first["bias"],
            initial_state=state,
            activation="silu",
            return_final_state=True,
            implementation=implementation,
        )

    mapped = jax.vmap(run, in_axes=axis, out_axes=axis)
    xs, states = (
        np.stack([c.arrays[name] for c in batch], axis)
        for name in ("x", "initial_state")
    )
    results = quick.jit(mapped)(xs, states)
    results = jax.tree.map(lambda leaf: np.moveaxis(np.asarray(leaf), axis, 0), results)
    for i, case in enumerate(batch):
        assert_values(pick(results, i), case, f"example {i}")


@pytest.mark.parametrize("shared", [False, True])
def test_vmap_of_gradients_over_metadata(implementation, shared):
    # Offsets differ, and the program tables with them; or only the cache does.
    batch = integers_of(1)
    if shared:
        rest = {k: v for k, v in batch[0].arrays.items() if k not in split(batch[0])[0]}
        batch = [case.replace(**rest) for case in batch]
    cotangents = [draw_cotangents(case, i) for i, case in enumerate(batch)]
    run = functools.partial(causal_conv1d_fn, implementation=implementation)

    def loss(floats, rest, metadata, cotangents):
        return weighted(run(**floats, **rest, metadata=metadata), cotangents)

    floats, rest = stack([split(case) for case in batch])
    tables = [
        build_metadata(case.arrays["query_start_loc"], 24, block_m=8) for case in batch
    ]
    axes = (0, 0, 0, 0)
    metadata = stack(tables)
    if shared:
        axes, rest, metadata = (0, None, None, 0), pick(rest, 0), tables[0]
    gradient = quick.jit(jax.vmap(jax.grad(loss), in_axes=axes))
    got = gradient(floats, rest, metadata, stack(cotangents))
    for i, case in enumerate(batch):
        assert_gradients(pick(got, i), case, cotangents[i])


def double_cases():
    kinds = ("x_dtype", "weight_dtype", "bias_dtype", "state_dtype")
    return one_of_each_op(8, **dict.fromkeys(kinds, np.dtype("float64")), channels=2)


@EACH_OP
def test_forward_mode_on_xla_is_the_transpose_of_reverse_mode(number):
    with jax.enable_x64(True):
        case = double_cases()[number]
        cotangents = draw_cotangents(case)
        floats, rest = split(case)
        rng = np.random.default_rng(9)
        tangents = jax.tree.map(lambda a: rng.standard_normal(a.shape), floats)
        run = function(case, "xla")
        _, pushed = quick.jit(lambda f, t: jax.jvp(lambda f: run(f, rest), (f,), (t,)))(
            floats, tangents
        )
        forward = float(weighted(pushed, cotangents))
        want = expected_gradients(case, cotangents)
        reverse = sum((want[name][0] * t).sum() for name, t in tangents.items())
        assert abs(forward - reverse) < 1e-11 * (1 + abs(reverse)), (forward, reverse)


@EACH_OP
def test_forward_mode_on_xla_under_vmap_and_scan(number):
    case = one_of_each_op(9)[number]
    floats, rest = split(case)
    run = function(case, "xla")
    rng = np.random.default_rng(10)
    directions = jax.tree.map(
        lambda a: rng.standard_normal((2, *a.shape)).astype(f32), floats
    )

    def push(direction):
        return jax.jvp(lambda f: run(f, rest), (floats,), (direction,))[1]

    mapped = quick.jit(jax.vmap(push))(directions)
    looped = quick.jit(functools.partial(jax.lax.map, push))(directions)
    for a, b in zip(mapped, looped, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("number", [0, 1, 2, 3])
def test_hessian_on_xla_is_the_difference_of_gradients(number):
    with jax.enable_x64(True):
        case = double_cases()[number]
        cotangents = draw_cotangents(case)
        floats, rest = split(case)
        weight = case.arrays["weight"]
        loss = loss_of(case, "xla")

        def of_weight(weight):
            return loss(floats | {"weight": weight}, rest, cotangents)

        hessian = np.asarray(quick.jit(jax.hessian(of_weight))(weight))
        size = weight.size
        hessian = hessian.reshape(size, size)
        np.testing.assert_allclose(hessian, hessian.T, rtol=1e-10, atol=1e-10)
        step = 1e-5
        for place in (0, size // 2, size - 1):
            moved = np.zeros(size)
            moved[place] = step
            moved = moved.reshape(weight.shape)
            ends = [
                expected_gradients(
                    case.replace(weight=weight + sign * moved), cotangents
                )
                for sign in (1, -1)
            ]
            want = (ends[0]["weight"][0] - ends[1]["weight"][0]) / (2 * step)
            np.testing.assert_allclose(
                hessian[place], want.reshape(-1), rtol=1e-5, atol=1e-7
            )


JAX_SAYS = (TypeError, NotImplementedError, ValueError)


@EACH_OP
@pytest.mark.parametrize("chosen", [None, "interpret"], ids=str)
def test_forward_mode_elsewhere_raises(number, chosen):
    if chosen == "interpret":
        pytest.importorskip("triton")
    case = one_of_each_op(10)[number]
    floats, rest = split(case)
    run = function(case, chosen)
    with pytest.raises(TypeError, match="forward mode"):
        quick.jit(lambda f: jax.jvp(lambda f: run(f, rest), (f,), (f,)))(floats)


@EACH_OP
@pytest.mark.parametrize("chosen", [None, "interpret"], ids=str)
@pytest.mark.parametrize("outer", ["jacfwd", "jacrev"])
def test_second_order_elsewhere_raises_what_jax_says(number, chosen, outer):
    if chosen == "interpret":
        pytest.importorskip("triton")
    case = one_of_each_op(11)[number]
    cotangents = draw_cotangents(case)
    floats, rest = split(case)
    loss = loss_of(case, chosen)

    def of_weight(weight):
        return loss(floats | {"weight": weight}, rest, cotangents)

    with pytest.raises(JAX_SAYS):
        second = getattr(jax, outer)(jax.grad(of_weight))
        jax.eval_shape(second, floats["weight"])


@pytest.mark.parametrize("number", [1, 2, 3], ids=["packed", "update", "ring"])
def test_training_step_with_a_donated_state(implementation, number):
    case = one_of_each_op(12)[number]
    state_name = names(case)[1]
    cotangents = draw_cotangents(case)
    floats, rest = split(case)
    run = function(case, implementation)

    jit = jax.jit if implementation is None else quick.jit

    @functools.partial(jit, donate_argnums=0)
    def step(state, params):
        def loss(params, state):
            results = run(params | {state_name: state}, rest)
            return weighted(results, cotangents), results

        _, pullback, results = jax.vjp(loss, params, state, has_aux=True)
        dparams, dstate = pullback(jnp.ones((), f32))
        return results, dparams | {state_name: dstate}

    state = jnp.array(floats.pop(state_name))
    results, got = step(state, floats)
    assert state.is_deleted()
    assert_values(results, case)
    assert_gradients(checks.to_host(got), case, cotangents)


def test_two_layers_share_one_donated_cache(implementation):
    # Layer 1 reads slots that layer 0 left alone: the cotangent of the cache goes
    # through both updates. float64 differences of the reference judge.
    first, second = small_packed(13), small_packed(14)
    slots = ints(1, 3, 5, -1)
    second = second.replace(cache_indices=slots)
    cache = first.arrays["conv_states"]

    @functools.partial(quick.jit, donate_argnums=0)
    @functools.partial(jax.value_and_grad, has_aux=True)
    def step(cache, xs):
        outs = []
        for case, x in zip((first, second), xs, strict=True):
            arrays = case.arrays | {"x": x, "conv_states": cache}
            out, cache = causal_conv1d_fn(**arrays, implementation=implementation)
            outs.append(out)
        return sum(out.sum() for out in outs) + (cache * 0.5).sum(), cache

    xs = [case.arrays["x"] for case in (first, second)]
    (_, new), got = step(jnp.array(cache), xs)
    ones = np.ones_like(xs[0])
    half = np.full_like(cache, 0.5)
    middle = checks.expected(first)[1]
    second = second.replace(conv_states=middle)
    checks.assert_same_bits(np.asarray(new), checks.expected(second)[1])
    # The first layer's cotangent of the cache is what the second one returns.
    after, slack = expected_gradients(second, (ones, half))["conv_states"]
    exact, allowed = expected_gradients(first, (ones, after))["conv_states"]
    touched = np.isin(np.arange(7), [1, 3, 5])[:, None, None]
    allowed = allowed + np.where(touched, slack, 0)
    assert_gradient(np.asarray(got), exact, allowed, "conv_states", "two layers")


def test_gradient_of_a_layer_loop_with_scan(implementation):
    # Parameters of 3 layers, scanned: each layer's gradient is its own.
    layers = three(lambda seed: draw_dense(seed, **LAYER))
    weights = np.stack([case.arrays["weight"] for case in layers])
    x = layers[0].arrays["x"]

    def forward(weights, x):
        def layer(x, weight):
            out = causal_conv1d(x, weight, implementation=implementation)
            return out, x

        return jax.lax.scan(layer, x, weights)

    def loss(weights, x):
        out, inputs = forward(weights, x)
        return out.sum(), inputs

    got, inputs = quick.jit(jax.grad(loss, has_aux=True))(weights, x)
    cotangent = np.ones_like(x, dtype=np.float64)
    for i in (2, 1, 0):
        # Layers are linear: the chain rule in float64 on the inputs that they saw.
        case = layers[i].replace(x=np.asarray(inputs[i]), weight=weights[i])
        want = expected_gradients(case, cotangent)
        exact, allowed = want["weight"]
        slack = 1e-5 * np.abs(exact).max()  # of cotangents that were float32 sums
        assert_gradient(np.asarray(got[i]), exact, allowed + slack, "weight", i)
        cotangent = want["x"][0]


LAYER = {
    "num_rows": 2,
    "num_tokens": 7,
    "channels": 3,
    "bias_dtype": None,
    "state_len": None,
    "segment_ids": False,
    "activation": None,
}


def test_packed_gradient_without_metadata_equals_that_with_it(implementation):
    case = draw_packed(15, SMALL_PACKED)
    cotangents = draw_cotangents(case)
    floats, rest = split(case)
    run = functools.partial(causal_conv1d_fn, implementation=implementation)
    for block_m in (3, 40):
        metadata = build_metadata(rest["query_start_loc"], 24, block_m=block_m)

        def loss(floats, metadata):
            return weighted(run(**floats, **rest, metadata=metadata), cotangents)

        got = quick.jit(jax.grad(loss))(floats, metadata)
        assert_gradients(checks.to_host(got), case, cotangents)


def test_vmap_over_an_axis_of_size_0_gives_empty_results():
    x, weight = jnp.ones((0, 2, 5, 3)), jnp.ones((3, 2))

    def loss(x):
        return jax_causal_conv.causal_conv1d(x, weight).sum()

    assert jax.vmap(loss)(x).shape == (0,)
    assert jax.vmap(jax.grad(loss))(x).shape == x.shape


def test_tap_that_is_nan_leaves_the_gradient_of_padding_alone(implementation):
    x, weight = jnp.ones((1, 4, 3)), jnp.full((3, 2), jnp.nan)
    ids = jnp.array([[-1, 0, 0, -1]])

    def loss(x):
        out = jax_causal_conv.causal_conv1d(
            x, weight, segment_ids=ids, implementation=implementation
        )
        return out.sum()

    dx = jax.grad(loss)(x)
    assert not dx[0, 0].any() and not dx[0, 3].any(), f"{dx}"
