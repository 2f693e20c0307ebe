"""`CausalConv1d` of Flax NNX and of Linen: one layer, written twice, tested as one."""

import importlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("flax")

from flax import linen, nnx

import jax_causal_conv
import jax_causal_conv.linen
import jax_causal_conv.nnx
from tests.support import checks, quick, reference

BATCH, TOKENS, DIM, WIDTH = 2, 11, 6, 4
bf16 = jnp.dtype("bfloat16")
with_kinds = pytest.mark.parametrize("kind", ["nnx", "linen"])


def draw_layer(seed, *, use_bias=True):
    """x (B, T, D), weight (D, W) and bias (D,), float32."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((BATCH, TOKENS, DIM), np.float32)
    weight = rng.standard_normal((DIM, WIDTH), np.float32)
    return x, weight, rng.standard_normal(DIM, np.float32) if use_bias else None


def layer(kind, weight, bias, **options):
    """A layer with these parameters; both kinds then have the same methods."""
    dim, width = weight.shape
    options["use_bias"] = bias is not None
    if kind == "nnx":
        conv = jax_causal_conv.nnx.CausalConv1d(dim, width, rngs=nnx.Rngs(0), **options)
        conv.kernel[...] = jnp.asarray(weight)
        if bias is not None:
            conv.bias[...] = jnp.asarray(bias)
        return conv
    params = {"kernel": weight} | ({} if bias is None else {"bias": bias})
    module = jax_causal_conv.linen.CausalConv1d(dim, width, **options)
    return module.bind({"params": jax.tree.map(jnp.asarray, params)})


def assert_close(got, x, weight, bias, activation, history=None):
    """Compares the outputs of one request (n, D) with the float64 reference."""
    if history is None:
        history = np.zeros((WIDTH - 1, DIM), x.dtype)
    exact = reference.convolve(history, x, weight, bias, activation)
    size = None if bias is None else abs(bias)
    magnitude = reference.convolve(abs(history), abs(x), abs(weight), size, None)
    assert got.dtype == x.dtype
    checks.assert_output(np.asarray(got), exact, magnitude, WIDTH, activation)


@with_kinds
@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("dtype", [np.dtype("float32"), bf16], ids=str)
def test_training_call_sums_in_float32_with_parameters_as_they_are(
    kind, use_bias, dtype
):
    """Had the float32 parameters been cast to bfloat16, this would be far off."""
    x, weight, bias = draw_layer(1, use_bias=use_bias)
    ids = np.array([[0] * 5 + [1] * 4 + [-1] * 2, [3] * TOKENS])
    conv = layer(kind, weight, bias, activation="silu", dtype=dtype)
    y, x = conv(x, segment_ids=ids), x.astype(dtype)
    assert_close(y[0, :5], x[0, :5], weight, bias, "silu")
    assert_close(y[0, 5:9], x[0, 5:9], weight, bias, "silu")
    np.testing.assert_array_equal(y[0, 9:], 0)
    assert_close(y[1], x[1], weight, bias, "silu")


@with_kinds
@pytest.mark.parametrize("state_len", [None, WIDTH + 2])
def test_dense_packed_and_decoded_outputs_agree(kind, state_len):
    x, weight, bias = draw_layer(2)
    conv = layer(kind, weight, bias, activation="silu", dtype=jnp.float32)
    want = np.asarray(conv(x))
    for row in range(BATCH):
        assert_close(want[row], x[row], weight, bias, "silu")

    states = conv.init_state(4, state_len=state_len)
    assert states.shape == (4, WIDTH - 1 if state_len is None else state_len, DIM)
    got, done = np.zeros_like(want), np.zeros(BATCH, int)
    slots = np.array([3, 0])
    for counts in ((3, 0), (1, 4), (2, 1)):  # (row 0, row 1)
        chunks = [x[b, done[b] : done[b] + n] for b, n in enumerate(counts)]
        out, states = conv.packed(
            np.concatenate(chunks),
            states,
            np.cumsum([0, *counts]),
            cache_indices=slots,
            has_initial_state=done > 0,
        )
        for b, piece in enumerate(np.split(np.asarray(out), [counts[0]])):
            got[b, done[b] : done[b] + len(piece)] = piece
        done += counts
    for _ in range(TOKENS - max(done)):
        tokens = x[np.arange(BATCH), done]
        out, states = conv.decode(tokens, states, conv_state_indices=slots)
        got[np.arange(BATCH), done] = out
        done += 1
    for b in range(BATCH):
        np.testing.assert_allclose(got[b, : done[b]], want[b, : done[b]], atol=1e-6)
        newest = np.zeros(states.shape[1:], np.float32)
        newest = reference.shift_in(newest, x[b, : done[b]])
        np.testing.assert_array_equal(states[slots[b]], newest)


@with_kinds
def test_training_call_continues_from_a_final_state(kind):
    x, weight, bias = draw_layer(3)
    conv = layer(kind, weight, bias)
    first, state = conv(x[:, :4], return_final_state=True)
    second = conv(x[:, 4:], initial_state=state)
    np.testing.assert_allclose(np.concatenate([first, second], 1), conv(x), atol=1e-6)
    history = np.asarray(state)[0]
    assert_close(second[0], x[0, 4:], weight, bias, None, history)


@with_kinds
def test_training_call_reads_columns_of_a_wider_input_and_splits_its_output(kind):
    x, weight, bias = draw_layer(4)
    conv = layer(kind, weight, bias)
    wide = np.concatenate([np.full((*x.shape[:2], 3), np.nan, x.dtype), x], axis=-1)
    parts = conv(wide, channel_offset=3, split=(DIM - 2, 2))
    assert [part.shape[-1] for part in parts] == [DIM - 2, 2]
    whole = conv(x)
    np.testing.assert_allclose(np.concatenate(parts, -1), whole, atol=1e-6)


def test_depthwise_nnx_conv_checkpoint_loads():
    x, _, bias = draw_layer(4)
    theirs = nnx.Conv(
        DIM,
        DIM,
        WIDTH,
        feature_group_count=DIM,
        padding="CAUSAL",
        rngs=nnx.Rngs(4),
    )
    theirs.bias[...] = bias
    conv = layer("nnx", theirs.kernel[:, 0, :].T, theirs.bias[...])
    np.testing.assert_allclose(conv(x), theirs(x), atol=1e-6)


def test_depthwise_linen_conv_checkpoint_loads():
    x, _, bias = draw_layer(5)
    theirs = linen.Conv(DIM, (WIDTH,), feature_group_count=DIM, padding="CAUSAL")
    params = theirs.init(jax.random.key(5), x)["params"] | {"bias": bias}
    ours = {"kernel": params["kernel"][:, 0, :].T, "bias": params["bias"]}
    conv = jax_causal_conv.linen.CausalConv1d(DIM, WIDTH)
    fresh = conv.init(jax.random.key(0), x)["params"]
    assert jax.tree.map(jnp.shape, fresh) == jax.tree.map(jnp.shape, ours)
    np.testing.assert_allclose(
        conv.apply({"params": ours}, x), theirs.apply({"params": params}, x), atol=1e-6
    )


@with_kinds
def test_gradients_of_float32_parameters_under_bfloat16_inputs(kind):
    x, weight, bias = draw_layer(6)
    x = x.astype(bf16)
    upstream = np.random.default_rng(6).standard_normal(x.shape).astype(bf16)
    conv = layer(kind, weight, bias, dtype=bf16)

    if kind == "nnx":

        @nnx.jit
        @nnx.grad
        def gradient(conv):
            return (conv(x) * upstream).astype(jnp.float32).sum()

        grads = gradient(conv)
        dkernel, dbias = grads["kernel"][...], grads["bias"][...]
    else:
        module, variables = conv.unbind()

        @quick.jit
        @jax.grad
        def gradient(variables):
            y = module.apply(variables, x)
            return (y * upstream).astype(jnp.float32).sum()

        grads = gradient(variables)["params"]
        dkernel, dbias = grads["kernel"], grads["bias"]

    inputs, upstream = x.astype(np.float64), upstream.astype(np.float64)
    inputs = np.pad(inputs, ((0, 0), (WIDTH - 1, 0), (0, 0)))
    want = np.stack(
        [(inputs[:, k : k + TOKENS] * upstream).sum((0, 1)) for k in range(WIDTH)], 1
    )
    assert dkernel.dtype == dbias.dtype == jnp.float32
    np.testing.assert_allclose(dkernel, want, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dbias, upstream.sum((0, 1)), rtol=1e-5, atol=1e-5)


def test_jitted_step_of_a_split_module_updates_donated_states():
    x, weight, bias = draw_layer(7)
    conv = layer("nnx", weight, bias, activation="silu")
    graphdef, params = nnx.split(conv)

    def step(params, states, x):
        return nnx.merge(graphdef, params).packed(x, states, np.array([0, 4, TOKENS]))

    states = conv.init_state(3)
    want, want_states = conv.packed(x[0], states, np.array([0, 4, TOKENS]))
    got, got_states = jax.jit(step, donate_argnums=1)(params, states, x[0])
    assert states.is_deleted()
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(got_states, want_states)


@with_kinds
@pytest.mark.parametrize("dtype", [None, jnp.bfloat16, "float32"], ids=str)
@pytest.mark.parametrize("param_dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("x_dtype", ["float32", "bfloat16", "int32"])
def test_output_dtype_is_that_of_flax_own_conv(kind, dtype, param_dtype, x_dtype):
    options = {"dtype": dtype, "param_dtype": param_dtype}
    grouped = {"feature_group_count": DIM, "padding": "CAUSAL"}
    x = jax.ShapeDtypeStruct((1, 5, DIM), x_dtype)

    def ours(x):
        if kind == "nnx":
            rngs = nnx.Rngs(0)
            return jax_causal_conv.nnx.CausalConv1d(DIM, 4, **options, rngs=rngs)(x)
        conv = jax_causal_conv.linen.CausalConv1d(DIM, 4, **options)
        return conv.init_with_output(jax.random.key(0), x)[0]

    def theirs(x):
        if kind == "nnx":
            return nnx.Conv(DIM, DIM, 4, **options, **grouped, rngs=nnx.Rngs(0))(x)
        conv = linen.Conv(DIM, (4,), **options, **grouped)
        return conv.init_with_output(jax.random.key(0), x)[0]

    assert jax.eval_shape(ours, x) == jax.eval_shape(theirs, x)


@with_kinds
@pytest.mark.parametrize("width", [1, 4])
def test_default_kernel_is_uniform_in_one_over_root_width(kind, width):
    if kind == "nnx":
        conv = jax_causal_conv.nnx.CausalConv1d(5000, width, rngs=nnx.Rngs(8))
        kernel, bias = conv.kernel[...], conv.bias[...]
    else:
        conv = jax_causal_conv.linen.CausalConv1d(5000, width)
        params = conv.init(jax.random.key(8), jnp.zeros((1, 1, 5000)))["params"]
        kernel, bias = params["kernel"], params["bias"]
    bound = width**-0.5
    assert 0.99 * bound < abs(kernel).max() <= bound
    np.testing.assert_allclose(kernel.std(), bound / 3**0.5, rtol=0.05)
    assert not bias.any()


@with_kinds
def test_init_state_follows_the_dtypes_of_the_layer(kind):
    _, weight, bias = draw_layer(9)
    half = weight.astype(np.float16), bias.astype(np.float16)
    conv = layer(kind, *half, param_dtype=jnp.float16)
    assert conv.init_state(2).dtype == jnp.float16
    conv = layer(kind, weight, bias, dtype=bf16)
    assert conv.init_state(2).dtype == bf16
    assert conv.init_state(2, dtype=jnp.float32).dtype == jnp.float32


def test_initialisers_and_metadata_carry_partitioning():
    spec = jax.sharding.PartitionSpec("model", None)
    init = jax_causal_conv.nnx.default_kernel_init
    mesh = jax.make_mesh((1,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.set_mesh(mesh):
        conv = jax_causal_conv.nnx.CausalConv1d(
            DIM,
            WIDTH,
            kernel_init=nnx.with_partitioning(init, tuple(spec)),
            bias_metadata={"note": "for an optimiser"},
            rngs=nnx.Rngs(0),
        )
        assert conv(jnp.ones((1, 5, DIM))).shape == (1, 5, DIM)
    assert nnx.get_partition_spec(nnx.state(conv))["kernel"].get_value() == spec
    assert conv.bias.get_metadata("note") == "for an optimiser"

    conv = jax_causal_conv.linen.CausalConv1d(
        DIM, WIDTH, kernel_init=linen.with_partitioning(init, tuple(spec))
    )
    variables = conv.init(jax.random.key(0), jnp.ones((1, 5, DIM)))
    assert linen.get_partition_spec(variables)["params"]["kernel"] == spec
    assert conv.apply(variables, jnp.ones((1, 5, DIM))).shape == (1, 5, DIM)


@with_kinds
def test_wrong_arguments_are_named(kind):
    x, weight, bias = draw_layer(10)
    conv = layer(kind, weight, bias)
    with pytest.raises(ValueError, match="x must have D = 6 channels"):
        conv(x[..., :-1])
    with pytest.raises(TypeError, match="unexpected keyword argument 'slots'"):
        conv.decode(x[:, 0], conv.init_state(2), slots=None)
    with pytest.raises(ValueError, match="implementation must be one of"):
        layer(kind, weight, bias, implementation="cuda")(x)
    with pytest.raises(ValueError, match='activation must be None, "silu"'):
        layer(kind, weight, bias, activation="elu")(x)
    for size, error in (((4,), TypeError), (0, ValueError)):
        with pytest.raises(error, match="kernel_size must be"):
            if kind == "nnx":
                jax_causal_conv.nnx.CausalConv1d(DIM, size, rngs=nnx.Rngs(0))
            else:
                conv = jax_causal_conv.linen.CausalConv1d(DIM, size)
                conv.init(jax.random.key(0), x)


@pytest.mark.parametrize("name", ["jax_causal_conv.nnx", "jax_causal_conv.linen"])
def test_missing_flax_is_named_with_its_cure(monkeypatch, name):
    monkeypatch.setitem(sys.modules, "flax", None)  # importing it now fails
    monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ImportError, match=r'pip install "jax-causal-conv\[flax\]"'):
        importlib.import_module(name)


def test_core_package_does_not_import_flax():
    code = "import sys, jax_causal_conv; sys.exit('flax' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@with_kinds
def test_dilation_and_residual_reach_every_method(kind):
    x, weight, bias = draw_layer(12)
    static = {"activation": "tanh", "dilation": 2, "residual": True}
    conv = layer(kind, weight, bias, **static)
    want = jax_causal_conv.causal_conv1d(x, weight, bias, **static)
    np.testing.assert_array_equal(conv(x), want)
    state = conv.init_state(BATCH)
    assert state.shape == (BATCH, 2 * (WIDTH - 1), DIM)
    offsets = np.arange(BATCH + 1) * TOKENS
    out, _ = conv.packed(x.reshape(-1, DIM), state, offsets)
    np.testing.assert_array_equal(out.reshape(x.shape), want)
    out, _ = conv.decode(x, state)
    np.testing.assert_array_equal(out, want)


@pytest.mark.parametrize(
    "mixer", [jax_causal_conv.nnx.Mamba2Mixer, jax_causal_conv.nnx.ShortConvMixer]
)
def test_bridge_makes_linen_modules_of_mixers(mixer):
    """The recipe in the docstring of `jax_causal_conv.linen`."""
    sizes = {"use_bias": True}
    if mixer is jax_causal_conv.nnx.Mamba2Mixer:
        sizes |= {"headdim": 4, "d_state": 3, "chunk_size": 4}
    twin = nnx.bridge.ToLinen(mixer, args=(DIM,), kwargs=sizes)
    own = mixer(DIM, rngs=nnx.Rngs(1), **sizes)
    rng = np.random.default_rng(2)
    u = rng.standard_normal((BATCH, TOKENS, DIM), np.float32)
    ids = np.sort(rng.integers(0, 2, (BATCH, TOKENS)), axis=-1)
    params = nnx.to_pure_dict(nnx.state(own, nnx.Param))
    fresh = jax.eval_shape(twin.init, jax.random.key(0), u)
    assert fresh.keys() == {"params"}
    shapes = jax.tree.map(jnp.shape, params)
    assert jax.tree.map(jnp.shape, linen.unbox(dict(fresh["params"]))) == shapes

    got = quick.jit(lambda p: twin.apply({"params": p}, u, segment_ids=ids))(params)
    expected = quick.jit(lambda: own(u, segment_ids=ids))()
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)

    shell = nnx.eval_shape(lambda: mixer(DIM, rngs=nnx.Rngs(0), **sizes))
    cache = getattr(shell, "init_cache", getattr(shell, "init_state", None))(3)
    batch = (u[0], cache, np.array([0, 4, TOKENS]))
    slots = np.array([2, 0])
    out, after = quick.jit(
        lambda params, *batch: twin.apply(
            {"params": params}, *batch, cache_indices=slots, nnx_method="packed"
        )
    )(params, *batch)
    expected, own_after = quick.jit(
        lambda *batch: own.packed(*batch, cache_indices=slots)
    )(*batch)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        after,
        own_after,
    )


def test_bridge_makes_a_submodule_of_a_mixer():
    class Block(linen.Module):
        @linen.compact
        def __call__(self, u):
            mixer = nnx.bridge.to_linen(
                jax_causal_conv.nnx.ShortConvMixer, DIM, name="mixer"
            )
            return u + mixer(linen.RMSNorm()(u))

    u = jnp.ones((BATCH, TOKENS, DIM))
    variables = Block().init(jax.random.key(0), u)
    assert variables["params"]["mixer"]["conv"]["kernel"].shape == (DIM, 3)
    grads = quick.jit(jax.grad(lambda v: jnp.square(Block().apply(v, u)).sum()))(
        variables
    )
    for place, grad in jax.tree.leaves_with_path(grads):
        assert np.isfinite(grad).all() and np.any(grad), place
