"""What XLA's GPU compiler makes of programs around the ops, without a GPU.

A serving step must not copy its conv states: where they are donated, the kernels
update them in place, in a stack of layers and inside a scan's loop too.
"""

import functools

import jax
import jax.numpy as jnp
import pytest

import jax_causal_conv as jcc
from benchmarks.model_shapes import MODELS
from tests.support import gpu_compiler
from tests.support.gpu_compiler import Program

if reason := gpu_compiler.missing_for_programs():
    pytest.skip(reason, allow_module_level=True)

MODEL = next(model for model in MODELS if model.name == "Nemotron-H-8B")
TOKENS, SEQS, SLOTS = 512, 64, 512  # a cache is larger than any activation
STATE = (SLOTS, MODEL.width - 1, MODEL.dim)
DTYPE = jnp.dtype(MODEL.dtype)


def struct(shape, dtype=DTYPE):
    return jax.ShapeDtypeStruct(shape, dtype)


FILTER = struct((MODEL.dim, MODEL.width))
BIAS = struct((MODEL.dim,))
ROWS = struct((SEQS,), jnp.int32)
SEEN = struct((SEQS,), jnp.bool_)
OFFSETS = struct((SEQS + 1,), jnp.int32)
METADATA = jax.eval_shape(lambda q: jcc.build_metadata(q, TOKENS), OFFSETS)


def packed_layer(x, weight, bias, states, slots, batch):
    offsets, seen, metadata = batch
    return jcc.causal_conv1d_fn(
        x,
        weight,
        bias,
        states,
        offsets,
        cache_indices=slots,
        has_initial_state=seen,
        metadata=metadata,
    )


def update_layer(x, weight, bias, state, slots, batch):
    del batch
    return jcc.causal_conv1d_update(
        x, state, weight, bias, MODEL.activation, conv_state_indices=slots
    )


def moving_layer(x, weight, bias, states, slots, batch):
    offsets, writes, ends, snapshots, metadata = batch
    return jcc.causal_conv1d_fn(
        x,
        weight,
        bias,
        states,
        offsets,
        cache_indices=slots,
        write_indices=writes,
        snapshot_ends=ends,
        snapshot_indices=snapshots,
        metadata=metadata,
    )


def forking_layer(x, weight, bias, state, slots, batch):
    return jcc.causal_conv1d_update(
        *(x, state, weight, bias, MODEL.activation),
        conv_state_indices=slots,
        conv_state_write_indices=batch[0],
    )


LAYERS = {
    "moving": (
        moving_layer,
        struct((TOKENS, MODEL.dim)),
        (OFFSETS, ROWS, ROWS, ROWS, METADATA),
    ),
    "forking": (forking_layer, struct((SEQS, MODEL.dim)), (ROWS,)),
    "packed": (packed_layer, struct((TOKENS, MODEL.dim)), (OFFSETS, SEEN, METADATA)),
    "update": (update_layer, struct((SEQS, MODEL.dim)), ()),
}


def one_call(op):
    layer, x, batch = LAYERS[op]
    return Program(layer, (x, FILTER, BIAS, struct(STATE), ROWS, batch), (3,), 1)


def layer_stack(op):
    """A decode step: all layers in turn, each with its own cache."""
    layer, x, batch = LAYERS[op]

    def step(x, filters, caches, slots, batch):
        updated = []
        for (weight, bias), cache in zip(filters, caches, strict=True):
            y, new_cache = layer(x, weight, bias, cache, slots, batch)
            x = x + y
            updated.append(new_cache)
        return x, updated

    filters = [(FILTER, BIAS)] * MODEL.layers
    caches = [struct(STATE)] * MODEL.layers
    return Program(step, (x, filters, caches, ROWS, batch), (2,), MODEL.layers)


def layer_scan(op):
    """The same as a scan over layers, which carries one cache for all of them."""
    layer, x, batch = LAYERS[op]

    def step(x, filters, cache, slots, batch):
        def body(carry, layer_inputs):
            x, cache = carry
            number, weight, bias = layer_inputs
            own = jcc.layer_slots(slots, number, SLOTS)
            y, cache = layer(x, weight, bias, cache, own, batch)
            return (x + y, cache), None

        numbers = jnp.arange(MODEL.layers)
        (x, cache), _ = jax.lax.scan(body, (x, cache), (numbers, *filters))
        return x, cache

    filters = [struct((MODEL.layers, *f.shape)) for f in (FILTER, BIAS)]
    cache = struct((MODEL.layers * SLOTS, *STATE[1:]))
    return Program(step, (x, filters, cache, ROWS, batch), (2,), MODEL.layers)


one_moving_call = functools.partial(one_call, "moving")
one_forking_call = functools.partial(one_call, "forking")
one_packed_call = functools.partial(one_call, "packed")
one_update_call = functools.partial(one_call, "update")
packed_layer_stack = functools.partial(layer_stack, "packed")
update_layer_stack = functools.partial(layer_stack, "update")
packed_layer_scan = functools.partial(layer_scan, "packed")
update_layer_scan = functools.partial(layer_scan, "update")


def packed_call_without_metadata():
    layer, x, _ = LAYERS["packed"]
    arguments = (x, FILTER, BIAS, struct(STATE), ROWS, (OFFSETS, SEEN, None))
    return Program(layer, arguments, (3,), 1)


def ssd_step(slots, prefills):
    """64 tokens of at most 64 requests in so many slots, by Mamba2-2.7B's SSD."""
    heads, dim, size = 80, 64, 128
    operand = struct((SEQS, 1, size))

    def step(states, x, dt, A, B, C, D, slots, seen):
        return jcc.ssd_packed(
            *(x, dt, A, B, C, D, states, jnp.arange(SEQS + 1)),
            cache_indices=slots,
            has_initial_state=seen,
            max_prefills=int(prefills),
            chunk_size=16,
            implementation="xla",
        )

    per_head = struct((heads,), jnp.float32)
    arguments = (
        struct((int(slots), heads, dim, size), jnp.float32),
        struct((SEQS, heads, dim)),
        struct((SEQS, heads), jnp.float32),
        *(per_head, operand, operand, per_head, ROWS, SEEN),
    )
    return Program(step, arguments, (0,), 0)


def sampling():
    """The engine's drawing of 64 tokens."""
    from jax_causal_conv.mamba2 import sample

    logits = struct((SEQS, 1000), jnp.float32)
    of_rows = [jnp.uint32, jnp.int32, jnp.float32, jnp.int32, jnp.float32]
    rows = (struct((SEQS,), jnp.dtype(kind)) for kind in of_rows)
    return Program(sample, (logits, *rows), (), 0)


CALLS = ["one_packed_call", "one_update_call", "one_moving_call", "one_forking_call"]
STACKS = ["packed_layer_stack", "update_layer_stack"]
SCANS = ["packed_layer_scan", "update_layer_scan"]
# Slots, most prefills, and how often XLA makes arrays of 64 states or more.
SSD_STEPS = [(64, 0, 1), (64, 4, 1), (65, 0, 2)]
# The residual stream and an op's output, with room for alignment.
ACTIVATIONS = 3 * TOKENS * MODEL.dim * DTYPE.itemsize
SCRATCH = 1024  # tables of pointers


@pytest.fixture(scope="module")
def compiled():
    names = [*CALLS, *STACKS, *SCANS, "packed_call_without_metadata"]
    names += [*(f"ssd_step-{slots}-{most}" for slots, most, _ in SSD_STEPS), "sampling"]
    return gpu_compiler.compile_programs(__name__, names)


def texts(instructions):
    return "\n".join(i.text[:200] for i in instructions)


@pytest.mark.parametrize("name", [*CALLS, *STACKS, *SCANS])
def test_donated_states_are_updated_in_place(compiled, name):
    program = compiled[name, True]
    copies = program.cache_copies()
    assert not copies, texts(copies)
    assert program.alias_bytes == program.num_caches * program.cache_bytes


@pytest.mark.parametrize("name", [*CALLS, *STACKS, *SCANS])
def test_kept_states_are_copied_once_and_outside_every_loop(compiled, name):
    program = compiled[name, False]
    copies = program.cache_copies()
    assert len(copies) == program.num_caches, texts(copies)
    assert {c.computation for c in copies} == {program.entry}, texts(copies)
    assert program.alias_bytes == 0


@pytest.mark.parametrize("name", CALLS)
def test_a_call_is_a_single_launch_without_scratch_memory(compiled, name):
    program = compiled[name, True]
    launches = program.launches()
    assert [i.opcode for i in launches] == ["custom-call"], texts(launches)
    assert program.temp_bytes <= SCRATCH


@pytest.mark.parametrize("name", STACKS)
def test_a_stack_launches_one_kernel_per_layer(compiled, name):
    program = compiled[name, True]
    assert len(program.kernels()) == program.layers
    assert program.temp_bytes <= ACTIVATIONS


@pytest.mark.parametrize("name", SCANS)
def test_a_scan_holds_one_kernel_in_its_loop(compiled, name):
    program = compiled[name, True]
    assert len(program.kernels()) == 1
    assert program.temp_bytes <= ACTIVATIONS


def test_metadata_built_in_the_graph_copies_no_states(compiled):
    program = compiled["packed_call_without_metadata", True]
    assert not program.cache_copies(), texts(program.cache_copies())
    assert len(program.kernels()) == 1
    assert program.temp_bytes < program.cache_bytes / 16


@pytest.mark.parametrize(("slots", "most", "passes"), SSD_STEPS)
def test_ssd_passes_over_the_states(compiled, slots, most, passes):
    """Once, where all slots may take part. Else it gathers rows, and scatters them."""
    program = compiled[f"ssd_step-{slots}-{most}", True]
    one_row = program.cache_bytes // slots
    large = [i for i in program.launches() if max(i.sizes) >= SEQS * one_row]
    assert len(large) == passes, texts(large)
    assert program.alias_bytes == program.cache_bytes
    rows_are_kept = program.temp_bytes >= SEQS * one_row
    assert rows_are_kept == (passes > 1), program.temp_bytes


def test_sampling_never_makes_the_host_wait(compiled):
    """Which branch to take, or whether to go on, the host would have to read."""
    instructions = compiled["sampling", True].instructions
    assert not [i for i in instructions if i.opcode == "conditional"]
    loops = [i for i in instructions if i.opcode == "while"]
    assert loops and all("known_trip_count" in i.text for i in loops), texts(loops)
