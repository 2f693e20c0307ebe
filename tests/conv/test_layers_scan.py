"""Scans over layers: one cache for all of them, as an array or a `Ref`, and gradients.

A cache of shape (layers, slots, L, D) is reshaped to (layers * slots, L, D) around the
loop, carried through it, and addressed by `layer_slots`. Scanned over instead, as xs
and ys, it would be copied; XLA's output shows that this way it is not.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_causal_conv as jcc
from tests.support import checks, gpu_compiler, quick
from tests.support.draws import ints
from tests.support.gpu_compiler import CompiledProgram, Program
from tests.support.gradients import (
    assert_gradient,
    assert_gradients,
    assert_values,
    draw_cotangents,
    expected_gradients,
    function,
    names,
    pick,
    small_dense,
    small_packed,
    small_update,
    split,
    stack,
    weighted,
)

LAYERS = 3

# Of four rows one is padding and one names a slot behind the cache, which is the first
# slot of the next layer if nobody looks.
CASES = {
    "packed": (small_packed, 7, "cache_indices"),
    "update": (small_update, 6, "conv_state_indices"),
}


def draw_layers(op):
    """One case per layer, of the same batch."""
    draw, num_slots, indices = CASES[op]
    cases = [draw(seed) for seed in range(LAYERS)]
    floats = [split(case)[0] for case in cases]
    slots = {indices: ints(num_slots, 0, -1, num_slots - 1)}
    return [cases[0].replace(**one, **slots) for one in floats]


def scan_layers(op, case, implementation, remat=False):
    """(floats of all layers, stacked; the batch) -> (outs, cache)."""
    _, num_slots, indices = CASES[op]
    run, state = function(case, implementation), names(case)[1]

    def layers(floats, rest):
        floats = dict(floats)
        cache = floats.pop(state)
        stacked = cache.shape

        def layer(cache, inputs):
            number, own = inputs
            slots = jcc.layer_slots(rest[indices], number, num_slots)
            out, cache = run(own | {state: cache}, rest | {indices: slots})
            return cache, out

        layer = jax.checkpoint(layer) if remat else layer
        cache = cache.reshape(-1, *stacked[2:])
        cache, outs = jax.lax.scan(layer, cache, (jnp.arange(LAYERS), floats))
        return outs, cache.reshape(stacked)

    return layers


@pytest.mark.parametrize("op, remat", [("packed", True), ("update", False)])
def test_each_layer_of_a_stacked_cache_is_as_if_alone(implementation, op, remat):
    cases = draw_layers(op)
    floats, rest = stack([split(case)[0] for case in cases]), split(cases[0])[1]
    cotangents = [draw_cotangents(case, i) for i, case in enumerate(cases)]
    run = scan_layers(op, cases[0], implementation, remat)

    def loss(floats, rest, cotangents):
        results = run(floats, rest)
        return weighted(results, cotangents), results

    jit = jax.jit if implementation is None else quick.jit
    gradient = jit(jax.grad(loss, has_aux=True))
    got, results = gradient(floats, rest, stack(cotangents))
    for number, case in enumerate(cases):
        assert_values(pick(results, number), case, f"layer {number}")
        assert_gradients(pick(got, number), case, cotangents[number])


def test_gradients_of_rematerialised_layers_that_feed_each_other(implementation):
    cases = [
        small_dense(seed, segment_ids=False, state_len=None) for seed in range(LAYERS)
    ]
    x = cases[0].arrays["x"]
    parameters = stack([split(case)[0] for case in cases])
    del parameters["x"], parameters["initial_state"]

    def loss(parameters, x):
        @jax.checkpoint
        def layer(x, own):
            out = jcc.causal_conv1d(
                x, **own, activation="silu", implementation=implementation
            )
            return out, x

        out, inputs = jax.lax.scan(layer, x, parameters)
        return out.sum(), inputs

    got, inputs = quick.jit(jax.grad(loss, has_aux=True))(parameters, x)
    cotangent = np.ones(x.shape)
    for number in reversed(range(LAYERS)):
        # The chain rule in float64, at the inputs that the layers saw.
        case = cases[number].replace(x=np.asarray(inputs[number]))
        want = expected_gradients(case, cotangent)
        for name, gradient in pick(got, number).items():
            exact, allowed = want[name]
            slack = 1e-5 * abs(exact).max()  # of cotangents that were float32 sums
            assert_gradient(gradient, exact, allowed + slack, name, number)
        cotangent = want["x"][0]


# --- a Ref as the cache -----------------------------------------------------------


def decode_into(ref, x, weight, slots):
    """A decode step whose cache is a `Ref`, updated in place."""
    y, new = jcc.causal_conv1d_update(
        x, ref[...], weight, None, "silu", conv_state_indices=slots
    )
    ref[...] = new
    return y


def test_step_updates_a_cache_that_it_is_given_as_a_ref():
    case = small_update(1, num_queries=None, bias_dtype=None)
    a = case.arrays
    ref = jax.new_ref(jnp.asarray(a["conv_state"]))
    step = jax.jit(decode_into)
    for seed in (2, 3):
        case = case.replace(x=small_update(seed, num_queries=None).arrays["x"])
        out = step(ref, case.arrays["x"], a["weight"], a["conv_state_indices"])
        assert_values((out, ref[...]), case, f"step {seed}")
        case = case.replace(conv_state=checks.expected(case)[1])


# --- what XLA makes of it ---------------------------------------------------------

ROWS, SLOTS, LENGTH, CHANNELS, WIDTH = 8, 512, 3, 512, 4
DTYPE = jnp.dtype("bfloat16")


def struct(*shape, dtype=DTYPE):
    return jax.ShapeDtypeStruct(shape, dtype)


X, INDICES = struct(ROWS, CHANNELS), struct(ROWS, dtype=jnp.int32)
WEIGHTS = struct(LAYERS, CHANNELS, WIDTH)
CACHE = struct(LAYERS, SLOTS, LENGTH, CHANNELS)


def one_step(op, x, cache, weight, slots):
    """A step of one token a row, by either op."""
    if op == "update":
        return jcc.causal_conv1d_update(
            x, cache, weight, None, "silu", conv_state_indices=slots
        )
    offsets = np.arange(ROWS + 1)
    return jcc.causal_conv1d_fn(
        x,
        weight,
        None,
        cache,
        offsets,
        cache_indices=slots,
        has_initial_state=np.ones(ROWS, bool),
        metadata=jcc.build_metadata(offsets, ROWS),
    )


def carried(op):
    def step(x, cache, weights, slots):
        def layer(carry, inputs):
            x, cache = carry
            number, weight = inputs
            own = jcc.layer_slots(slots, number, SLOTS)
            y, cache = one_step(op, x, cache, weight, own)
            return (x + y, cache), None

        flat = cache.reshape(-1, *cache.shape[2:])
        (x, flat), _ = jax.lax.scan(layer, (x, flat), (jnp.arange(LAYERS), weights))
        return x, flat.reshape(cache.shape)

    return Program(step, (X, CACHE, WEIGHTS, INDICES), (1,), LAYERS)


def held_by_ref(op):
    def step(x, cache, weights, slots):
        ref = jax.new_ref(cache.reshape(-1, *cache.shape[2:]))

        def layer(x, inputs):
            number, weight = inputs
            own = jcc.layer_slots(slots, number, SLOTS)
            y, new = one_step(op, x, ref[...], weight, own)
            ref[...] = new
            return x + y, None

        x, _ = jax.lax.scan(layer, x, (jnp.arange(LAYERS), weights))
        return x, jax.ref.freeze(ref).reshape(cache.shape)

    return Program(step, (X, CACHE, WEIGHTS, INDICES), (1,), LAYERS)


packed_carried = functools.partial(carried, "packed")
update_carried = functools.partial(carried, "update")
packed_held_by_ref = functools.partial(held_by_ref, "packed")
update_held_by_ref = functools.partial(held_by_ref, "update")

PROGRAMS = [
    "packed_carried",
    "update_carried",
    "packed_held_by_ref",
    "update_held_by_ref",
]


def assert_in_place(program: CompiledProgram):
    """Donated, and no instruction nor scratch as large as one layer's slots."""
    layer_bytes = program.cache_bytes // LAYERS
    copies = [
        i.text[:200]
        for i in program.instructions
        if i.opcode in ("copy", "copy-start", "convert", "transpose", "concatenate")
        and max(i.sizes, default=0) >= layer_bytes
    ]
    assert not copies, "\n".join(copies)
    assert program.alias_bytes == program.cache_bytes
    assert program.temp_bytes < layer_bytes, f"{program.temp_bytes} bytes of scratch"


def compile_on_cpu(function, arguments, donated=()):
    jitted = jax.jit(function, donate_argnums=donated)
    compiled = jitted.lower(*arguments).compile()
    memory = compiled.memory_analysis()
    cache_bytes = CACHE.size * DTYPE.itemsize
    return CompiledProgram(
        hlo=compiled.as_text(),
        cache_bytes=cache_bytes,
        num_caches=1,
        layers=LAYERS,
        alias_bytes=memory.alias_size_in_bytes,
        temp_bytes=memory.temp_size_in_bytes,
    )


on_a_cpu_without_copies = pytest.mark.skipif(
    jax.default_backend() != "cpu" or jax.__version_info__ < (0, 11),
    reason="before jax 0.11, XLA:CPU copies what is scattered to",
)


@on_a_cpu_without_copies
@pytest.mark.parametrize("name", PROGRAMS)
def test_stacked_cache_stays_in_place_on_a_cpu(name):
    program = globals()[name]()
    assert_in_place(compile_on_cpu(program.function, program.arguments, (1,)))


@on_a_cpu_without_copies
def test_ref_argument_is_updated_in_place_on_a_cpu():
    cache = jax.ShapeDtypeStruct((LAYERS * SLOTS, LENGTH, CHANNELS), DTYPE)
    ref = jax.new_ref(jnp.zeros(cache.shape, DTYPE))
    weight = struct(CHANNELS, WIDTH)
    assert_in_place(compile_on_cpu(decode_into, (ref, X, weight, INDICES)))


@pytest.fixture(scope="module")
def compiled_for_a_gpu():
    if reason := gpu_compiler.missing_for_programs():
        pytest.skip(reason)
    return gpu_compiler.compile_programs(__name__, PROGRAMS)


@pytest.mark.parametrize("name", PROGRAMS)
def test_stacked_cache_stays_in_place_on_a_gpu(compiled_for_a_gpu, name):
    program = compiled_for_a_gpu[name, True]
    assert len(program.kernels()) == 1
    layer_bytes = program.cache_bytes // LAYERS
    copies = dataclasses.replace(program, cache_bytes=layer_bytes).cache_copies()
    assert not copies, "\n".join(i.text[:200] for i in copies)
    assert_in_place(program)
