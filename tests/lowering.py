"""Every op's kernels compile to PTX, whatever optional arguments there are.

    python -m pytest tests/lowering.py

Nothing here needs a GPU, or says how good the code is, as test_compile_gate does. It is
not among the tests that run by themselves, whose programs have all of these kernels:
`.ci/oldest_triton` runs it with the oldest Triton that is supported, which takes less
of Python than newer ones.
"""

import jax
import jax.numpy as jnp
import pytest

import jax_causal_conv as jcc
from jax_causal_conv.kernels import tiles
from jax_causal_conv.kernels.lowered import lowered_kernels
from jax_causal_conv.mamba2 import DraftStates
from tests.support import gradients, ssd_cases
from tests.support.draws import draw_dense, draw_packed, draw_update
from tests.support.ssd_cases import BFLOAT16, FLOAT32


def flag(name, off=False, on=True):
    """What an argument is without an option, and with it."""
    return {name: off}, {name: on}


def pairwise(options):
    """Few choices of options, in which any two are off, on, and each on alone.

    All off, all on; and of two numbers some bit differs: for each bit of the options'
    numbers those on that have it, and those on that do not.

    Args:
        options: name -> (arguments without it, arguments with it).
    """
    bits = range((len(options) - 1).bit_length())
    choices = [[False] * len(options), [True] * len(options)]
    choices += [
        [number >> bit & 1 == way for number in range(len(options))]
        for bit in bits
        for way in (0, 1)
    ]
    rows = []
    for choice in choices:
        on = [name for name, chosen in zip(options, choice, strict=True) if chosen]
        changes = {}
        for name, (without, argument) in options.items():
            changes |= argument if name in on else without
        rows.append(pytest.param(changes, id=" ".join(on) or "none"))
    return rows


def lowered(run, *arguments):
    """The names of the kernels of a program."""
    with jcc.target_compute_capability(90):
        program = jax.jit(run).trace(*arguments).lower(lowering_platforms=("cuda",))
    return {kernel.name for kernel in lowered_kernels(program)}


def pulled(run):
    """(floats, rest) -> the results of `run`, pulled back."""

    def pull(floats, rest):
        results, pullback = jax.vjp(lambda floats: run(floats, rest), floats)
        return pullback(results)

    return pull


MOVES = {name: flag(name) for name in ("write_indices", "snapshots")}

# --- convs ------------------------------------------------------------------------

FILTER = {
    "bias": flag("bias_dtype", None, BFLOAT16),
    "activation": flag("activation", None, "silu"),
    "residual": flag("residual"),
    "dilation": ({"dilation": 1}, {"dilation": 2, "state_len": 7}),
}
SEQUENCES = {
    name: flag(name)
    for name in ("cache_indices", "has_initial_state", "num_rejected_tokens")
}
ROWS = {
    "indices": flag("conv_state_indices"),
    "queries": flag("num_queries", None, 3),
    "ring": (
        {"cache_seqlens": False, "num_rejected_tokens": True},
        {"cache_seqlens": True, "num_rejected_tokens": False},
    ),
}
SEGMENTS = {"state": flag("state_len", None, 7), "ids": flag("segment_ids")}
CONVS = {  # draw -> options, kernels
    draw_packed: (FILTER | SEQUENCES, {"packed_kernel", "packed_backward_kernel"}),
    draw_update: (FILTER | ROWS, {"update_kernel", "rows_backward_kernel"}),
    draw_dense: (FILTER | SEGMENTS, {"dense_kernel", "rows_backward_kernel"}),
}


def conv(draw, changes):
    """(run, floats, rest) of a case."""
    case = draw(**{"width": 3} | changes)
    return gradients.function(case, "triton"), *gradients.split(case)


@pytest.mark.parametrize(
    "draw, changes",
    [
        pytest.param(draw, *row.values, id=f"{draw.__name__[5:]}: {row.id}")
        for draw, (options, _) in CONVS.items()
        for row in pairwise(options)
    ],
)
def test_conv_and_its_gradient(draw, changes):
    run, *arguments = conv(draw, changes)
    assert lowered(pulled(run), *arguments) == CONVS[draw][1]


@pytest.mark.parametrize("changes", pairwise(SEQUENCES | MOVES))
def test_packed_conv_whose_states_move(changes):
    assert lowered(*conv(draw_packed, changes)) == {"packed_kernel"}


@pytest.mark.parametrize("changes", ROWS["ring"], ids=["rolled", "ring"])
def test_update_whose_states_move(changes):
    changes = changes | {"write_indices": True}
    assert lowered(*conv(draw_update, changes)) == {"update_kernel"}


@pytest.mark.parametrize("draw", CONVS, ids=lambda draw: draw.__name__[5:])
def test_conv_of_columns_of_wider_rows_into_parts(draw):
    run, floats, rest = conv(draw, {})
    floats["x"] = jnp.concatenate([floats["x"]] * 2, -1)

    def of_parts(floats, rest):
        return run(floats, rest | {"channel_offset": 3, "split": (7, 9)})

    assert lowered(pulled(of_parts), floats, rest) == CONVS[draw][1]


# --- the SSD ----------------------------------------------------------------------

TINY = {"heads": 2, "dim": 16, "groups": 1, "size": 16, "num_tokens": 16}
LONG = TINY | {"num_tokens": 512}
SSD = {
    "D": flag("d", None, FLOAT32),
    "bias": flag("bias", None, FLOAT32),
    "softplus": flag("dt_softplus"),
    "limit": flag("dt_limit", ssd_cases.NO_LIMIT, (0.01, 1.0)),
    "narrow": ({}, dict.fromkeys(("x", "B", "C"), BFLOAT16)),
}
DOCUMENTS = {"state": flag("state", None, FLOAT32), "ids": flag("segment_ids")}
BATCH = {
    "slots": flag("cache_indices"),
    "seen": flag("has_initial_state"),
    "by channel": flag("d_by_channel"),
    "drafts": flag("drafts", 0, 2),
}
CHUNKS = {"prepare_kernel", "chunks_kernel"}
BACKWARD = {
    f"backward_{part}_kernel"
    for part in ("prepare", "states", "tokens", "pairs", "heads", "finish")
}


def ssd(case, drafts=0, **options):
    """(run, floats, rest) of a case."""
    static = case.options | options | {"implementation": "triton"}
    static |= dict.fromkeys(name for name, a in case.arrays.items() if a is None)
    present = {name: a for name, a in case.arrays.items() if a is not None}
    rest = {name: a for name, a in present.items() if a.dtype.kind in "ib"}
    floats = {name: a for name, a in present.items() if name not in rest}
    if drafts:
        lead = case.shape.num_slots, drafts
        recent = [jnp.ones((*lead, *floats[n].shape[1:])) for n in ("x", "dt", "B")]
        floats["ssm_states"] = DraftStates(floats["ssm_states"], *recent)
        rest["num_rejected_tokens"] = jnp.ones(case.shape.num_seqs, int)
    op = jcc.ssd_packed if case.packed else jcc.ssd
    return lambda floats, rest: op(**floats, **rest, **static), floats, rest


@pytest.mark.parametrize("changes", pairwise(SSD | DOCUMENTS))
def test_ssd_and_its_gradient(changes):
    case = ssd_cases.draw_rows(**TINY | changes)
    run, *arguments = ssd(case, return_final_state=case.shape.segment_ids)
    assert lowered(pulled(run), *arguments) == CHUNKS | BACKWARD


@pytest.mark.parametrize("most", [0, 1], ids=["decode", "mixed"])
@pytest.mark.parametrize("changes", pairwise(MOVES | BATCH | SSD))
def test_ssd_packed(changes, most):
    changes = dict(changes)
    drafts = changes.pop("drafts")
    case = ssd_cases.draw_packed(**TINY | changes, max_prefills=most)
    kernels = CHUNKS if most else {"decode_kernel"}
    if drafts:
        kernels = kernels | {"recent_kernel"}
    assert lowered(*ssd(case, drafts)) == kernels


@pytest.fixture
def chosen(monkeypatch):
    """The tiles of the SSD that were chosen."""
    tiles_of = []

    def recorded(choose):
        return lambda *known: tiles_of.append(choose(*known)) or tiles_of[-1]

    for name in ("ssd_chunks", "ssd_backward"):
        monkeypatch.setattr(tiles, name, recorded(getattr(tiles, name)))
    return tiles_of


@pytest.mark.parametrize("drafts", [0, 2], ids=["", "drafts"])
@pytest.mark.parametrize("options", [{}, dict.fromkeys(MOVES, True)], ids=["", "moves"])
def test_ssd_packed_by_stretches_of_chunks(options, drafts, chosen):
    case = ssd_cases.draw_packed(**LONG, **options, max_prefills=1)
    kernels = CHUNKS | ({"recent_kernel"} if drafts else set())
    assert lowered(*ssd(case, drafts)) == kernels
    assert chosen and all(tile.stretch for tile in chosen)


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=["float32", "bfloat16"])
def test_gradient_of_ssd_by_groups_of_tiles_and_parts_of_states(dtype, chosen):
    changes = {"dim": 64, "size": 128} | dict.fromkeys(("x", "B", "C"), dtype)
    run, *arguments = ssd(ssd_cases.draw_rows(**LONG | changes))
    assert lowered(pulled(run), *arguments) == CHUNKS | BACKWARD
    tile = chosen[-1]
    assert tile.tiles > 1 and tile.state_k < tile.k_block
    assert tile.head_tiles == (2 if dtype == BFLOAT16 else 1)
