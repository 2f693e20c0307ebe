"""`Mamba2Mixer` against its definition: float64, one request, token by token.

Most tests run in jax's 64-bit mode with float64 parameters, where the mixer and the
definition agree to the last few digits; so a tolerance hides nothing.
"""

import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("flax")

from flax import nnx

from jax_causal_conv import PAD_SLOT_ID, build_metadata
from jax_causal_conv.nnx import GatedRMSNorm, Mamba2Cache, Mamba2Mixer
from tests.support import checks, quick, reference
from tests.support.derivatives import check_derivatives

D_MODEL, HEADDIM, D_STATE, WIDTH = 16, 8, 5, 4  # 4 heads
SIZES = {"d_state": D_STATE, "headdim": HEADDIM, "d_conv": WIDTH, "chunk_size": 4}
VARIANTS = {
    "plain": {},
    "groups": {"n_groups": 2, "use_bias": True},
    "whole norm": {"n_groups": 4, "norm_groups": 1, "use_conv_bias": False},
    "limits and norm before gate": {
        "dt_limit": (0.4, 0.9),
        "activation": None,
        "norm_before_gate": True,
        "norm_eps": 0.1,
    },
    "shards": {"n_groups": 2, "num_shards": 2, "use_bias": True},
}


def make(seed=0, *, x64=True, **options):
    """A mixer whose parameters are all random, vectors too."""
    options = SIZES | ({"param_dtype": jnp.float64} if x64 else {}) | options
    mixer = nnx.eval_shape(lambda: Mamba2Mixer(D_MODEL, **options, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(seed)

    def draw(array):
        scale = 0.5 if array.ndim == 2 else 1.0
        return jnp.asarray(scale * rng.standard_normal(array.shape), array.dtype)

    nnx.update(mixer, jax.tree.map(draw, nnx.state(mixer, nnx.Param)))
    return mixer


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


class Definition:
    """The mixer on one request at a time, in the published order of columns."""

    def __init__(self, mixer, **options):
        def array(param):
            return None if param is None else np.asarray(param[...], np.float64)

        self.heads, self.groups = mixer.num_heads, mixer.n_groups
        self.inner = mixer.d_inner
        self.dt_limit = options.get("dt_limit", (0, np.inf))
        self.silu = options.get("activation", "silu")
        self.norm_groups = options.get("norm_groups", self.groups)
        self.norm_first = options.get("norm_before_gate", False)
        self.eps = options.get("norm_eps", 1e-5)
        columns = np.argsort(mixer.in_proj_order)
        self.channels = np.argsort(mixer.conv_order)
        self.w_in = array(mixer.in_proj.kernel)[:, columns]
        self.b_in = array(mixer.in_proj.bias)
        if self.b_in is not None:
            self.b_in = self.b_in[columns]
        self.w_conv = array(mixer.conv.kernel)[self.channels]
        self.b_conv = array(mixer.conv.bias)
        if self.b_conv is not None:
            self.b_conv = self.b_conv[self.channels]
        self.w_out, self.b_out = (
            array(mixer.out_proj.kernel),
            array(mixer.out_proj.bias),
        )
        self.A, self.D = -np.exp(array(mixer.A_log)), array(mixer.D)
        self.dt_bias, self.scale = array(mixer.dt_bias), array(mixer.norm.scale)

    def __call__(self, u):
        """u (n, d_model), a request from its start. Returns out and final states."""
        columns = u.astype(np.float64) @ self.w_in
        if self.b_in is not None:
            columns += self.b_in
        z = columns[:, : self.inner]
        inputs = columns[:, self.inner : -self.heads]
        dt = np.log1p(np.exp(columns[:, -self.heads :] + self.dt_bias))
        dt = np.minimum(np.maximum(dt, self.dt_limit[0]), self.dt_limit[1])
        history = np.zeros((WIDTH - 1, inputs.shape[1]))
        xbc = reference.convolve(history, inputs, self.w_conv, self.b_conv, self.silu)
        states = self.groups * D_STATE
        x = xbc[:, : self.inner].reshape(-1, self.heads, HEADDIM)
        b = xbc[:, self.inner : -states].reshape(-1, self.groups, D_STATE)
        c = xbc[:, -states:].reshape(-1, self.groups, D_STATE)
        state = np.zeros((self.heads, HEADDIM, D_STATE))
        y = np.zeros(x.shape)
        for t in range(len(u)):
            for h in range(self.heads):
                group = h // (self.heads // self.groups)
                kept = np.exp(dt[t, h] * self.A[h]) * state[h]
                state[h] = kept + dt[t, h] * np.outer(x[t, h], b[t, group])
                y[t, h] = state[h] @ c[t, group] + self.D[h] * x[t, h]
        normed = self.norm(y.reshape(len(u), self.inner), z * sigmoid(z))
        out = normed @ self.w_out + (0 if self.b_out is None else self.b_out)
        return out, reference.shift_in(history, inputs), state

    def norm(self, y, gate):
        y = y if self.norm_first else y * gate
        for part in np.split(np.arange(self.inner), self.norm_groups):
            mean = (y[:, part] ** 2).mean(1, keepdims=True)
            y[:, part] = y[:, part] / np.sqrt(mean + self.eps) * self.scale[part]
        return y * gate if self.norm_first else y


def jitted_step(mixer, jit=quick.jit, **options):
    graphdef, params = nnx.split(mixer)

    def step(cache, u, offsets, slots, seen, metadata=None):
        return nnx.merge(graphdef, params).packed(
            u,
            cache,
            offsets,
            cache_indices=slots,
            has_initial_state=seen,
            metadata=metadata,
            **options,
        )

    return jit(step, donate_argnums=0)


def assert_close(got, want):
    np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_training_call_equals_the_definition_for_each_document(options):
    with jax.enable_x64(True):
        mixer = make(1, **options)
        u = np.random.default_rng(1).standard_normal((2, 13, D_MODEL))
        ids = np.array([[0] * 6 + [-1] + [0] * 4 + [-2] * 2, [7] * 12 + [3]])
        graphdef, params = nnx.split(mixer)
        run = quick.jit(lambda p, u: nnx.merge(graphdef, p)(u, segment_ids=ids))
        out = run(params, u)
        definition = Definition(mixer, **options)
    for row, start, end in ((0, 0, 6), (0, 7, 11), (1, 0, 12), (1, 12, 13)):
        assert_close(out[row, start:end], definition(u[row, start:end])[0])
    padding = 0 if definition.b_out is None else definition.b_out
    assert_close(out[ids < 0], np.broadcast_to(padding, (3, D_MODEL)))


@pytest.mark.parametrize("name", ["plain", "shards"])
def test_packed_steps_equal_the_definition_however_requests_are_cut(name):
    """Slots that no live sequence names hold NaN, and so does a slot before its use."""
    tokens, seqs, slots = 16, 4, 6
    rng = np.random.default_rng(2)
    with jax.enable_x64(True):
        mixer = make(2, **VARIANTS[name])
        definition = Definition(mixer, **VARIANTS[name])
        owned = rng.permutation(slots)[:seqs]
        free = np.setdiff1d(np.arange(slots), owned)
        step = jitted_step(mixer, pad_slot_id=int(free[0]))
        cache = mixer.init_cache(slots, dtype=jnp.float64, ssm_dtype=jnp.float64)
        cache = jax.tree.map(lambda a: jnp.full_like(a, jnp.nan), cache)
        u = [rng.standard_normal((n, D_MODEL)) for n in (21, 1, 9, 14)]
        out = [np.zeros((0, D_MODEL)) for _ in u]
        while any(len(o) < len(x) for o, x in zip(out, u, strict=True)):
            counts = np.zeros(seqs, int)
            for i in rng.permutation(seqs):
                left = min(len(u[i]) - len(out[i]), tokens - counts.sum())
                counts[i] = min(left, rng.choice([0, 1, 1, 3, 9]))
            rest = tokens - counts.sum()
            skipped = counts > rng.choice([0, 20])  # now and then a skipped step
            chunks = [x[len(o) :][:n] for x, o, n in zip(u, out, counts, strict=True)]
            padding = rng.standard_normal((rest, D_MODEL))
            offsets = np.cumsum([0, *counts])
            result, cache = step(
                cache,
                np.concatenate([*chunks, padding]),
                offsets,
                np.where(skipped, rng.choice([free[0], PAD_SLOT_ID, slots]), owned),
                np.array([len(o) > 0 for o in out]),
            )
            pieces = np.split(np.asarray(result), offsets[1:])
            bias = 0 if definition.b_out is None else definition.b_out
            assert_close(pieces.pop() - bias, 0)
            for i, piece in enumerate(pieces):
                if skipped[i]:
                    assert_close(piece - bias, 0)
                else:
                    out[i] = np.concatenate([out[i], piece])
    conv = np.asarray(cache.conv)[:, :, definition.channels]
    for i, slot in enumerate(owned):
        want, want_conv, want_ssm = definition(u[i])
        assert_close(out[i], want)
        assert_close(conv[slot], want_conv)
        assert_close(cache.ssm[slot], want_ssm)
    assert np.isnan(conv[free]).all()
    assert np.isnan(cache.ssm[free]).all()


def test_surplus_prefills_are_skipped_by_conv_and_ssm_alike():
    lengths, owned = (1, 2, 3, 1, 4, 2), np.array([5, 3, 1, 0, 2, 4])
    offsets = np.cumsum([0, *lengths])
    rng = np.random.default_rng(3)
    with jax.enable_x64(True):
        mixer = make(3)
        definition = Definition(mixer)
        step = jitted_step(mixer, max_prefills=1, pad_slot_id=3)
        shapes = mixer.init_cache(6, dtype=jnp.float64, ssm_dtype=jnp.float64)
        before = Mamba2Cache(*(rng.standard_normal(a.shape) for a in shapes))
        u = rng.standard_normal((offsets[-1] + 2, D_MODEL))
        metadata = build_metadata(offsets, len(u))
        out, cache = step(
            jax.tree.map(jnp.asarray, before),
            u,
            offsets,
            owned,
            np.zeros(6, bool),
            metadata,
        )
    for i in (0, 2, 3):
        want, want_conv, want_ssm = definition(u[offsets[i] : offsets[i + 1]])
        assert_close(out[offsets[i] : offsets[i + 1]], want)
        assert_close(cache.conv[owned[i]], want_conv)
        assert_close(cache.ssm[owned[i]], want_ssm)
    np.testing.assert_array_equal(out[offsets[1] : offsets[2]], 0)
    for slot in (2, 3, 4):  # two surplus prefills, and the pad slot, which is none
        np.testing.assert_array_equal(cache.conv[slot], before.conv[slot])
        np.testing.assert_array_equal(cache.ssm[slot], before.ssm[slot])
    np.testing.assert_array_equal(out[offsets[4] :], 0)


def test_metadata_reaches_the_conv():
    mixer = make(4, x64=False)
    wrong = build_metadata(np.array([0, 4, 8, 9]), 9)
    with pytest.raises(ValueError, match=r"metadata.chunk_seq must have shape \(P,\)"):
        mixer.packed(
            np.ones((4, D_MODEL), np.float32),
            mixer.init_cache(2),
            np.array([0, 4]),
            metadata=wrong,
        )


def test_gradients_equal_finite_differences():
    options = {"n_groups": 2, "expand": 1, "dt_limit": (0.0, 0.9), "use_bias": True}
    ids = np.array([[0, 0, 0, 0, 0, 1, 1, -1]])
    with jax.enable_x64(True):
        mixer = make(5, **options)
        graphdef, params = nnx.split(mixer)
        u = jnp.asarray(np.random.default_rng(5).standard_normal((1, 8, D_MODEL)))

        def run(at):
            return jnp.sin(nnx.merge(graphdef, at["params"])(at["u"], segment_ids=ids))

        check_derivatives(run, {"params": params, "u": u}, order=1)


def test_bfloat16_computation_keeps_float32_parameters_and_states():
    options = {"n_groups": 2, "dtype": jnp.bfloat16}
    mixer = make(6, x64=False, **options)
    u = np.random.default_rng(6).standard_normal((1, 12, D_MODEL)).astype(jnp.bfloat16)
    want = Definition(mixer, **options)(u[0])[0]

    def loss(mixer):
        out = mixer(u)
        return out.astype(jnp.float32).sum(), out

    grads, out = nnx.jit(nnx.grad(loss, has_aux=True))(mixer)
    assert out.dtype == jnp.bfloat16
    error = np.abs(np.asarray(out[0], np.float64) - want).max()
    assert error < 0.02 * abs(want).max()

    cache = jax.eval_shape(lambda: mixer.init_cache(2))
    assert (cache.conv.dtype, cache.ssm.dtype) == (jnp.bfloat16, jnp.float32)
    packed = jax.eval_shape(
        lambda cache: mixer.packed(u[0], cache, np.array([0, 12])), cache
    )
    assert packed == (jax.ShapeDtypeStruct(u[0].shape, jnp.bfloat16), cache)
    for leaf in jax.tree.leaves(grads):
        assert leaf.dtype == jnp.float32
        assert jnp.isfinite(leaf).all()
        assert leaf.any()


@pytest.mark.parametrize("norm_before_gate", [False, True])
def test_norm_of_bfloat16_is_computed_wider_and_rounded_once(norm_before_gate):
    norm = GatedRMSNorm(
        12, groups=3, norm_before_gate=norm_before_gate, dtype=jnp.bfloat16
    )
    rng = np.random.default_rng(11)
    scale = rng.standard_normal(12, np.float32)
    norm.scale[...] = jnp.asarray(scale)
    y, z = rng.standard_normal((2, 50, 12)).astype(jnp.bfloat16)
    got = np.asarray(quick.jit(norm)(y, z))
    y, z = y.astype(np.float64), z.astype(np.float64)
    gate = z * sigmoid(z)
    want = (y if norm_before_gate else y * gate).reshape(50, 3, 4)
    want = want / np.sqrt((want**2).mean(-1, keepdims=True) + 1e-5)
    want = want.reshape(50, 12) * scale * (gate if norm_before_gate else 1)
    assert got.dtype == jnp.bfloat16
    ulp = checks.unit_in_last_place(want, got.dtype)
    assert (abs(got.astype(np.float64) - want) <= 0.51 * ulp).all()


def test_initial_parameters_are_as_published():
    mixer = Mamba2Mixer(400, headdim=1, d_state=4, use_bias=True, rngs=nnx.Rngs(7))
    a, dt = jnp.exp(mixer.A_log[...]), jax.nn.softplus(mixer.dt_bias[...])
    np.testing.assert_allclose((a.min(), a.max()), (1, 16), rtol=0.05)
    np.testing.assert_allclose(a.mean(), 8.5, rtol=0.05)
    np.testing.assert_allclose((dt.min(), dt.max()), (1e-3, 0.1), rtol=0.05)
    np.testing.assert_allclose(jnp.log(dt).mean(), np.log(1e-2), rtol=0.05)
    for ones in (mixer.D, mixer.norm.scale):
        np.testing.assert_array_equal(ones[...], 1)
    for zeros in (mixer.in_proj.bias, mixer.conv.bias, mixer.out_proj.bias):
        np.testing.assert_array_equal(zeros[...], 0)
    for projection in (mixer.in_proj, mixer.out_proj):
        bound = len(projection.kernel) ** -0.5
        kernel = projection.kernel[...]
        assert 0.999 * bound < abs(kernel).max() <= bound
        np.testing.assert_allclose(kernel.std(), bound / 3**0.5, rtol=0.01)


@pytest.mark.parametrize("tokens, seqs, slots", [(0, 2, 3), (5, 0, 3), (5, 2, 0)])
def test_empty_batches_change_nothing(tokens, seqs, slots):
    mixer = make(8, x64=False, use_bias=True)
    cache = jax.tree.map(jnp.ones_like, mixer.init_cache(slots))
    u = np.ones((tokens, D_MODEL), np.float32)
    offsets, indices = np.zeros(seqs + 1, np.int32), np.zeros(seqs, np.int32)
    step = jitted_step(mixer, max_prefills=1)
    before = jax.tree.map(np.asarray, cache)
    out, new = step(cache, u, offsets, indices, np.zeros(seqs, bool))
    np.testing.assert_allclose(
        out, np.broadcast_to(mixer.out_proj.bias[...], (tokens, D_MODEL))
    )
    jax.tree.map(np.testing.assert_array_equal, new, before)
    rows = nnx.jit(Mamba2Mixer.__call__)(mixer, u[:, None][:, :0])
    assert rows.shape == (tokens, 0, D_MODEL)


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"headdim": 5},
            r"headdim must divide d_inner = expand \* d_model, got 5 and 32",
        ),
        ({"n_groups": 3}, "n_groups must divide the number of heads, got 3 and 4"),
        (
            {"d_inner": 24, "headdim": 4, "n_groups": 2, "num_shards": 3},
            "num_shards must divide n_groups or be a multiple of it, got 3 and 2",
        ),
        ({"norm_groups": 3}, "groups must divide features, got 3 and 32"),
        ({"activation": "elu"}, "activation must be None"),
        ({"n_groups": 0}, "n_groups must be at least 1"),
    ],
)
def test_sizes_that_do_not_fit_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        make(10, x64=False, **options)


@pytest.mark.skipif(
    jax.default_backend() == "cpu" and jax.__version_info__ < (0, 11),
    reason="XLA:CPU copies a donated cache before jax 0.11",
)
def test_donated_cache_is_not_copied():
    mixer = make(9, x64=False)
    cache = jax.eval_shape(lambda: mixer.init_cache(600))
    batch = (
        jax.ShapeDtypeStruct((24, D_MODEL), jnp.float32),
        jax.ShapeDtypeStruct((9,), jnp.int32),
        jax.ShapeDtypeStruct((8,), jnp.int32),
        jax.ShapeDtypeStruct((8,), jnp.bool_),
    )
    lowered = jitted_step(mixer, jax.jit, max_prefills=2).lower(cache, *batch)
    compiled = lowered.compile()
    size = sum(a.size * a.dtype.itemsize for a in cache)
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes == size
    assert memory.temp_size_in_bytes < min(a.size * 4 for a in cache)
    copies = re.findall(r"= f32\[600,[\d,]+\]\S* copy\(.*", compiled.as_text())
    assert not copies, copies


SHARDED = """
import jax, jax.numpy as jnp, numpy as np, re
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from jax_causal_conv.nnx import Mamba2Cache, Mamba2Mixer, default_kernel_init

mesh = jax.make_mesh((2,), ("model",), axis_types=(AxisType.Auto,))
columns, rows = (nnx.with_partitioning(default_kernel_init, axes)
                 for axes in ((None, "model"), ("model", None)))
zeros = nnx.with_partitioning(nnx.initializers.zeros_init(), ("model",))
with jax.set_mesh(mesh):
    mixer = Mamba2Mixer(
        16, d_state=5, headdim=8, n_groups=2, num_shards=2, use_bias=True,
        chunk_size=4, kernel_init=columns, out_kernel_init=rows, bias_init=zeros,
        conv_kernel_init=rows, conv_bias_init=zeros, rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(mixer)
    params = jax.device_put(params, nnx.get_named_sharding(params, mesh))
    assert params["in_proj"]["kernel"][...].sharding.spec == P(None, "model")
    on_heads = NamedSharding(mesh, P(None, "model"))
    cache = mixer.init_cache(6)
    cache = Mamba2Cache(
        jax.device_put(cache.conv, NamedSharding(mesh, P(None, None, "model"))),
        jax.device_put(cache.ssm, on_heads))
    u = np.random.default_rng(0).standard_normal((12, 16), np.float32)
    offsets, slots = np.array([0, 5, 6, 11], np.int32), np.array([3, 0, 4], np.int32)

    def train(params, u):
        return nnx.merge(graphdef, params)(u[None])[0]

    def serve(params, cache, u):
        mixer = nnx.merge(graphdef, params)
        return mixer.packed(u, cache, offsets, cache_indices=slots)

    for function, arguments in ((train, (params, u)), (serve, (params, cache, u))):
        compiled = jax.jit(function).lower(*arguments).compile()
        found = re.findall(
            r"= \\S+ (all-reduce|all-gather|all-to-all|collective-permute"
            r"|reduce-scatter)(?:-start)?\\(", compiled.as_text())
        assert found == ["all-reduce"], found
        whole = jax.device_get(arguments)
        for got, want in zip(jax.tree.leaves(compiled(*arguments)),
                             jax.tree.leaves(jax.jit(function)(*whole)), strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
"""


def test_sharded_mixer_communicates_in_the_sum_of_out_proj_alone():
    environment = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    environment |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": ":".join(sys.path)}
    result = subprocess.run(
        [sys.executable, "-c", SHARDED],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
