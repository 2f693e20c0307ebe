"""The ops on meshes of devices: right everywhere, and local where they say so.

Values are compared with the same float64 reference as on one device. What moves
between devices is read from the compiled programs: here for eight CPU devices, in a
child process, and below for four GPUs, which needs none.
"""

import functools
import itertools
import math

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_causal_conv import build_metadata
from tests.support import checks, eight_devices, gpu_compiler, quick
from tests.support.cases import FLOATS
from tests.support.draws import ints
from tests.support.gpu_compiler import CompiledProgram, Program
from tests.support.gradients import (
    assert_gradient,
    assert_values,
    draw_cotangents,
    expected_gradients,
    function,
    names,
    small_dense,
    small_packed,
    small_ring,
    small_update,
    split,
)

CHECKS = eight_devices.Checks()
# XLA:CPU partitions for automatic axes what an op lowers to, so that explicit ones are
# the stricter: what the op says of its dimensions is all that is known.
KINDS = ("Auto", "Explicit")
SIZES = {"data": 4, "model": 2}
BOTH = ("data", "model")
THREE_OPS = ("packed", "update", "dense")
CHANNELS = 32
ROWS = {"num_rows": 8}
# A row of every kind has its own slot, as in a decode step without slot numbers.
OWN = ROWS | {"num_slots": 8, "conv_state_indices": False}


def dense_with_segments(seed=0, **changes):
    return small_dense(seed, **(ROWS | {"num_tokens": 16} | changes))


def own_update(seed=0, **changes):
    return small_update(seed, arrays={"conv_state_indices": None}, **(OWN | changes))


def own_ring(seed=0, **changes):
    positions = ints(0, 3, -7, 1001, 5, 4, 2, 1)
    case = own_update(seed, **({"cache_seqlens": True} | changes))
    return case.replace(cache_seqlens=positions)


def moving(seed=0, **changes):
    moves = {
        "cache_indices": ints(4, 4, -1, 2),
        "write_indices": ints(0, 1, 3, 2),
        "snapshot_indices": ints(5, 6, 3, -1),
        "snapshot_ends": ints(2, 0, 1, 20),
    }
    return small_packed(seed, arrays=moves, **changes)


BY_CHANNELS = {
    "moving": moving,
    "packed": small_packed,
    "update": small_update,
    "ring": small_ring,
    "dense": dense_with_segments,
}
DILATED = {
    "dilated": functools.partial(
        dense_with_segments, state_len=6, dilation=2, residual=True
    ),
    "dilated ring": functools.partial(
        small_ring, state_len=9, dilation=2, residual=True
    ),
}
BY_ROWS = {
    "update": own_update,
    "ring": own_ring,
    "dense": dense_with_segments,
    "stateless": functools.partial(dense_with_segments, state_len=None),
}


class Drawn:
    """A case with cotangents and what its gradients should be."""

    def __init__(self, case, seed=0):
        self.case, self.cotangents = case, draw_cotangents(case, seed)

    @functools.cached_property
    def gradients(self):
        return expected_gradients(self.case, self.cotangents)


@functools.cache
def drawn(draw, seed, **changes):
    """One for all kinds of mesh: the reference takes its time."""
    return Drawn(draw(seed, **changes))


def make_mesh(kind, sizes=None):
    sizes = sizes or SIZES
    kinds = (getattr(AxisType, kind),) * len(sizes)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=kinds)


def specs_of(case, *, rows=None, channels=None):
    """name -> spec, for each array of a case: an axis for rows, one for channels."""
    state = names(case)[1]
    result = {}
    for name, array in case.arrays.items():
        if array is None:
            continue
        inner = [None] * (array.ndim - 2)
        if name in ("x", state):
            result[name] = P(rows, *inner, channels)
        elif name in ("weight", "bias"):
            result[name] = P(channels, *inner, *[None] * (array.ndim - 1))
        else:
            result[name] = P(rows, *[None] * (array.ndim - 1))
    return result


def cotangent_specs(case, specs):
    x = specs["x"]
    return x, specs.get(names(case)[1], P(x[0], None, x[-1]))


def place(mesh, tree, specs):
    return jax.tree.map(
        lambda leaf, spec: jax.device_put(leaf, NamedSharding(mesh, spec)), tree, specs
    )


def pulled(case, implementation=None):
    """(floats, rest, cotangents) -> (results, gradients)."""
    run = function(case, implementation)

    def pull(floats, rest, cotangents):
        results, pullback = jax.vjp(lambda floats: run(floats, rest), floats)
        return results, pullback(cotangents)[0]

    return pull


def present(arrays):
    return {name: array for name, array in arrays.items() if array is not None}


def compile_on(mesh, run, args, specs, donate=()):
    """(results, compiled program) of a jitted function of sharded arguments."""
    placed = place(mesh, args, specs)
    with jax.set_mesh(mesh):
        lowered = jax.jit(run, donate_argnums=donate).lower(*placed)
        # Copies are counted as users get them.
        compiled = lowered.compile(None if donate else quick.options())
        results = compiled(*placed)
    caches = jax.tree.leaves([placed[i] for i in donate])
    cache_bytes = sum(
        math.prod(c.sharding.shard_shape(c.shape)) * c.dtype.itemsize for c in caches
    )
    alias_bytes = compiled.memory_analysis().alias_size_in_bytes
    return results, CompiledProgram(
        compiled.as_text(), cache_bytes, len(caches), 1, alias_bytes, 0
    )


def gradients_on(mesh, drawn, specs, implementation=None):
    """Checks results and gradients; returns both, and the program."""
    case = drawn.case
    floats, rest = split(case)
    args = present(floats), rest, drawn.cotangents
    by_name = [{name: specs[name] for name in part} for part in args[:2]]
    all_specs = (*by_name, cotangent_specs(case, specs))
    pull = pulled(case, implementation)
    (results, grads), program = compile_on(mesh, pull, args, all_specs)
    assert_values(results, case)
    for name, got in checks.to_host(grads).items():
        assert_gradient(got, *drawn.gradients[name], name, case)
    return results, grads, program


def assert_sharded(mesh, arrays, specs):
    for array, spec in zip(arrays, specs, strict=True):
        want = NamedSharding(mesh, spec)
        same = array.sharding.is_equivalent_to(want, array.ndim)
        assert same, f"{array.sharding}, expected {want}"


def texts(instructions):
    return "\n".join(i.text[:200] for i in instructions)


def assert_local(program):
    assert not program.collectives(), texts(program.collectives())


def assert_only_sums_filters(program, case, parts):
    """All that is sent is the sum of the filter's float32 gradients."""
    width, channels = case.shape.width, case.shape.channels // parts
    weight, bias = 4 * channels * width, 4 * channels
    allowed = {weight, bias, weight + bias}  # a GPU sends both at once
    sent = program.collectives()
    assert sent
    for instruction in sent:
        assert instruction.opcode.startswith("all-reduce"), texts(sent)
        assert set(instruction.sizes) <= allowed, texts(sent)


def channels_stay_where_they_are(draw, kind):
    mesh, drawing = make_mesh(kind), drawn(draw, 1, channels=CHANNELS)
    case = drawing.case
    specs = specs_of(case, channels=BOTH)
    results, grads, program = gradients_on(mesh, drawing, specs)
    assert_local(program)
    assert_sharded(mesh, results, cotangent_specs(case, specs))
    assert_sharded(mesh, grads.values(), [specs[name] for name in grads])


@CHECKS.over(BY_CHANNELS, ("Auto",))
@CHECKS.over([op for op in BY_CHANNELS if op != "moving"], ("Explicit",))
def sharded_channels_stay_where_they_are(op, kind):
    channels_stay_where_they_are(BY_CHANNELS[op], kind)


@CHECKS.over(DILATED, KINDS[:1])
def sharded_channels_of_taps_apart(op, kind):
    channels_stay_where_they_are(DILATED[op], kind)


@CHECKS.over(("update", "ring", "dense"), KINDS)
@CHECKS.over(("stateless",), ("Explicit",))
def sharded_rows_stay_where_they_are(op, kind):
    mesh, drawing = make_mesh(kind), drawn(BY_ROWS[op], 2, channels=CHANNELS)
    case = drawing.case
    specs = specs_of(case, rows="data", channels="model")
    results, grads, program = gradients_on(mesh, drawing, specs)
    assert_only_sums_filters(program, case, SIZES["model"])
    assert_sharded(mesh, results, cotangent_specs(case, specs))
    assert_sharded(mesh, grads.values(), [specs[name] for name in grads])


STATEFUL = {
    "packed": (functools.partial(small_packed, num_slots=64), {"channels": BOTH}),
    "update": (functools.partial(small_update, num_slots=64), {"channels": BOTH}),
    "ring": (functools.partial(small_ring, num_slots=64), {"channels": BOTH}),
    "own rows": (own_update, {"rows": "data", "channels": "model"}),
}


@CHECKS.over(STATEFUL, ("Explicit",))
def a_donated_sharded_cache_is_updated_in_place(op, kind):
    draw, axes = STATEFUL[op]
    mesh, case = make_mesh(kind), draw(3, channels=CHANNELS)
    specs, (floats, rest) = specs_of(case, **axes), split(case)
    state, run = names(case)[1], function(case, None)
    cache = floats.pop(state)
    results, program = compile_on(
        mesh,
        lambda cache, floats, rest: run(floats | {state: cache}, rest),
        (cache, floats, rest),
        (specs[state], *({n: specs[n] for n in part} for part in (floats, rest))),
        donate=(0,),
    )
    assert_values(results, case)
    assert_local(program)
    assert_sharded(mesh, results, (specs["x"], specs[state]))
    assert program.alias_bytes == program.cache_bytes
    copies = [
        i
        for i in program.instructions
        if i.opcode == "copy" and max(i.sizes) >= program.cache_bytes
    ]
    # Where every row has its own slot, the rows that move are the cache. Before jax
    # 0.11, XLA:CPU copies a cache that it scatters to, whether sharded or not.
    if op != "own rows" and jax.__version_info__ >= (0, 11):
        assert not copies, texts(copies)


@CHECKS.over(BY_CHANNELS)
def a_replicated_filter_serves_sharded_channels(op):
    case = BY_CHANNELS[op](4, channels=CHANNELS)
    specs = specs_of(case, channels=BOTH) | {"weight": P(), "bias": P()}
    floats, rest = split(case)
    by_name = tuple({name: specs[name] for name in part} for part in (floats, rest))
    mesh, run = make_mesh("Auto"), function(case, None)
    results, program = compile_on(mesh, run, (floats, rest), by_name)
    assert_values(results, case)
    assert_local(program)


def many_slots(seed, **changes):
    arrays = {"conv_state_indices": ints(6, -1, 0, 3, 12, 4, 15, 9)}
    sizes = {"num_slots": 16, "channels": CHANNELS}
    return small_update(seed, arrays=arrays, **(ROWS | sizes | changes))


ELSEWHERE = {  # sharded where the op cannot be local
    "packed tokens": (small_packed, {"x": P("data")}),
    "packed slots": (
        functools.partial(small_packed, num_slots=8),
        {"conv_states": P("data", None, "model")},
    ),
    "packed all": (
        functools.partial(small_packed, num_slots=8),
        {"x": P("data"), "conv_states": P("data"), "cache_indices": P("data")},
    ),
    "update numbered": (
        many_slots,
        {"x": P("data"), "conv_state": P("data"), "conv_state_indices": P("data")},
    ),
    "update more slots": (
        functools.partial(own_update, num_slots=16),
        {"x": P("data"), "conv_state": P("data")},
    ),
    "dense time": (dense_with_segments, {"x": P(None, "data"), "bias": P("model")}),
}


@CHECKS.each(zip(ELSEWHERE, itertools.cycle(KINDS), strict=False))  # by turns
def any_other_sharding_computes_the_same(name, kind):
    draw, sharded = ELSEWHERE[name]
    drawing = drawn(draw, 5, channels=CHANNELS)
    specs = {
        name: P(*[*sharded.get(name, ()), *[None] * array.ndim][: array.ndim])
        for name, array in present(drawing.case.arrays).items()
    }
    mesh, (floats, rest) = make_mesh(kind), split(drawing.case)
    if name in ("packed all", "update numbered"):
        gradients_on(mesh, drawing, specs)
    else:
        args = present(floats), rest
        by_name = tuple({name: specs[name] for name in part} for part in args)
        results, _ = compile_on(mesh, function(drawing.case, None), args, by_name)
        assert_values(results, drawing.case)


@CHECKS.over(("packed", "update", "ring"), KINDS)
def a_cache_with_sharded_slots_is_never_gathered(op, kind):
    draw = {"packed": small_packed, "update": small_update, "ring": small_ring}[op]
    case = draw(5, num_slots=64, channels=8)
    floats, rest = split(case)
    state = names(case)[1]
    specs = {name: P() for name in case.arrays} | {state: P("data")}
    by_name = tuple({name: specs[name] for name in part} for part in (floats, rest))
    run = function(case, None)
    results, program = compile_on(make_mesh(kind), run, (floats, rest), by_name)
    assert_values(results, case)
    whole = case.arrays[state].nbytes
    gathers = [i for i in program.collectives() if max(i.sizes) >= whole]
    assert not gathers, texts(gathers)


@CHECKS.each([("update", "Auto", 0), ("update", "Explicit", 5)])
@CHECKS.each([("ring", "Auto", 5), ("ring", "Explicit", 0)])
def one_row_of_all_is_the_padded_one(op, kind, pad):
    case = BY_ROWS[op](6, channels=8, pad_slot_id=pad)
    specs, (floats, rest) = specs_of(case, rows="data"), split(case)
    by_name = tuple({name: specs[name] for name in part} for part in (floats, rest))
    run = function(case, None)
    results, program = compile_on(make_mesh(kind), run, (floats, rest), by_name)
    assert_values(results, case)
    assert_local(program)
    assert not np.asarray(results[0])[pad].any()


@CHECKS.over(BY_CHANNELS)
def channels_that_do_not_divide_evenly(op):
    """A slice of sharded channels: XLA may give devices unequal parts of it."""
    case = BY_CHANNELS[op](7, channels=12)
    floats, rest = split(case)
    wide = np.concatenate([floats["x"]] * 2, axis=-1)
    spec = P(*[None] * (wide.ndim - 1), BOTH)
    run = function(case, None)

    def of_slice(wide, floats, rest):
        return run(floats | {"x": wide[..., 12:]}, rest)

    specs = (spec, *(jax.tree.map(lambda _: P(), part) for part in (floats, rest)))
    mesh = make_mesh("Auto")
    results, _ = compile_on(mesh, of_slice, (wide, floats, rest), specs)
    assert_values(results, case)
    with pytest.raises(ValueError, match="divi"):
        place(mesh, floats["x"], spec)


@CHECKS.over(("packed", "ring", "dense"), ("Explicit",))
def a_mapped_axis_that_is_sharded_stays_where_it_is(op, kind):
    cases = [BY_CHANNELS[op](seed, channels=4) for seed in range(8)]
    cases = [c.replace(weight=cases[0].arrays["weight"]) for c in cases]
    cases = [c.replace(bias=cases[0].arrays["bias"]) for c in cases]
    shared = ("weight", "bias")
    run = function(cases[0], None)
    floats, rest = split(cases[0])
    mapped = {
        name: np.stack([c.arrays[name] for c in cases])
        for name in (floats | rest)
        if name not in shared
    }

    def of_all(mapped, filters):
        def one(mapped):
            floats = {name: mapped[name] for name in mapped if name not in rest}
            return run(floats | filters, {name: mapped[name] for name in rest})

        return jax.vmap(one)(mapped)

    filters = {name: floats[name] for name in shared}
    specs = (
        {n: P(BOTH, *[None] * (a.ndim - 1)) for n, a in mapped.items()},
        jax.tree.map(lambda _: P(), filters),
    )
    results, program = compile_on(make_mesh(kind), of_all, (mapped, filters), specs)
    for i, case in enumerate(cases):
        assert_values([r[i] for r in checks.to_host(results)], case, i)
    assert_local(program)


@CHECKS.over(BY_CHANNELS)
def eager_calls_take_explicitly_sharded_arrays(op):
    mesh, case = make_mesh("Explicit"), BY_CHANNELS[op](8, channels=CHANNELS)
    specs, (floats, rest) = specs_of(case, channels=BOTH), split(case)
    placed = [place(mesh, p, {n: specs[n] for n in p}) for p in (floats, rest)]
    results = function(case, None)(*placed)
    assert_values(results, case)
    assert_sharded(mesh, results, cotangent_specs(case, specs))


# --- shard_map --------------------------------------------------------------------


@functools.cache
def parts_of(op, count, **changes):
    """A case for each device, of one filter; slot numbers are the device's own."""
    parts = [BY_CHANNELS[op]([9, i], **changes) for i in range(count)]
    same = {name: parts[0].arrays[name] for name in ("weight", "bias")}
    return [Drawn(part.replace(**same), i) for i, part in enumerate(parts)]


def joined(parts, name):
    arrays = [part.case.arrays[name] for part in parts]
    return arrays[0] if name in ("weight", "bias") else np.concatenate(arrays)


def check_shard_map(mesh, parts, implementation, *, channels=None, **how):
    """Each device with the requests of its own, values and gradients."""
    case, count = parts[0].case, len(parts)
    args = [{name: joined(parts, name) for name in tree} for tree in split(case)]
    cotangents = zip(*(part.cotangents for part in parts), strict=True)
    args.append(tuple(map(np.concatenate, cotangents)))
    mapped, specs = mapped_on(mesh, case, implementation, channels, how)

    def pull(floats, rest, cotangents):
        results, pullback = jax.vjp(lambda floats: mapped(floats, rest), floats)
        return results, pullback(cotangents)[0]

    (results, grads), program = compile_on(mesh, pull, tuple(args), specs)
    assert_only_sums_filters(program, case, mesh.shape["model"] if channels else 1)
    assert_values_of_parts(parts, results)
    for name, got in checks.to_host(grads).items():
        want = [part.gradients[name] for part in parts]
        if name in ("weight", "bias"):
            exact, allowed = map(sum, zip(*want, strict=True))
            assert_gradient(got, exact, allowed, name, "all devices")
            continue
        for i, own in enumerate(np.split(got, count)):
            assert_gradient(own, *want[i], name, f"device {i}")


def mapped_on(mesh, case, implementation, channels=None, how=None):
    """shard_map of an op over the axis "data", and specs of its arguments."""
    how = how or {}
    specs = specs_of(case, rows="data", channels=channels)
    by_name = tuple({name: specs[name] for name in tree} for tree in split(case))
    of_results = cotangent_specs(case, specs)
    axes = how.get("axis_names", mesh.axis_names)

    def manual(spec):
        return P(*(axis if axis in axes else None for axis in spec))

    def run(floats, rest):
        if "query_start_loc" in rest:
            metadata = build_metadata(rest["query_start_loc"], len(floats["x"]))
            rest = rest | {"metadata": metadata}
        return function(case, implementation)(floats, rest)

    mapped = jax.shard_map(
        run,
        mesh=mesh,
        in_specs=jax.tree.map(manual, by_name),
        out_specs=jax.tree.map(manual, of_results),
        **how,
    )
    return mapped, (*by_name, of_results)


def assert_values_of_parts(parts, results):
    results = zip(*(np.split(np.asarray(r), len(parts)) for r in results), strict=True)
    for i, (part, got) in enumerate(zip(parts, results, strict=True)):
        assert_values(got, part.case, f"device {i}")


@CHECKS.over(BY_CHANNELS, ("Auto",))
@CHECKS.over(THREE_OPS, ("Explicit",))
def shard_map_is_the_data_parallel_form(op, kind):
    mesh = make_mesh(kind, {"data": 4})
    check_shard_map(mesh, parts_of(op, 4), None)


@CHECKS.over(THREE_OPS, (None, "xla"))
def shard_map_of_rows_and_channels(op, implementation):
    parts = parts_of(op, 2, channels=CHANNELS)
    mesh = make_mesh("Auto", {"data": 2, "model": 2})
    check_shard_map(mesh, parts, implementation, channels="model")


@CHECKS.over(THREE_OPS)
def shard_map_without_tracking_of_varying_axes(op):
    mesh = make_mesh("Auto", {"data": 4})
    check_shard_map(mesh, parts_of(op, 4), None, check_vma=False)


@CHECKS.over(THREE_OPS)
def shard_map_over_rows_leaves_channels_to_the_compiler(op):
    parts = parts_of(op, 2, channels=CHANNELS)
    mesh = make_mesh("Auto", {"data": 2, "model": 2})
    how = {"channels": "model", "axis_names": {"data"}}
    check_shard_map(mesh, parts, None, **how)


@CHECKS.over(THREE_OPS)
def shard_map_over_rows_leaves_channels_on_an_explicit_axis(op):
    """Forward: jax cannot differentiate `auto_axes` inside such a shard_map."""
    parts = parts_of(op, 2, channels=CHANNELS)
    mesh = make_mesh("Explicit", {"data": 2, "model": 2})
    how = {"axis_names": {"data"}}
    mapped, specs = mapped_on(mesh, parts[0].case, None, "model", how)
    names_of = split(parts[0].case)
    args = tuple({name: joined(parts, name) for name in tree} for tree in names_of)
    results, program = compile_on(mesh, mapped, args, specs[:2])
    assert_values_of_parts(parts, results)
    if jax.__version_info__ >= (0, 11):  # before, jax gathers the channels there
        assert_local(program)


@CHECKS.over(THREE_OPS)
def shard_map_of_interpreted_kernels(op):
    pytest.importorskip("triton", reason="the interpreter is part of Triton")
    mesh = make_mesh("Auto", {"data": 2})
    check_shard_map(mesh, parts_of(op, 2), "interpret")


@pytest.mark.parametrize("name", CHECKS)
def test_on_eight_devices(on_eight_devices, name):
    on_eight_devices(name)


# --- programs for four GPUs -------------------------------------------------------

GPUS = 4
BF16 = dict.fromkeys(
    ("x_dtype", "weight_dtype", "bias_dtype", "state_dtype"), FLOATS[2]
)
GPU_DRAWS = {  # what is sharded -> op -> draw
    "channels": BY_CHANNELS
    | {name: STATEFUL[name][0] for name in ("packed", "update", "ring")},
    "rows": BY_ROWS,
}


def gpu_case(axis, op):
    case = GPU_DRAWS[axis][op](channels=512, **BF16)
    return case, specs_of(case, **{axis: "gpus"})


def gpu_program(run, arguments, specs, kind, caches=()):
    arguments = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), arguments
    )
    mesh, explicit = {"gpus": GPUS}, kind == "Explicit"
    return Program(run, arguments, caches, 1, mesh, specs, explicit)


def forward(axis, op, kind):
    case, specs = gpu_case(axis, op)
    (floats, rest), state = map(present, split(case)), names(case)[1]
    run = function(case, None)
    if op == "dense":
        by_name = tuple({n: specs[n] for n in part} for part in (floats, rest))
        return gpu_program(run, (floats, rest), by_name, kind)
    cache = floats.pop(state)

    def step(cache, floats, rest):
        return run(floats | {state: cache}, rest)

    by_name = ({n: specs[n] for n in part} for part in (floats, rest))
    arguments, specs = (cache, floats, rest), (specs[state], *by_name)
    return gpu_program(step, arguments, specs, kind, caches=(0,))


def gradient(axis, op, kind):
    case, specs = gpu_case(axis, op)
    floats, rest = map(present, split(case))
    by_name = ({n: specs[n] for n in part} for part in (floats, rest))
    arguments = floats, rest, draw_cotangents(case)
    all_specs = (*by_name, cotangent_specs(case, specs))
    return gpu_program(pulled(case), arguments, all_specs, kind)


def mapped(op, kind):
    """vmap over all but the filter, the mapped axis sharded."""
    case = BY_CHANNELS[op](channels=16, **BF16)
    floats, rest = map(present, split(case))
    filters = {name: floats.pop(name) for name in ("weight", "bias")}
    each = jax.tree.map(lambda a: np.stack([a] * 2 * GPUS), (floats, rest))

    def run(filters, floats, rest):
        one = function(case, None)
        return jax.vmap(lambda floats, rest: one(floats | filters, rest))(floats, rest)

    def spec(axis):
        return lambda a: P(axis, *[None] * (a.ndim - 1))

    specs = jax.tree.map(spec(None), filters), *jax.tree.map(spec("gpus"), each)
    return gpu_program(run, (filters, *each), specs, kind)


# Both kinds of mesh divide a kernel in one way: a half of the pairs will do.
FORWARD = [
    "forward-channels-packed-Auto",
    "forward-channels-update-Explicit",
    "forward-channels-ring-Auto",
    "forward-channels-dense-Explicit",
    "forward-rows-update-Auto",
    "forward-rows-ring-Explicit",
    "forward-rows-dense-Auto",
]
GRADIENTS = {
    "channels": [
        "gradient-channels-packed-Auto",
        "gradient-channels-update-Explicit",
        "gradient-channels-dense-Auto",
    ],
    "rows": ["gradient-rows-update-Auto", "gradient-rows-dense-Explicit"],
}
MAPPED = ["mapped-packed-Auto", "mapped-ring-Explicit", "mapped-dense-Auto"]
for_gpus = pytest.mark.skipif(
    gpu_compiler.missing_for_programs() is not None,
    reason=str(gpu_compiler.missing_for_programs()),
)


@pytest.fixture(scope="module")
def programs():
    sharded = [*FORWARD, *GRADIENTS["channels"], *GRADIENTS["rows"], *MAPPED]
    compiled = gpu_compiler.compile_programs(__name__, sharded, donate=(True,))
    return {name: program for (name, _), program in compiled.items()}


def assert_share(program, case, count):
    """`count` kernels, the first of which makes a fourth of out."""
    kernels, x = program.kernels(), case.arrays["x"]
    assert len(kernels) == count, texts(kernels)
    assert any(x.nbytes // GPUS in k.sizes for k in kernels), texts(kernels)
    assert not any(x.nbytes in k.sizes for k in kernels), texts(kernels)


@for_gpus
@pytest.mark.parametrize("name", FORWARD)
def test_each_gpu_runs_the_kernel_on_its_share_alone(programs, name):
    program, (_, axis, op, _) = programs[name], name.split("-")
    assert_local(program)
    assert_share(program, gpu_case(axis, op)[0], 1)
    assert program.alias_bytes == program.cache_bytes * program.num_caches
    if program.num_caches:
        assert not program.cache_copies(), texts(program.cache_copies())


@for_gpus
@pytest.mark.parametrize("name", GRADIENTS["channels"])
def test_gradients_of_sharded_channels_stay_on_their_gpu(programs, name):
    program, (_, axis, op, _) = programs[name], name.split("-")
    assert_local(program)
    assert_share(program, gpu_case(axis, op)[0], 2)


@for_gpus
@pytest.mark.parametrize("name", GRADIENTS["rows"])
def test_gpus_that_share_the_rows_sum_the_filters_gradients_alone(programs, name):
    program, (_, axis, op, _) = programs[name], name.split("-")
    case = gpu_case(axis, op)[0]
    assert_share(program, case, 2)
    assert_only_sums_filters(program, case, 1)


@for_gpus
@pytest.mark.parametrize("name", MAPPED)
def test_a_mapped_axis_stays_on_its_gpu(programs, name):
    assert_local(programs[name])
    assert len(programs[name].kernels()) == 1, texts(programs[name].kernels())
