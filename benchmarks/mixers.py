"""A whole Mamba2 mixer beside mamba2-jax's, both with the same weights.

Forward and gradients of rows, and the prefill of a server: ours packed, into slots, the
peer's in rows, with states as results. All are compared with our mixer in float64.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks import imports, programs
from benchmarks.cases import OURS, Case, Options
from benchmarks.timing import Prepared
from benchmarks.workload import TOLERANCE, compare, normal
from jax_causal_conv import build_metadata
from jax_causal_conv.mamba2 import Mamba2Mixer

Op = Literal["forward", "gradient", "prefill"]
OPS: tuple[Op, ...] = ("forward", "gradient", "prefill")

PEER = "mamba2-jax"
_CHUNK = 64  # tokens, as our mixer's default
# What mamba2-jax calls the parameters that have another name here.
_PEER_NAMES = {
    "conv.kernel": "conv1d.conv.kernel",
    "conv.bias": "conv1d.conv.bias",
    "norm.scale": "norm.weight",
}


@dataclasses.dataclass(frozen=True)
class MixerWorkload:
    """One call of a mixer with rows of one length.

    Attributes:
        op: "forward"; "gradient", of the input and all parameters; or "prefill", of
            prompts without history, with the states that they leave.
        rows: B.
        length: T.
        d_model: features of input and output.
        dtype: of everything.
    """

    op: Op
    rows: int
    length: int
    d_model: int = 256
    dtype: str = "float32"

    @property
    def ops(self) -> tuple[str, ...]:
        return (self.op,)

    @property
    def nbytes(self) -> int:
        return 0

    @property
    def tokens(self) -> int:
        return self.rows * self.length

    @functools.cached_property
    def mixer(self) -> Mamba2Mixer:
        """Ours, whose weights all have."""
        return Mamba2Mixer(self.d_model, param_dtype=self.dtype, rngs=nnx.Rngs(0))

    @functools.cached_property
    def u(self) -> jax.Array:
        return normal(0, (self.rows, self.length, self.d_model), self.dtype)

    @functools.cached_property
    def cotangent(self) -> jax.Array:
        return normal(1, (self.rows, self.length, self.d_model), self.dtype)

    @functools.cached_property
    def expected(self) -> dict[str, np.ndarray]:
        """Results of our mixer in float64, as `errors` names them."""
        graphdef, params = nnx.split(self.mixer)
        with jax.enable_x64(True):
            wide = jax.tree.map(lambda a: jnp.asarray(np.asarray(a), float), params)
            u, cotangent = (
                jnp.asarray(np.asarray(a), float) for a in (self.u, self.cotangent)
            )

            @jax.jit
            def call(params, u):
                mixer = nnx.merge(graphdef, params)
                return mixer(u, return_final_state=True)

            if self.op != "gradient":
                out, states = call(wide, u)
                results = {"out": out, "conv": states.conv, "ssm": states.ssm}
            else:

                @jax.jit
                def gradients(params, u, cotangent):
                    out, pull = jax.vjp(lambda *of: call(*of)[0], params, u)
                    return out, *pull(cotangent)

                out, dparams, du = gradients(wide, u, cotangent)
                results = {"out": out, "u": du} | named(dparams)
            return {name: np.asarray(array) for name, array in results.items()}

    def errors(self, got: Mapping[str, np.ndarray]) -> dict[str, float]:
        """Of each result the largest difference over the largest value.

        Raises:
            WrongResult: one is too large, or a result has the wrong shape.
        """
        return compare(got, self.expected, TOLERANCE[self.dtype])


def named(state: nnx.State) -> dict[str, jax.Array]:
    """Arrays of a state under the names of their attributes, with dots."""
    leaves = jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(state))
    return {".".join(str(key.key) for key in path): array for path, array in leaves}


def _state(arrays: Mapping[str, jax.Array]) -> nnx.State:
    """The state with these names."""
    tree: dict[str, Any] = {}
    for name, array in arrays.items():
        *folders, last = name.split(".")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[last] = array
    return nnx.State(tree)


def _rows(
    work: MixerWorkload, mixer: nnx.Module, params: dict, view: Callable
) -> Prepared:
    """`mixer(u)` or its gradients; `view` turns `(name, gradient)` into ours."""
    graphdef = nnx.split(mixer)[0]

    def forward(params, u):
        out = nnx.merge(graphdef, _state(params))(u)
        return out[0] if isinstance(out, tuple) else out

    if work.op == "forward":
        step: Any = jax.jit(forward)
        given: tuple = params, work.u

        def seen(out):
            return {"out": np.asarray(out)}

    else:

        @jax.jit
        def step(params, u, cotangent):
            out, pull = jax.vjp(forward, params, u)
            return out, *pull(cotangent)

        given = params, work.u, work.cotangent

        def seen(result):
            out, dparams, du = result
            own = dict(view(*item) for item in dparams.items())
            return {k: np.asarray(a) for k, a in ({"out": out, "u": du} | own).items()}

    by = programs.implementation(step.lower(*given))
    return Prepared(functools.partial(step, *given), view=seen, implementation=by)


def ours(work: MixerWorkload) -> Prepared:
    """This package's mixer."""
    params = named(nnx.state(work.mixer))
    if work.op != "prefill":
        return _rows(work, work.mixer, params, lambda name, array: (name, array))
    offsets = np.arange(work.rows + 1, dtype=np.int32) * work.length
    slots = 1 + np.arange(work.rows)[::-1]
    batch = {
        "query_start_loc": offsets,
        "cache_indices": slots,
        "has_initial_state": np.zeros(work.rows, bool),
        "metadata": build_metadata(offsets, work.tokens),
    }
    batch = jax.tree.map(jnp.asarray, batch)
    graphdef = nnx.split(work.mixer)[0]

    def packed(cache, params, u, batch):
        mixer = nnx.merge(graphdef, _state(params))
        return mixer.packed(u, cache, max_prefills=work.rows, **batch)

    step = jax.jit(packed, donate_argnums=0)
    holder = [work.mixer.init_cache(work.rows + 2)]
    given = params, work.u.reshape(work.tokens, work.d_model), batch
    by = programs.implementation(step.lower(holder[0], *given))

    def call():
        out, holder[0] = step(holder[0], *given)
        return out, holder[0]

    def view(result):
        out, cache = result
        left = {"conv": cache.conv[slots], "ssm": cache.ssm[slots]}
        left["out"] = out.reshape(work.u.shape)
        return {name: np.asarray(array) for name, array in left.items()}

    # Waiting for the cache would keep it from being donated to the next call.
    def wait(result):
        jax.block_until_ready(result[0])

    return Prepared(call, wait, view, implementation=by)


def mamba2_jax(
    work: MixerWorkload, path: Path | None, chunk: int | None = None
) -> Prepared:
    """The mixer of mamba2-jax, with its own size of chunks if none is given."""
    modeling = imports.load("mamba2_jax.modeling", path)
    config = modeling.Mamba2Config(hidden_size=work.d_model)
    if chunk is not None:
        config = dataclasses.replace(config, chunk_size=chunk)
    mixer = modeling.Mamba2Mixer(config, 0, rngs=nnx.Rngs(0))
    params = {
        _PEER_NAMES.get(name, name): array.T[:, None]
        if name == "conv.kernel"
        else array
        for name, array in named(nnx.state(work.mixer)).items()
    }
    names = {theirs: name for name, theirs in _PEER_NAMES.items()}

    def of_ours(name, array):
        name = names.get(name, name)
        return name, array[:, 0].T if name == "conv.kernel" else array

    if work.op != "prefill":
        return _rows(work, mixer, params, of_ours)
    graphdef = nnx.split(mixer)[0]

    @jax.jit
    def step(params, u):
        return nnx.merge(graphdef, _state(params))(u)

    def view(result):
        out, conv, ssm = result
        states = {"out": out, "conv": conv.swapaxes(1, 2), "ssm": ssm}
        return {name: np.asarray(array) for name, array in states.items()}

    by = programs.implementation(step.lower(params, work.u))
    return Prepared(
        functools.partial(step, params, work.u), view=view, implementation=by
    )


def case(work: MixerWorkload, options: Options) -> Case:
    """A workload by us and, where it is, mamba2-jax."""
    prepare: dict[str, Callable[[], Prepared]] = {OURS: functools.partial(ours, work)}
    if options.with_peers:
        path = options.paths.get(PEER)
        prepare[PEER] = functools.partial(mamba2_jax, work, path)
        prepare[f"{PEER}, chunks of {_CHUNK}"] = functools.partial(
            mamba2_jax, work, path, _CHUNK
        )
    name = f"{work.op}, {work.rows} x {work.length:,}"
    return Case("mixer", name, work.tokens, work.dtype, prepare, work)
