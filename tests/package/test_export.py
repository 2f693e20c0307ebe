"""Programs saved by `jax.export`: where they run, at which sizes, with gradients."""

import os
import pickle
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_causal_conv as jcc
from tests.support import REPOSITORY, checks
from tests.support.draws import ints, offsets_of
from tests.support.gradients import (
    EACH_OP,
    assert_gradients,
    assert_values,
    draw_cotangents,
    function,
    one_of_each_op,
    small_dense,
    small_packed,
    small_ring,
    small_update,
    split,
)
from tests.support.platforms import KERNEL_CALLS, ON_CPU, exported, needs_triton

pytest.importorskip("flatbuffers", reason="jax.export serialises with flatbuffers")

WORKER = REPOSITORY / "tests" / "support" / "exported_worker.py"


def with_metadata(case):
    """(floats, rest, metadata) -> (out, states), for the packed op."""
    static = {"activation": case.options["activation"]}
    return lambda floats, rest, metadata: jcc.causal_conv1d_fn(
        **floats, **rest, metadata=metadata, **static
    )


def metadata_of(case, block_m=8):
    arrays = case.arrays
    return jcc.build_metadata(
        arrays["query_start_loc"], len(arrays["x"]), block_m=block_m
    )


def gradients_by_name(floats, gradients):
    """A pullback's flat results: those of the float arguments come first."""
    leaves, tree = jax.tree.flatten(floats)
    return jax.tree.unflatten(tree, gradients[: len(leaves)])


# --- elsewhere --------------------------------------------------------------------

SAVED = ["dense", "packed", "update", "ring", "metadata", "forked"]


def case_named(name):
    cases = one_of_each_op(21)
    if name == "forked":
        moves = {"cache_indices": ints(4, 4, -1, 2), "write_indices": ints(0, 1, 3, -1)}
        return small_packed(22, arrays=moves)
    return cases[1] if name == "metadata" else cases[SAVED.index(name)]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folder, after all programs were saved here and run in another process."""
    folder = tmp_path_factory.mktemp("exported")
    for name in SAVED:
        case = case_named(name)
        arguments = split(case)
        run = function(case, None)
        if name == "metadata":
            arguments, run = (*arguments, metadata_of(case)), with_metadata(case)
        program = exported(run, *arguments)
        file = folder / f"{name}.export"
        file.write_bytes(program.serialize(vjp_order=1))
        inputs = jax.tree.map(np.asarray, arguments), draw_cotangents(case)
        file.with_suffix(".in").write_bytes(pickle.dumps(inputs))
    run = subprocess.run(
        [sys.executable, str(WORKER), str(folder)],
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(REPOSITORY)},
    )
    assert run.returncode == 0, run.stderr
    return folder


@pytest.mark.parametrize("name", SAVED)
def test_saved_program_runs_where_triton_cannot_be_imported(saved, name):
    case = case_named(name)
    results, gradients = pickle.loads((saved / f"{name}.out").read_bytes())
    assert_values(results, case, name)
    got = gradients_by_name(split(case)[0], gradients)
    assert_gradients(got, case, draw_cotangents(case))


@needs_triton
@pytest.mark.parametrize("name", SAVED)
def test_saved_program_and_its_pullback_carry_kernels(saved, name):
    program = jax.export.deserialize((saved / f"{name}.export").read_bytes())
    assert program.platforms == ("cpu", "cuda")
    forward, backward = program.mlir_module(), program.vjp().mlir_module()
    assert any(call in forward for call in KERNEL_CALLS)
    assert any(call in backward for call in KERNEL_CALLS)


# --- symbolic sizes ---------------------------------------------------------------


def symbolic(**sizes):
    """Shapes by name from lists of sizes such as `x="T, 6"`, in one scope."""
    scope = jax.export.SymbolicScope(sizes.pop("constraints", ()))
    return {
        name: jax.export.symbolic_shape(text, scope=scope)
        for name, text in sizes.items()
    }


def structs(case, shapes):
    """`split(case)` as `ShapeDtypeStruct`s, of other shapes where named."""

    def struct(name, array):
        return jax.ShapeDtypeStruct(shapes.get(name, array.shape), array.dtype)

    return tuple(
        {name: array if array is None else struct(name, array) for name, array in d}
        for d in (part.items() for part in split(case))
    )


def symbolic_dense():
    shapes = symbolic(x="B, T, 6", initial_state="B, 5, 6", segment_ids="B, T")
    sizes = ({"num_rows": 1, "num_tokens": 2}, {"num_rows": 3, "num_tokens": 70})
    return shapes, [small_dense(seed, **size) for seed, size in enumerate(sizes)]


def symbolic_packed():
    per_sequence = ("cache_indices", "has_initial_state", "num_rejected_tokens")
    shapes = symbolic(
        x="T, 6",
        conv_states="S, 5, 6",
        query_start_loc="N + 1",
        **dict.fromkeys(per_sequence, "N"),
    )
    one = {
        "query_start_loc": ints(0, 7),
        "cache_indices": ints(1),
        "has_initial_state": np.array([True]),
        "num_rejected_tokens": ints(1),
    }
    many = {
        "query_start_loc": offsets_of([40, 1, 3, 19, 0], head=2),
        "cache_indices": ints(4, 0, -1, 2, 3),
        "has_initial_state": np.array([True, True, True, False, True]),
        "num_rejected_tokens": ints(0, 2, 1, 3, 0),
    }
    return shapes, [
        small_packed(0, arrays=one, num_tokens=9, num_seqs=1, num_slots=2),
        small_packed(1, arrays=many, num_tokens=70, num_seqs=5, num_slots=9),
    ]


def symbolic_update():
    shapes = symbolic(x="B, Q, 6", conv_state="S, 5, 6", conv_state_indices="B")
    one = {"conv_state_indices": ints(2)}
    return shapes, [
        small_update(0, arrays=one, num_rows=1, num_queries=1, num_slots=3),
        small_update(1, num_queries=7, num_slots=8),
    ]


def symbolic_ring():
    # Which rows a step writes depends on Q <= L: the one thing that must be promised.
    shapes = symbolic(
        x="B, Q, 6",
        conv_state="S, 5, 6",
        conv_state_indices="B",
        cache_seqlens="B",
        constraints=["Q <= 5"],
    )
    return shapes, [
        small_ring(0, num_slots=5),
        small_ring(1, num_queries=5, num_slots=8),
    ]


SYMBOLIC = [symbolic_dense, symbolic_packed, symbolic_update, symbolic_ring]
called_on_a_cpu = pytest.mark.skipif(not ON_CPU, reason="calls programs for a CPU")


@called_on_a_cpu
@EACH_OP
def test_one_program_with_symbolic_sizes_serves_every_batch(number):
    shapes, cases = SYMBOLIC[number]()
    run = function(cases[0], None)
    program = exported(run, *structs(cases[0], shapes), platforms=("cpu",))
    program = jax.export.deserialize(program.serialize(vjp_order=1))
    for case in cases:
        assert_values(program.call(*split(case)), case)
    cotangents = draw_cotangents(case)
    leaves = jax.tree.leaves(split(case))
    gradients = checks.to_host(program.vjp().call(*leaves, *cotangents))
    assert_gradients(gradients_by_name(split(case)[0], gradients), case, cotangents)


@called_on_a_cpu
def test_metadata_of_symbolic_size_is_welcome():
    shapes, cases = symbolic_packed()
    programs = shapes["x"][0] // 8 + shapes["query_start_loc"][0]
    array = jax.ShapeDtypeStruct((programs,), jnp.int32)
    metadata = jcc.ConvMetadata(array, array, 8)
    run = with_metadata(cases[0])
    program = exported(run, *structs(cases[0], shapes), metadata, platforms=("cpu",))
    for case in cases:
        assert_values(program.call(*split(case), metadata_of(case)), case)


@called_on_a_cpu
def test_vmap_over_rows_of_symbolic_sizes():
    weight = jnp.arange(24.0).reshape(6, 4)
    run = jax.vmap(lambda x: jcc.causal_conv1d(x, weight))
    x = jax.ShapeDtypeStruct(symbolic(x="V, B, T, 6")["x"], jnp.float32)
    program = exported(run, x, platforms=("cpu",))
    for shape in ((2, 3, 5, 6), (1, 2, 70, 6)):
        x = jnp.sin(jnp.arange(np.prod(shape)).reshape(shape))
        rows = x.reshape(-1, *shape[2:])
        want = jcc.causal_conv1d(rows, weight).reshape(shape)
        np.testing.assert_allclose(program.call(x), want, rtol=1e-5, atol=1e-5)


@needs_triton
@EACH_OP
def test_kernels_say_that_they_need_static_sizes(number):
    shapes, (case, _) = SYMBOLIC[number]()
    arguments = structs(case, shapes)
    cure = r'static sizes.*implementation="xla"'
    with pytest.raises(NotImplementedError, match=cure):
        exported(function(case, None), *arguments, platforms=("cuda",))
    saved = exported(function(case, "xla"), *arguments, platforms=("cpu", "cuda"))
    assert KERNEL_CALLS[0] not in saved.mlir_module()
