"""The SSD on meshes of devices: heads stay where they are, with their groups.

Values are compared with the same float64 recurrence as on one device. What moves
between devices is read from the compiled programs: here for eight CPU devices, in a
child process, and below for four GPUs, which needs none.
"""

import functools
import itertools

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_causal_conv.mamba2.ssd import DraftStates, ssd, ssd_packed
from tests.support import checks, eight_devices, gpu_compiler, quick
from tests.support.draws import ints
from tests.support.gpu_compiler import CompiledProgram, Program
from tests.support.platforms import HAS_TRITON
from tests.support.ssd_cases import (
    BFLOAT16,
    FLOAT32,
    Case,
    Expected,
    batch,
    compare,
    draw_rows,
)

CHECKS = eight_devices.Checks()
KINDS = ("Auto", "Explicit")
OTHERS = ("xla", *(["interpret"] if HAS_TRITON else []))  # than the default
OPTIONS = {"bias": FLOAT32, "d_by_channel": True, "dt_softplus": True}


def packed(groups=1, heads=8, **changes):
    options = OPTIONS | {"num_slots": 9} | changes
    return batch([17, 1, 2, 9], head=2, heads=heads, groups=groups, **options)


def rows(groups=1, heads=8, **changes):
    options = OPTIONS | {"num_rows": 4, "num_tokens": 20} | changes
    return draw_rows(0, heads=heads, groups=groups, **options)


def moving(groups=1, heads=8):
    case = packed(groups, heads, write_indices=True, snapshots=True)
    return case.replace(
        cache_indices=ints(0, 0, 1, 2),
        write_indices=ints(3, 4, 1, -1),
        snapshot_indices=ints(5, -1, 6, 2),
        snapshot_ends=ints(16, 1, 0, 4),
    )


DRAWS = {
    "moving": moving,
    "packed": packed,
    "decode": functools.partial(packed, max_prefills=0),
    "rows": rows,
    "rows without states": functools.partial(rows, state=None),
}


def make_mesh(kind, **sizes):
    kinds = (getattr(AxisType, kind),) * len(sizes)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=kinds)


def specs_of(case, *, heads=None, rows=None):
    """name -> spec: an axis for heads, and several groups, and one for rows."""
    groups = heads if case.shape.groups > 1 else None
    lead = () if case.packed else (rows,)
    of_token = P(*lead, None, heads)
    specs = {"x": of_token, "dt": of_token, "A": P(heads), "D": P(heads)}
    specs |= {"B": P(*lead, None, groups), "C": P(*lead, None, groups)}
    specs |= {"dt_bias": P(heads), "ssm_states": P(None, heads)}
    specs |= {"initial_state": P(rows, heads), "segment_ids": P(rows)}
    return {
        name: P(*[*specs.get(name, ()), *[None] * array.ndim][: array.ndim])
        for name, array in case.arrays.items()
        if array is not None
    }


def present(case):
    return {name: a for name, a in case.arrays.items() if a is not None}


def function(case, implementation=None):
    """arrays -> (y, states) of a case's shape."""
    options = case.shape.options() | {"implementation": implementation}
    options |= dict.fromkeys(n for n, a in case.arrays.items() if a is None)
    if case.packed:
        return lambda arrays: ssd_packed(**arrays, **options)
    return lambda arrays: ssd(**arrays, **options, return_final_state=True)


def place(mesh, arrays, specs):
    return {
        name: jax.device_put(array, NamedSharding(mesh, specs[name]))
        for name, array in arrays.items()
    }


def run_on(mesh, run, case, specs):
    """(results, compiled program) of a case on a mesh."""
    placed = place(mesh, present(case), specs)
    with jax.set_mesh(mesh):
        compiled = quick.jit(run).lower(placed).compile()
        results = compiled(placed)
    return results, CompiledProgram(compiled.as_text(), 0, 0, 1, 0, 0)


def texts(instructions):
    return "\n".join(i.text[:200] for i in instructions)


def assert_local(program):
    assert not program.collectives(), texts(program.collectives())


def assert_right(case, results, implementation=None):
    compare(case, checks.to_host(results), Expected(case), implementation)


@CHECKS.over(("packed",), KINDS, (1, 8))
@CHECKS.over(("decode", "rows"), ("Explicit",), (8,))
@CHECKS.each([("rows", "Auto", 1), ("moving", "Auto", 8)])
def sharded_heads_stay_where_they_are(op, kind, groups):
    mesh, case = make_mesh(kind, model=8), DRAWS[op](groups)
    specs = specs_of(case, heads="model")
    results, program = run_on(mesh, function(case), case, specs)
    assert_right(case, results)
    assert_local(program)
    for result, name in zip(results, ("x", case.state_name), strict=True):
        want = P(None, "model") if name not in specs else specs[name]
        want = NamedSharding(mesh, want)
        assert result.sharding.is_equivalent_to(want, result.ndim), name


@CHECKS.each([("Auto", 1), ("Explicit", 8)])
def drafts_of_sharded_heads_stay_where_they_are(kind, groups):
    mesh, case = make_mesh(kind, model=8), packed(groups, bias=None)
    arrays = present(case)
    specs = specs_of(case, heads="model")
    slots, (heads, dim, size) = case.shape.num_slots, case.shape.state_shape
    rng = np.random.default_rng(0)
    recent = [
        rng.uniform(0, 1, (slots, 2, *of_token)).astype(np.float32)
        for of_token in ((heads, dim), (heads,), (groups, size))
    ]
    of_group = specs["B"][1]
    sharded = [P(None, None, "model")] * 2 + [P(None, None, of_group)]
    options = case.shape.options()
    rejected = ints(1, 2, 0, 1)

    def run(arrays, recent):
        arrays = dict(arrays)
        states = DraftStates(arrays.pop("ssm_states"), *recent)
        return ssd_packed(
            **arrays, ssm_states=states, num_rejected_tokens=rejected, **options
        )

    want = checks.to_host(quick.jit(run)(arrays, recent))
    placed = place(mesh, arrays, specs)
    placed_recent = [
        jax.device_put(a, NamedSharding(mesh, spec))
        for a, spec in zip(recent, sharded, strict=True)
    ]
    with jax.set_mesh(mesh):
        compiled = quick.jit(run).lower(placed, placed_recent).compile()
        got = compiled(placed, placed_recent)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(np.asarray(one), other, rtol=1e-5, atol=1e-5)
    assert_local(CompiledProgram(compiled.as_text(), 0, 0, 1, 0, 0))


@CHECKS.over(("rows", "rows without states"), KINDS)
def sharded_rows_stay_where_they_are(op, kind):
    mesh, case = make_mesh(kind, data=4, model=2), DRAWS[op]()
    specs = specs_of(case, heads="model", rows="data")
    results, program = run_on(mesh, function(case), case, specs)
    assert_right(case, results)
    assert_local(program)


@CHECKS.each([("packed", "Auto"), ("rows", "Explicit")])
def groups_that_do_not_divide_are_right_all_the_same(op, kind):
    """Two groups for heads on eight devices: B and C are everybody's."""
    mesh, case = make_mesh(kind, model=8), DRAWS[op](2)
    specs = specs_of(case, heads="model")
    for name in ("B", "C"):
        specs[name] = P(*[None] * case.arrays[name].ndim)
    results, _ = run_on(mesh, function(case), case, specs)
    assert_right(case, results)


ELSEWHERE = {  # sharded where the op cannot be local
    "tokens": ("packed", {"x": P("model"), "B": P("model")}),
    "slots": ("packed", {"ssm_states": P("model")}),
    "channels": ("packed", {"x": P(None, None, "model")}),
    "time": ("rows", {"x": P(None, "model"), "dt": P(None, "model")}),
    "states": ("rows", {"initial_state": P(None, None, None, "model")}),
}


@CHECKS.each(zip(ELSEWHERE, itertools.cycle(KINDS), strict=False))  # by turns
def any_other_sharding_computes_the_same(name, kind):
    op, sharded = ELSEWHERE[name]
    sizes = {"dim": 8, "size": 8}
    sizes |= {"num_slots": 8, "tail": 1} if op == "packed" else {"num_tokens": 16}
    mesh, case = make_mesh(kind, model=2), DRAWS[op](**sizes)
    specs = {
        name: P(*[*sharded.get(name, ()), *[None] * array.ndim][: array.ndim])
        for name, array in present(case).items()
    }
    results, _ = run_on(mesh, function(case), case, specs)
    assert_right(case, results)


@functools.cache
def pulled(op):
    """A case, its gradient, floats and integers for that, and what one device gives."""
    case = DRAWS[op]()
    integers = {n: a for n, a in present(case).items() if a.dtype.kind in "ib"}
    floats = {n: a for n, a in present(case).items() if n not in integers}
    run = function(case)

    def pull(floats, integers):
        results, pullback = jax.vjp(lambda f: run(f | integers), floats)
        return pullback(jax.tree.map(jax.numpy.ones_like, results))[0]

    want = checks.to_host(quick.jit(pull)(floats, integers))
    return case, pull, (floats, integers), want


@CHECKS.over(("packed", "rows"), KINDS)
def gradients_of_sharded_heads_are_the_same(op, kind):
    """Sums over heads of a group, of B and C, are all that is sent."""
    case, pull, arrays, want = pulled(op)
    mesh, specs = make_mesh(kind, model=8), specs_of(case, heads="model")
    placed = [place(mesh, part, specs) for part in arrays]
    with jax.set_mesh(mesh):
        got = checks.to_host(quick.jit(pull)(*placed))
    for name, grad in got.items():
        scale = 1e-4 * abs(want[name]).max()
        np.testing.assert_allclose(grad, want[name], 1e-4, scale, err_msg=name)


def joined(parts):
    """The arrays of several requests' batches, behind one another."""
    shared = ("A", "D", "dt_bias")
    return {
        name: array
        if name in shared
        else np.concatenate([present(part)[name] for part in parts])
        for name, array in present(parts[0]).items()
    }


@CHECKS.over(("packed", "rows"), KINDS, (None,))
@CHECKS.each([("decode", "Auto", None), ("rows without states", "Explicit", None)])
@CHECKS.over(("packed", "rows"), ("Auto",), OTHERS)
def shard_map_is_the_data_parallel_form(op, kind, implementation):
    """Each device with the requests and the cache of its own, axes checked."""
    mesh, count = make_mesh(kind, data=2), 2
    base = DRAWS[op](heads=2)
    parts = [base, Case(base.shape, base.arrays | moved(base))]
    specs = {
        name: P() if name in ("A", "D", "dt_bias") else P("data")
        for name in present(base)
    }
    run = jax.shard_map(
        function(base, implementation),
        mesh=mesh,
        in_specs=(specs,),
        out_specs=(P("data"), P("data")),
        check_vma=True,
    )
    placed = place(mesh, joined(parts), specs)
    with jax.set_mesh(mesh):
        results = checks.to_host(quick.jit(run)(placed))
        slopes = quick.jit(jax.grad(lambda arrays, ints: run(arrays | ints)[0].sum()))
        ints = {n: a for n, a in placed.items() if a.dtype.kind in "ib"}
        floats = {n: a for n, a in placed.items() if n not in ints}
        grads = checks.to_host(slopes(floats, ints))
    assert all(np.isfinite(grad).all() for grad in grads.values())
    each = zip(*(np.split(r, count) for r in results), strict=True)
    for part, result in zip(parts, each, strict=True):
        compare(part, result, Expected(part), implementation)


def moved(case):
    """Other values of a case's x and states."""
    names = [n for n in ("x", case.state_name) if case.arrays[n] is not None]
    return {name: np.roll(case.arrays[name], 1, 0) for name in names}


@CHECKS.over(KINDS)
def shard_map_over_heads(kind):
    mesh, case = make_mesh(kind, model=4), packed(groups=4)
    specs = specs_of(case, heads="model")
    run = jax.shard_map(
        function(case),
        mesh=mesh,
        in_specs=(specs,),
        out_specs=(specs["x"], specs["ssm_states"]),
        check_vma=True,
    )
    results, program = run_on(mesh, run, case, specs)
    assert_right(case, results)
    assert_local(program)


@pytest.mark.parametrize("name", CHECKS)
def test_on_eight_devices(on_eight_devices, name):
    on_eight_devices(name)


# --- programs for four GPUs -------------------------------------------------------

GPUS = 4


def gpu_case(op, groups):
    kinds = dict.fromkeys(("x", "B", "C", "state"), BFLOAT16)
    return DRAWS[op](int(groups), heads=16, dim=64, size=128, **kinds)


def sharded_heads(op, groups, kind):
    """A step, its cache donated, with heads and groups on four GPUs."""
    case = gpu_case(op, groups)
    specs, run = specs_of(case, heads="gpus"), function(case)
    arrays = {
        n: jax.ShapeDtypeStruct(a.shape, a.dtype) for n, a in present(case).items()
    }
    mesh, explicit = {"gpus": GPUS}, kind == "Explicit"
    if not case.packed:
        return Program(run, (arrays,), (), 1, mesh, (specs,), explicit)
    cache, spec = arrays.pop("ssm_states"), specs.pop("ssm_states")

    def step(cache, arrays):
        return run(arrays | {"ssm_states": cache})

    arguments, all_specs = (cache, arrays), (spec, specs)
    return Program(step, arguments, (0,), 1, mesh, all_specs, explicit)


PROGRAMS = [
    "sharded_heads-packed-1-Auto",
    "sharded_heads-packed-4-Explicit",
    "sharded_heads-decode-4-Auto",
    "sharded_heads-rows-1-Explicit",
]
for_gpus = pytest.mark.skipif(
    gpu_compiler.missing_for_programs() is not None,
    reason=str(gpu_compiler.missing_for_programs()),
)


@pytest.fixture(scope="module")
def programs():
    compiled = gpu_compiler.compile_programs(__name__, PROGRAMS, donate=(True,))
    return {name: program for (name, _), program in compiled.items()}


@for_gpus
@pytest.mark.parametrize("name", PROGRAMS)
def test_each_gpu_runs_the_kernels_on_its_heads_alone(programs, name):
    program, (_, op, groups, _) = programs[name], name.split("-")
    assert_local(program)
    kernels, case = program.kernels(), gpu_case(op, groups)
    assert len(kernels) == (1 if op == "decode" else 2), texts(kernels)
    share = case.arrays["x"].nbytes // GPUS
    assert any(share in k.sizes for k in kernels), texts(kernels)
    assert program.alias_bytes == program.cache_bytes * program.num_caches
    if program.num_caches:
        assert not program.cache_copies(), texts(program.cache_copies())
