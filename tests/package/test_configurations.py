"""jax's global switches: the whole public surface under each of them.

Values are compared with those of the same calls without the switch. Where a switch can
only fail a trace, programs are lowered and not run.
"""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jax_causal_conv as jcc
from jax_causal_conv import linen, mamba2
from jax_causal_conv.nnx import CausalConv1d
from tests.support import checks, quick
from tests.support.gradients import function, one_of_each_op, split
from tests.support.platforms import HAS_TRITON
from tests.support.ssd_cases import BFLOAT16, batch, draw_rows

pytestmark = pytest.mark.usefixtures("quick_compilation")

OFFSETS, SLOTS = np.array([0, 3, 4, 4]), np.array([2, 0, 1])
SEEN = np.array([True, False, True])
CONFIG = mamba2.Mamba2Config(
    vocab_size=17, d_model=16, n_layers=1, headdim=8, d_state=4, n_groups=2
)


def with_gradient(run, arrays):
    """The results of `run(arrays)` and the gradient of their sum in all floats."""
    floats = {n: a for n, a in arrays.items() if jnp.issubdtype(a.dtype, jnp.floating)}
    rest = {name: array for name, array in arrays.items() if name not in floats}

    def loss(floats):
        results = jax.tree.leaves(run(floats | rest))
        return sum(jnp.sum(a.astype(jnp.float32)) for a in results), results

    return jax.grad(loss, has_aux=True)(floats)


def of_conv(number, implementation):
    case = one_of_each_op(7, x_dtype=BFLOAT16)[number]
    run = function(case, implementation)
    floats, rest = split(case)

    def call(arrays):
        each = ({name: arrays[name] for name in part} for part in (floats, rest))
        return run(*each)

    return functools.partial(with_gradient, call), floats | rest


def of_ssd(case, **options):
    arrays = {n: a for n, a in case.arrays.items() if a is not None}
    absent = dict.fromkeys(n for n, a in case.arrays.items() if a is None)
    options = case.shape.options() | absent | options
    op = jcc.ssd_packed if case.packed else jcc.ssd
    return functools.partial(with_gradient, lambda a: op(**a, **options)), arrays


def of_helpers():
    def run(arrays):
        offsets, slots = arrays["offsets"], arrays["slots"]
        snapshots = jcc.varlen_conv_states(arrays["x"], offsets, 3)
        metadata = jcc.build_metadata(offsets, 5, block_m=4)
        return snapshots, jcc.layer_slots(slots, 1, 4), metadata

    x = np.ones((5, 6), np.float32)
    return run, {"x": x, "offsets": OFFSETS, "slots": SLOTS}


def of_layers():
    twin = linen.CausalConv1d(6, 4, dtype=jnp.bfloat16)
    rows = jnp.ones((2, 5, 6), jnp.bfloat16)

    def run(arrays):
        x = arrays["x"]
        layer = CausalConv1d(6, 4, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
        variables = twin.init(jax.random.key(0), rows)
        state = layer.init_state(3)
        return (
            layer(x),
            twin.apply(variables, x),
            layer.packed(x[0], state, OFFSETS, cache_indices=SLOTS),
            layer.decode(x[:, 0], state),
        )

    return run, {"x": rows}


def of_training():
    def run(arrays):
        tokens = arrays["tokens"]
        model = mamba2.Mamba2LM(CONFIG, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))

        def loss(model):
            return jnp.square(model(tokens, segment_ids=tokens // 3)).sum()

        return jax.tree.leaves(nnx.grad(loss)(model))

    return run, {"tokens": np.arange(10).reshape(2, 5)}


def of_serving():
    def run(arrays):
        tokens = arrays["tokens"]
        model = mamba2.Mamba2LM(CONFIG, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
        packed = model.packed(
            tokens,
            model.init_cache(4),
            OFFSETS,
            cache_indices=SLOTS,
            has_initial_state=SEEN,
            max_prefills=1,
        )
        drawn = mamba2.sample(
            packed[0],
            jnp.arange(3, dtype=jnp.uint32),
            jnp.arange(3),
            jnp.array([0.0, 1.0, 0.5]),
            jnp.array([0, 5, 3]),
            jnp.array([1.0, 0.9, 1.0]),
        )
        return packed, drawn

    return run, {"tokens": np.arange(5)}


CASES = {
    f"{op}-{implementation}": functools.partial(of_conv, number, implementation)
    for number, op in enumerate(("dense", "packed", "update", "ring"))
    for implementation in (None, "xla", *(["interpret"] if HAS_TRITON else []))
}
NARROW = dict.fromkeys(("x", "B", "C"), BFLOAT16)
CASES |= {
    "ssd_packed": lambda: of_ssd(batch([1, 5, 0, 3], num_slots=5, **NARROW)),
    "ssd_packed-xla": lambda: of_ssd(
        batch([1, 2], num_slots=2, **NARROW), implementation="xla"
    ),
    "ssd": lambda: of_ssd(draw_rows(1, **NARROW), precision="default"),
    "helpers": of_helpers,
    "layers": of_layers,
    "training": of_training,
    "serving": of_serving,
}


def serve():
    """Tokens that an engine draws for two requests."""
    model = mamba2.Mamba2LM(CONFIG, rngs=nnx.Rngs(0))
    engine = mamba2.Engine(
        model, num_slots=2, max_tokens_per_step=4, token_buckets=[4], decode_buckets=[2]
    )
    drawn = mamba2.SamplingParams(temperature=1.0, top_k=5, top_p=0.9, seed=3)
    requests = [
        mamba2.Request([1, 2, 3], max_new_tokens=3),
        mamba2.Request([4], max_new_tokens=2, sampling=drawn),
    ]
    generations = [engine.submit(request) for request in requests]
    engine.run()
    return [generation.tokens for generation in generations]


@functools.cache
def results(name):
    if name == "engine":
        return serve()
    run, arrays = CASES[name]()
    return checks.to_host(quick.jit(run)(arrays))


def assert_same(name, got):
    got, want = checks.to_host(got), results(name)
    # The model computes in bfloat16, whatever the dtype of its results.
    close = 2e-2 if name == "training" else 1e-4
    for one, other in zip(*map(jax.tree.leaves, (got, want)), strict=True):
        exact = not jnp.issubdtype(one.dtype, jnp.floating)
        tolerance = 0 if exact else 2e-2 if one.dtype == BFLOAT16 else close
        wide = np.float64(other)
        bound = tolerance * np.abs(wide).max(initial=0)
        np.testing.assert_allclose(np.float64(one), wide, rtol=0, atol=bound)


# Each op once, as it is by default. Without jit each step of a scan is compiled by
# itself; and the engine serves a model, which has `ssd_packed`.
DEFAULT = [n for n in CASES if n.endswith("-None") or "-" not in n]
DEFAULT = [n for n in DEFAULT if n not in ("ssd_packed", "serving")]


@pytest.mark.parametrize("name", DEFAULT)
def test_without_jit(name):
    run, arrays = CASES[name]()
    with jax.disable_jit(), quick.compilation():
        got = run(jax.tree.map(jnp.asarray, arrays))
    assert_same(name, got)


@pytest.mark.parametrize("name", DEFAULT)
def test_looking_for_nans(name):
    run, arrays = CASES[name]()
    with jax.debug_nans(True), quick.compilation():
        got = run(jax.tree.map(jnp.asarray, arrays))
    assert_same(name, got)


@contextlib.contextmanager
def strict_promotion():
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@pytest.mark.parametrize("name", CASES)
def test_where_promotion_is_strict(name):
    run, arrays = CASES[name]()
    with strict_promotion():
        jax.jit(run).lower(arrays)


SWITCHES = {
    "no jit": jax.disable_jit,
    "nans": functools.partial(jax.debug_nans, True),
    "strict": strict_promotion,
}


@pytest.mark.parametrize("switch", SWITCHES)
def test_engine(switch):
    with quick.compilation():
        want = results("engine")
        with SWITCHES[switch]():
            assert serve() == want


def test_quick_compilations_may_be_nested():
    def optimizes():
        return not jax.config.read("jax_disable_most_optimizations")

    outside = optimizes()
    with quick.compilation():
        inside = optimizes()
        with quick.compilation():
            pass
        assert optimizes() == inside
    assert optimizes() == outside
