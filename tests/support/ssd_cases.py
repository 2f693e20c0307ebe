"""Cases of the SSD: random ones, how to run them, and what they must give.

As for the conv, a *shape* is everything static, thus one compilation, and a *case* is a
shape filled with arrays. Letters as in `jax_causal_conv.ssd`; the dtypes of a shape are
those of the arguments of the same names.
"""

import dataclasses
import functools
import itertools
import math
from typing import Any

import jax
import numpy as np

from jax_causal_conv import ssd, ssd_packed
from jax_causal_conv.mamba2 import DraftStates
from tests.support import cases, checks, quick
from tests.support import ssd_reference as reference
from tests.support.cases import FLOATS, INT32, choose
from tests.support.platforms import HAS_GPU
from tests.support.ssd_reference import NO_LIMIT

FLOAT32, FLOAT16, BFLOAT16 = FLOATS
FLOAT64 = np.dtype("float64")
DT_LIMITS = ((0.01, 0.3), (0.0, 0.2), (0.05, math.inf))
EXTREME_STEPS = (0.0, 1e-6, 3.0, 40.0, 1e4, 1e30)
# Lengths around the chunk of the kernels, and that of small cases.
LENGTHS = (0, 1, 1, 1, 2, 3, 15, 16, 17, 33, 63, 64, 65, 129)


@dataclasses.dataclass(frozen=True)
class Shape:
    """What is static in both ops.

    Attributes:
        d: dtype of D, None for none; `d_by_channel`: `(H, P)`.
        bias: dtype of dt_bias, None for none.
    """

    heads: int = 4
    dim: int = 5
    groups: int = 2
    size: int = 7
    x: Any = FLOAT32
    dt: Any = FLOAT32
    A: Any = FLOAT32
    B: Any = FLOAT32
    C: Any = FLOAT32
    d: Any | None = FLOAT32
    d_by_channel: bool = False
    bias: Any | None = None
    dt_softplus: bool = False
    dt_limit: tuple[float, float] = NO_LIMIT
    chunk_size: int = 16
    precision: str | None = None
    state: Any | None = FLOAT32

    @property
    def state_shape(self) -> tuple[int, int, int]:
        return self.heads, self.dim, self.size

    def options(self) -> dict[str, Any]:
        names = ("dt_softplus", "dt_limit", "chunk_size", "precision")
        return {name: getattr(self, name) for name in names}


@dataclasses.dataclass(frozen=True)
class PackedShape(Shape):
    """A shape of `ssd_packed`. The flags say which optional arguments there are.

    Attributes:
        drafts: q, the tokens that can be taken back; 0 without `DraftStates`.
    """

    num_tokens: int = 40
    num_seqs: int = 5
    num_slots: int = 7
    index: Any = INT32
    cache_indices: bool = True
    has_initial_state: bool = True
    max_prefills: int | None = None
    pad_slot_id: int = -1
    write_indices: bool = False
    snapshots: bool = False
    drafts: int = 0

    def options(self) -> dict[str, Any]:
        names = ("max_prefills", "pad_slot_id")
        return super().options() | {name: getattr(self, name) for name in names}


@dataclasses.dataclass(frozen=True)
class RowsShape(Shape):
    """A shape of `ssd`; `state` None: no initial state."""

    num_rows: int = 2
    num_tokens: int = 23
    segment_ids: bool = True


RECENT = ("recent_x", "recent_dt", "recent_B")
"""Arrays of a case that has drafts, in the order of `DraftStates`."""


@dataclasses.dataclass(frozen=True)
class Case:
    """Arguments of one call, by their public names."""

    shape: Any
    arrays: dict[str, np.ndarray | None]

    def replace(self, **arrays) -> "Case":
        return dataclasses.replace(self, arrays=self.arrays | arrays)

    @property
    def packed(self) -> bool:
        return isinstance(self.shape, PackedShape)

    @property
    def options(self) -> dict[str, Any]:
        return self.shape.options()

    @property
    def state_name(self) -> str:
        return "ssm_states" if self.packed else "initial_state"

    @property
    def arguments(self) -> dict[str, Any]:
        """The arrays as the public op takes them."""
        given: dict[str, Any] = dict(self.arrays)
        recent = [given.pop(name, None) for name in RECENT]
        if recent[0] is not None:
            given["ssm_states"] = DraftStates(given["ssm_states"], *recent)
        return given

    def __str__(self):
        integers = {
            name: array.tolist()
            for name, array in self.arrays.items()
            if array is not None and array.dtype.kind in "iub"
        }
        return f"{self.shape}\n  {integers}"


# Drawing.


def _parameters(shape: Shape, rng, *lead: int) -> dict[str, np.ndarray | None]:
    def normal(dtype, *sizes):
        return rng.standard_normal(sizes).astype(dtype)

    heads, of_group = shape.heads, (*lead, shape.groups, shape.size)
    low, high = (-4, 1) if shape.dt_softplus else (0.001, 0.5)
    D = None
    if shape.d is not None:
        D = normal(shape.d, *((heads, shape.dim) if shape.d_by_channel else (heads,)))
    bias = None
    if shape.bias is not None:
        bias = rng.uniform(0, 0.1, heads).astype(shape.bias)
    return {
        "x": normal(shape.x, *lead, heads, shape.dim),
        "dt": rng.uniform(low, high, (*lead, heads)).astype(shape.dt),
        "A": -rng.uniform(0.1, 16, heads).astype(shape.A),
        "B": normal(shape.B, *of_group),
        "C": normal(shape.C, *of_group),
        "D": D,
        "dt_bias": bias,
    }


def offsets_of(shape: PackedShape, rng, lengths=LENGTHS) -> list[int]:
    """Valid offsets: interesting lengths, often an uncovered head and tail."""
    offsets = [min(int(choose(rng, (0, 0, 1, 5))), shape.num_tokens)]
    for _ in range(shape.num_seqs):
        offsets.append(min(offsets[-1] + int(choose(rng, lengths)), shape.num_tokens))
    if rng.random() < 0.5:
        offsets[-1] = shape.num_tokens
    return offsets


def _malformed(shape: PackedShape, rng, offsets: list[int]) -> list[int]:
    if rng.random() < 0.5:
        rng.shuffle(offsets)
    far = cases.far_values(shape.index)
    return [choose(rng, far) if rng.random() < 0.3 else o for o in offsets]


def draw_packed(seed: Any = 0, *, malformed=False, lengths=LENGTHS, **changes) -> Case:
    """A packed batch: decodes, prefills, empty and skipped ones, gaps at both ends.

    Args:
        seed: anything that seeds, or a generator.
        malformed: integers that no careful caller would pass.
        lengths: of sequences, to choose from.
        changes: to `PackedShape`, or a whole one as `shape`.
    """
    shape = changes.pop("shape", None) or PackedShape(**changes)
    rng = np.random.default_rng(seed)
    offsets = offsets_of(shape, rng, lengths)
    if malformed:
        offsets = _malformed(shape, rng, offsets)
    offsets = cases.integers(offsets, shape.index)
    lengths = np.diff(reference.clean_offsets(offsets, shape.num_tokens))
    live = lengths > 0
    slots = None
    if shape.cache_indices:
        slots = cases.random_slots(
            rng, live, shape.num_slots, shape.pad_slot_id, shape.index, malformed
        )
    states = rng.standard_normal((shape.num_slots, *shape.state_shape))
    seen = rng.random(shape.num_seqs) < 0.6 if shape.has_initial_state else None
    arrays = _parameters(shape, rng, shape.num_tokens) | {
        "ssm_states": states.astype(shape.state),
        "query_start_loc": offsets,
        "cache_indices": slots,
        "has_initial_state": seen,
    }
    if shape.write_indices or shape.snapshots:
        arrays |= cases.random_moves(rng, lengths, shape, slots, shape.index, malformed)
    if shape.drafts:
        arrays |= _random_drafts(shape, rng, malformed)
    return Case(shape, arrays)


def _random_drafts(shape: PackedShape, rng, malformed: bool) -> dict[str, np.ndarray]:
    """Recent tokens of all slots, and how many of them are taken back."""
    lead = shape.num_slots, shape.drafts
    steps = rng.uniform(0, 0.5, (*lead, shape.heads)).astype(FLOAT32)
    x = rng.standard_normal((*lead, shape.heads, shape.dim))
    B = rng.standard_normal((*lead, shape.groups, shape.size))
    return {
        "recent_x": x.astype(shape.x),
        "recent_dt": np.where(rng.random(steps.shape) < 0.1, np.float32(40), steps),
        "recent_B": B.astype(FLOAT32 if rng.random() < 0.2 else shape.B),
        "num_rejected_tokens": cases.random_rejected(
            rng, shape.num_seqs, shape.drafts, shape.index, malformed
        ),
    }


def batch(lengths, *, head=0, tail=0, seed: Any = 0, **changes) -> Case:
    """A packed batch of these lengths; slots in a mixed order, all of them known."""
    sizes = {
        "num_seqs": len(lengths),
        "num_tokens": head + sum(lengths) + tail,
        "num_slots": len(lengths) + 2,
    }
    case = draw_packed(seed, **(sizes | changes))
    rng = np.random.default_rng(seed)
    offsets = np.cumsum([head, *lengths]).astype(case.shape.index)
    case = case.replace(query_start_loc=offsets)
    if case.shape.cache_indices:
        slots = rng.permutation(case.shape.num_slots)[: len(lengths)]
        case = case.replace(cache_indices=slots.astype(case.shape.index))
    if case.shape.has_initial_state:
        case = case.replace(has_initial_state=np.ones(len(lengths), bool))
    return case


def draw_rows(seed: Any = 0, **changes) -> Case:
    """Rows of several documents and padding, perhaps with initial states."""
    shape = changes.pop("shape", None) or RowsShape(**changes)
    rng = np.random.default_rng(seed)
    lead, ids, state = (shape.num_rows, shape.num_tokens), None, None
    if shape.segment_ids:
        ids = np.zeros(lead, np.int32)
        for row in ids:
            first = 0
            while first < shape.num_tokens:
                count = int(choose(rng, (1, 1, 2, 3, 5, 9, 16, 17, 40, 70)))
                row[first : first + count] = choose(rng, (-3, -1, 0, 1, 5))
                first += count
    if shape.state is not None:
        state = rng.standard_normal((shape.num_rows, *shape.state_shape))
        state = state.astype(shape.state)
    arrays = _parameters(shape, rng, *lead)
    return Case(shape, arrays | {"initial_state": state, "segment_ids": ids})


def with_extreme_steps(case: Case, rng, share=0.1) -> Case:
    """Some steps that hold on to everything, and some that forget everything."""
    dt = case.arrays["dt"].copy()
    some = rng.random(dt.shape) < share
    with np.errstate(over="ignore"):
        steps = rng.choice(EXTREME_STEPS, dt.shape).astype(dt.dtype)
    steps = np.where(np.isfinite(steps), steps, 0)
    dt[some] = steps[some]
    return case.replace(dt=dt)


def with_nonfinite(case: Case, rng) -> Case:
    """NaN and infinities in some rows of tokens, and in some of the states."""
    changed = {}
    for name in ("x", "dt", "B", "C", case.state_name, *RECENT):
        array = case.arrays.get(name)
        if array is None or rng.random() < 0.5 or array.size == 0:
            continue
        array = array.copy()
        few = name not in RECENT and (case.packed or name == case.state_name)
        lead = array.shape[: 1 if few else 2]
        rows = rng.random(lead) < choose(rng, (0.05, 0.3))
        array[rows] = choose(rng, (np.nan, np.inf, -np.inf))
        changed[name] = array
    return case.replace(**changed)


# Random shapes.


def _random_shape(rng) -> dict[str, Any]:
    groups = int(choose(rng, (1, 1, 2, 3)))
    one = choose(rng, FLOATS)
    mixed = rng.random() < 0.5
    names = ("x", "dt", "A", "B", "C", "d", "bias", "state")
    dtypes = {name: choose(rng, FLOATS) if mixed else one for name in names}
    if not mixed:
        dtypes |= {"dt": FLOAT32, "A": FLOAT32}
    for name in ("d", "bias"):
        dtypes[name] = cases.maybe(rng, dtypes[name], 0.7)
    return dtypes | {
        "heads": groups * int(choose(rng, (1, 2, 3))),
        "dim": int(choose(rng, (1, 3, 8, 16, 20))),
        "groups": groups,
        "size": int(choose(rng, (1, 5, 16, 19, 32))),
        "d_by_channel": bool(rng.random() < 0.3),
        "dt_softplus": bool(rng.random() < 0.4),
        "dt_limit": choose(rng, (NO_LIMIT, NO_LIMIT, *DT_LIMITS)),
        "chunk_size": int(choose(rng, (1, 5, 16, 64))),
    }


def random_packed_shape(rng, index_dtypes=("int32",)) -> PackedShape:
    """A random shape that suits an interpreter that takes its time."""
    cache_indices = bool(rng.random() < 0.8)
    num_seqs = int(choose(rng, (1, 2, 3, 5, 9)))
    num_slots = int(choose(rng, (1, 4, 7, 12)))
    if not cache_indices:
        num_slots = max(num_slots, num_seqs)
    return PackedShape(
        **_random_shape(rng),
        num_tokens=int(choose(rng, (1, 2, 7, 24, 40, 70, 140))),
        num_seqs=num_seqs,
        num_slots=num_slots,
        index=np.dtype(choose(rng, index_dtypes)),
        cache_indices=cache_indices,
        has_initial_state=bool(rng.random() < 0.8),
        max_prefills=choose(rng, (None, None, None, 0, 1, 2)),
        pad_slot_id=int(choose(rng, (-1, -1, -1, 0, 2, 300))),
        write_indices=bool(rng.random() < 0.3),
        snapshots=bool(rng.random() < 0.3),
        drafts=int(choose(rng, (0, 0, 0, 1, 2, 3))),
    )


def random_rows_shape(rng) -> RowsShape:
    shape = RowsShape(
        **_random_shape(rng),
        num_rows=int(choose(rng, (1, 2, 3))),
        num_tokens=int(choose(rng, (1, 2, 7, 24, 40, 70, 140))),
        segment_ids=bool(rng.random() < 0.6),
    )
    return dataclasses.replace(shape, state=cases.maybe(rng, shape.state, 0.7))


def random_case(shape: Any, rng, *, malformed: bool | None = None) -> Case:
    """A shape filled with values of every kind; None: half of the time malformed."""
    if isinstance(shape, PackedShape):
        if malformed is None:
            malformed = rng.random() < 0.5
        case = draw_packed(rng, shape=shape, malformed=malformed)
        slots, moving = case.arrays["cache_indices"], shape.write_indices
        moving = moving or shape.snapshots
        if slots is not None and len(slots) > 1 and rng.random() < 0.1 and not moving:
            slots = slots.copy()  # perhaps two live sequences on one slot
            slots[rng.integers(len(slots))] = slots[rng.integers(len(slots))]
            case = case.replace(cache_indices=slots)
    else:
        case = draw_rows(rng, shape=shape)
    if rng.random() < 0.3:
        case = with_extreme_steps(case, rng)
    return with_nonfinite(case, rng) if rng.random() < 0.3 else case


# Running.

STATIC = (
    *("chunk_size", "max_prefills", "pad_slot_id", "return_final_state"),
    *("dt_softplus", "dt_limit", "precision", "implementation"),
)


@functools.cache
def jitted(function):
    """One jitted version of a public op, shared by all tests of a process."""
    names = [n for n in STATIC if (n == "return_final_state") <= (function is ssd)]
    if function is ssd:
        names = [n for n in names if n not in ("max_prefills", "pad_slot_id")]
    return quick.jit(function, static_argnames=names)


def call(case: Case, implementation, *, final=True) -> tuple:
    """The op of a case on its arrays; eager if jit would narrow 64-bit integers."""
    function, options = (ssd_packed if case.packed else ssd), case.shape.options()
    if not case.packed:
        options["return_final_state"] = final
    wide = any(a is not None and a.dtype.itemsize == 8 for a in case.arrays.values())
    jit = not wide or jax.config.jax_enable_x64
    run = jitted(function) if jit else function
    results = run(**case.arguments, **options, implementation=implementation)
    return tuple(checks.to_host(jax.tree.leaves(results)))


# What it must give.


class Expected:
    """The reference's results of a case, and which of them are specified.

    Not specified are: what two live sequences on one slot compute, and leave there; and
    in a sequence or run that meets NaN or inf, whatever the recurrence makes finite.
    But where runs share a row, tokens before the first of them are.

    Attributes:
        y, states: in float64.
        recent: the new recent tokens; None without drafts.
        y_size, state_size: sums of the sizes of all terms of each.
        rows: `(T,)` or `(B, T)`, tokens whose y is specified if it is finite.
        slots: slots, or rows, whose state is.
        kept: slots that nobody may touch.
        zero: tokens of nobody.
    """

    def __init__(self, case: Case):
        function = reference.ssd_packed if case.packed else reference.ssd
        names = ("max_prefills", "pad_slot_id", "dt_softplus", "dt_limit")
        options = case.shape.options()
        options = {name: options[name] for name in names if name in options}
        self.y, self.states, *recent = function(**case.arrays, **options)
        self.recent = recent[0] if recent else None
        sized = ("x", "B", "C", "D", case.state_name, "recent_x", "recent_B")
        sizes = {
            name: abs(array) if name in sized and array is not None else array
            for name, array in case.arrays.items()
        }
        self.y_size, self.state_size = function(**sizes, **options)[:2]
        arrays = case.arrays
        dt = reference.step_sizes(
            *(arrays["dt"], arrays["dt_bias"], case.shape.dt_softplus),
            case.shape.dt_limit,
        )
        bad = ~np.isfinite(dt).all(-1)
        for name in ("x", "B", "C"):
            bad |= ~np.isfinite(arrays[name].astype(np.float64)).all((-1, -2))
        (self._of_packed if case.packed else self._of_rows)(case, bad)

    def _of_packed(self, case: Case, bad) -> None:
        arrays, shape = case.arrays, case.shape
        live = reference.served(
            *(arrays["query_start_loc"], shape.num_tokens, shape.num_slots),
            *(arrays["cache_indices"], shape.max_prefills, shape.pad_slot_id),
            shape.drafts,
        )
        self.rows = np.ones(shape.num_tokens, bool)
        self.zero = np.ones(shape.num_tokens, bool)
        self.slots, self.kept = (np.ones(shape.num_slots, bool) for _ in range(2))
        uses = [sequence.slot for sequence in live]
        self.unknown = [s for s in live if uses.count(s.slot) > 1]
        if shape.write_indices:  # several that read one slot write others
            self.unknown = []
        seen = arrays["has_initial_state"]
        finite = np.isfinite(arrays["ssm_states"].astype(np.float64)).all((1, 2, 3))
        for sequence in live:
            i, here = sequence.number, sequence.tokens
            place = shape.num_slots, shape.pad_slot_id
            written = reference.write_slot(
                sequence.slot, arrays.get("write_indices"), i, *place
            )
            snapshot = reference.snapshot_of(
                *(arrays.get("snapshot_ends"), arrays.get("snapshot_indices"), i),
                *(here.stop - here.start, written, *place),
            )
            stored = [] if written is None else [written]
            stored += [] if snapshot is None else [snapshot[0]]
            self.kept[stored] = self.zero[here] = False
            starts = seen is not None and seen[sequence.number]
            bad_start = starts and not finite[sequence.slot]
            kept = reference.kept_drafts(
                shape.drafts, i, seen, arrays.get("num_rejected_tokens")
            )
            for name in RECENT if kept else ():
                rows = arrays[name][sequence.slot, :kept].astype(np.float64)
                bad_start |= not np.isfinite(rows).all()
            if bad[sequence.tokens].any() or bad_start:
                self.rows[here] = self.slots[stored] = False
        for sequence in self.unknown:  # NaN is never compared
            self.y[sequence.tokens] = self.states[sequence.slot] = 0
            for rows in self.recent or ():
                rows[sequence.slot] = 0
            self.rows[sequence.tokens] = self.slots[sequence.slot] = False

    def _of_rows(self, case: Case, bad) -> None:
        ids, shape = case.arrays["segment_ids"], case.shape
        lead = (shape.num_rows, shape.num_tokens)
        self.kept, self.unknown = np.zeros(shape.num_rows, bool), []
        self.rows, self.slots = np.ones(lead, bool), np.ones(shape.num_rows, bool)
        self.zero = np.zeros(lead, bool) if ids is None else ids < 0
        state = case.arrays["initial_state"]
        for b in range(shape.num_rows):
            bad_start = state is not None and not np.isfinite(state[b]).all()
            runs = [(0, shape.num_tokens)]
            if ids is not None:
                change = np.flatnonzero(np.diff(ids[b])) + 1
                runs = itertools.pairwise([0, *change.tolist(), shape.num_tokens])
            for begin, end in runs:
                if begin == end or self.zero[b, begin]:
                    continue
                where = np.flatnonzero(bad[b, begin:end])
                if begin == 0 and bad_start:
                    where = np.array([0])
                if where.size:
                    first = begin + where[0] if ids is not None else begin
                    self.rows[b, first:end] = False
                self.slots[b] = not where.size


TERMS = 32
# Kernels take a float32 operand of a product apart into two terms of 8 bits where the
# result is rounded to 16 bits anyway: that may lose 2**-16 of it.
CUT = 128


def runs_kernels(implementation: str | None) -> bool:
    return implementation in ("interpret", "triton") or (
        implementation is None and HAS_GPU
    )


def assert_close(got, exact, magnitude, what, terms=TERMS, specified=True, wide=None):
    """One rounding to `got.dtype`, and sums in float32 of terms of `magnitude`.

    In float64 where `wide`, the dtype of the op's x, is; None is `got.dtype`.
    """
    assert got.shape == exact.shape, f"{what}: {got.shape}, expected {exact.shape}"
    if got.size == 0:
        return
    wide = got.dtype if wide is None else wide
    wide = np.float64 if wide == np.float64 else np.float32
    with np.errstate(all="ignore"):
        values = got.astype(np.float64)
        allowed = terms * np.finfo(wide).eps * magnitude
        allowed = allowed + checks.unit_in_last_place(exact, got.dtype) + 1e-37
        allowed = np.where(magnitude == 0, 0, allowed)
        error = abs(values - exact)
        bad = specified & np.isfinite(exact) & ~(error <= allowed)
        # float32, and more so float16, may overflow where float64 does not.
        bad &= ~(magnitude > 1e30) & ~(abs(exact) >= float(_largest(got.dtype)))
        bad |= ~np.isfinite(exact) & np.isfinite(values)
    if bad.any():
        excess = np.where(bad, error - allowed, -1)
        worst = tuple(map(int, np.unravel_index(np.argmax(excess), bad.shape)))
        raise AssertionError(
            f"{what}: {bad.sum()} of {bad.size} are wrong; at {worst} "
            f"got {got[worst]!r}, expected {exact[worst]!r}, allowed {allowed[worst]!r}"
        )


@functools.cache
def _largest(dtype):
    return cases.ml_dtypes.finfo(dtype).max


def compare(case: Case, result, expected: Expected, implementation: Any = "xla"):
    """y and states against the recurrence; unnamed slots and zeros bit for bit."""
    y, *states = result
    states, recent = states[:1], states[1:]
    what, kernels = f"{implementation}: {case}", runs_kernels(implementation)

    def terms(array):
        return TERMS + CUT * (kernels and array.dtype.itemsize == 2)

    assert y.dtype == case.arrays["x"].dtype, what
    rows = expected.rows[..., None, None]
    assert_close(y, expected.y, expected.y_size, f"{what}\ny", terms(y), rows)
    checks.assert_same_bits(
        y[expected.zero], np.zeros_like(y[expected.zero]), f"{what}\ny of nobody"
    )
    if not states:
        return
    old, slots = case.arrays[case.state_name], expected.slots[:, None, None, None]
    dtype = np.promote_types(y.dtype, np.float32) if old is None else old.dtype
    assert states[0].dtype == dtype, what
    new = states[0].copy()
    new[[sequence.slot for sequence in expected.unknown]] = 0
    assert_close(
        *(new, expected.states, expected.state_size),
        *(f"{what}\nstates", terms(new), slots, y.dtype),
    )
    if old is not None:
        kept = expected.kept
        checks.assert_same_bits(new[kept], old[kept], f"{what}\nunnamed slots")
    _compare_recent(case, recent, expected, what)


def _compare_recent(case: Case, recent, expected: Expected, what: str) -> None:
    """What slots know of recent tokens: as they were given, save for step sizes."""
    if expected.recent is None:
        assert not recent, what
        return
    for name, rows, want in zip(RECENT, recent, expected.recent, strict=True):
        old, new = case.arrays[name], rows.copy()
        assert new.dtype == old.dtype, f"{what}\n{name}: {new.dtype}"
        kept = expected.kept
        checks.assert_same_bits(new[kept], old[kept], f"{what}\n{name}, unnamed slots")
        new[[sequence.slot for sequence in expected.unknown]] = 0
        # Step sizes are computed; those below float32's normal numbers may be 0.
        rtol, atol = 0.0, 0.0
        if name == "recent_dt":
            rtol, atol = 1e-5, float(np.finfo(np.float32).tiny)
        np.testing.assert_allclose(
            new.astype(np.float64),
            want.astype(np.float64),
            rtol=rtol,
            atol=atol,
            err_msg=f"{what}\n{name}",
        )


def check(case: Case, implementation, *, final=True) -> None:
    """Runs a case and compares with the recurrence."""
    expected = Expected(case)
    compare(case, call(case, implementation, final=final), expected, implementation)
