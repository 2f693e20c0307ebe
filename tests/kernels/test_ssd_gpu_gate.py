"""What XLA's GPU compiler makes of steps with the SSD, without a GPU.

A decode step is one launch, a mixed batch two, whatever the ratio of slots to
sequences, and drafts one more; the tables of a batch are computed once for all layers;
a donated cache is never copied; and nothing of the XLA implementation runs.
"""

import math

import jax
import jax.numpy as jnp
import pytest

import jax_causal_conv as jcc
from jax_causal_conv.mamba2 import DraftStates
from tests.support import gpu_compiler
from tests.support.gpu_compiler import Program

if reason := gpu_compiler.missing_for_programs():
    pytest.skip(reason, allow_module_level=True)

HEADS, DIM, SIZE = 8, 64, 128
SEQS, TOKENS, PREFILLS = 16, 256, 4
SLOTS = 256  # a layer's cache is larger than any activation
KERNELS = {0: 1, PREFILLS: 2}  # launches a layer, by the most prefills


def struct(*shape, dtype="bfloat16"):
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))


def batch_of(most):
    """x, dt, B and C, and the integers of a step."""
    tokens = TOKENS if most else SEQS
    floats = struct(tokens, HEADS, DIM), struct(tokens, HEADS, dtype="float32")
    groups = struct(tokens, 1, SIZE)
    integers = struct(SEQS + 1, dtype="int32"), struct(SEQS, dtype="int32")
    return (*floats, groups, groups), (*integers, struct(SEQS, dtype="bool"))


def layer(tokens, head, cache, integers, most):
    x, dt, B, C = tokens
    offsets, slots, seen = integers
    return jcc.ssd_packed(
        *(x, dt, head, B, C, head, cache, offsets),
        cache_indices=slots,
        has_initial_state=seen,
        max_prefills=most,
        dt_bias=head,
        dt_softplus=True,
    )


HEAD = struct(HEADS, dtype="float32")


def stack(count, slots, most, state="float32"):
    """So many layers in turn, each with a cache of its own."""
    count, most = int(count), int(most)
    tokens, integers = batch_of(most)

    def step(tokens, heads, caches, integers):
        x, *rest = tokens
        updated = []
        for head, cache in zip(heads, caches, strict=True):
            y, new = layer((x, *rest), head, cache, integers, most)
            x = x + y
            updated.append(new)
        return x, updated

    caches = [struct(int(slots), HEADS, DIM, SIZE, dtype=state)] * count
    return Program(step, (tokens, [HEAD] * count, caches, integers), (2,), count)


def scan(count, most):
    """The same as a scan over layers, which carries one cache for all of them."""
    count, most = int(count), int(most)
    tokens, integers = batch_of(most)

    def step(tokens, heads, cache, integers):
        x, *rest = tokens
        offsets, slots, seen = integers

        def body(carry, inputs):
            (x, cache), (number, head) = carry, inputs
            own = offsets, jcc.layer_slots(slots, number, SLOTS), seen
            y, cache = layer((x, *rest), head, cache, own, most)
            return (x + y, cache), None

        numbers = jnp.arange(count)
        return jax.lax.scan(body, (x, cache), (numbers, heads))[0]

    cache = struct(count * SLOTS, HEADS, DIM, SIZE, dtype="float32")
    heads = struct(count, HEADS, dtype="float32")
    return Program(step, (tokens, heads, cache, integers), (2,), count)


def moving(most):
    """A call whose states go elsewhere, and which leaves snapshots."""
    tokens, (*integers, seen) = batch_of(int(most))

    def step(tokens, head, cache, integers, moves):
        x, dt, B, C = tokens
        offsets, slots, seen = integers
        writes, ends, snapshots = moves
        return jcc.ssd_packed(
            *(x, dt, head, B, C, head, cache, offsets),
            cache_indices=slots,
            has_initial_state=seen,
            write_indices=writes,
            snapshot_ends=ends,
            snapshot_indices=snapshots,
            max_prefills=int(most),
        )

    cache = struct(SLOTS, HEADS, DIM, SIZE, dtype="float32")
    moves = (struct(SEQS, dtype="int32"),) * 3
    return Program(step, (tokens, HEAD, cache, (*integers, seen), moves), (2,), 1)


RECENT = (
    struct(SLOTS, 3, HEADS, DIM),
    struct(SLOTS, 3, HEADS, dtype="float32"),
    struct(SLOTS, 3, 1, SIZE),
)


def drafts(most):
    """A call from whose cache three drafts can be taken back."""
    tokens, (*integers, seen) = batch_of(int(most))

    def step(tokens, head, cache, recent, integers):
        x, dt, B, C = tokens
        offsets, slots, rejected, seen = integers
        y, new = jcc.ssd_packed(
            *(x, dt, head, B, C, head, DraftStates(cache, *recent), offsets),
            cache_indices=slots,
            has_initial_state=seen,
            num_rejected_tokens=rejected,
            max_prefills=int(most),
        )
        return y, *new

    cache = struct(SLOTS, HEADS, DIM, SIZE, dtype="float32")
    integers = (*integers, struct(SEQS, dtype="int32"), seen)
    return Program(step, (tokens, HEAD, cache, RECENT, integers), (2, 3), 1)


# Layers, slots (as many as sequences, fewer and many more), most prefills.
STACKS = [
    *(f"stack-1-{slots}-{most}" for slots in (SLOTS, SEQS) for most in KERNELS),
    f"stack-1-{SLOTS}-0-bfloat16",
    *(f"stack-{count}-{SLOTS}-{most}" for count in (2, 4) for most in KERNELS),
]
SCANS = [f"scan-4-{most}" for most in KERNELS]
MOVES = [f"{how}-{most}" for how in ("moving", "drafts") for most in KERNELS]


@pytest.fixture(scope="module")
def compiled():
    programs = gpu_compiler.compile_programs(
        __name__, [*STACKS, *SCANS, *MOVES], donate=(True,)
    )
    return {name: program for (name, _), program in programs.items()}


def texts(instructions):
    return "\n".join(i.text[:200] for i in instructions)


def most_of(name):
    return int(name.split("-")[3 if name.startswith("stack") else 2])


@pytest.mark.parametrize("name", STACKS)
def test_a_decode_step_is_one_launch_a_layer_and_a_mixed_batch_two(compiled, name):
    program, launches = compiled[name], KERNELS[most_of(name)]
    kernels = program.kernels()
    assert len(kernels) == launches * program.layers, texts(kernels)


@pytest.mark.parametrize("name", [*STACKS, *SCANS])
def test_donated_states_are_updated_in_place(compiled, name):
    program = compiled[name]
    if f"-{SEQS}-" not in name:  # else activations are as large
        copies = program.cache_copies()
        assert not copies, texts(copies)
    assert program.alias_bytes == program.num_caches * program.cache_bytes
    assert program.temp_bytes < program.cache_bytes or f"-{SEQS}-" in name


@pytest.mark.parametrize("name", MOVES)
def test_states_that_move_take_no_launch_more_and_no_copy(compiled, name):
    program, (how, most) = compiled[name], name.split("-")
    assert len(program.kernels()) == KERNELS[int(most)] + (how == "drafts")
    assert not program.cache_copies(), texts(program.cache_copies())
    recent = sum(math.prod(a.shape) * a.dtype.itemsize for a in RECENT)
    assert program.alias_bytes == program.cache_bytes + (how == "drafts") * recent
    assert program.temp_bytes < program.cache_bytes


def test_a_step_with_drafts_has_nothing_but_its_kernels(compiled):
    """Neither is a longer batch made, nor what slots know of last tokens copied."""
    launches = compiled["drafts-0"].launches()
    assert len(launches) == 2, texts(launches)


@pytest.mark.parametrize("most", KERNELS)
def test_a_scan_holds_one_layers_kernels_in_its_loop(compiled, most):
    assert len(compiled[f"scan-4-{most}"].kernels()) == KERNELS[most]


@pytest.mark.parametrize("most", KERNELS)
def test_tables_are_computed_once_for_all_layers(compiled, most):
    """All launches but the kernels, and the layers' own sums, are as many."""
    others = {}
    for count in (2, 4):
        program = compiled[f"stack-{count}-{SLOTS}-{most}"]
        others[count] = len(program.launches()) - len(program.kernels()) - count
    assert others[2] == others[4], others


@pytest.mark.parametrize("name", [*STACKS, *SCANS])
def test_nothing_of_the_xla_implementation_runs(compiled, name):
    """There is no product of matrices, and no loop but over layers."""
    program = compiled[name]
    products = [i for i in program.instructions if i.opcode == "dot"]
    assert not products, texts(products)
    assert "__cublas" not in program.hlo and "triton_gemm" not in program.hlo
    loops = [i for i in program.instructions if i.opcode == "while"]
    assert len(loops) == name.startswith("scan"), texts(loops)


def test_a_decode_step_alone_has_nothing_but_its_kernel(compiled):
    launches = compiled[f"stack-1-{SLOTS}-0"].launches()
    # The kernel, and the sum of x and y that this program has beside it.
    assert len(launches) == 2, texts(launches)
