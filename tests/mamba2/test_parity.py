"""Mamba2 language models give the logits and the texts of transformers.

goldens/mamba2.npz holds what transformers computed, and make_mamba2_goldens.py the
models: random in every parameter, tied and not, with and without biases, of several
group numbers, widths and odd sizes. Where torch and transformers are installed, further
seeds are compared directly.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("flax")
pytest.importorskip("safetensors")

from flax import nnx

from jax_causal_conv import PAD_SLOT_ID, ConvMetadata, build_metadata
from jax_causal_conv.mamba2 import Mamba2Config, Mamba2LM, load
from jax_causal_conv.nnx import Mamba2Mixer
from tests.support import make_mamba2_goldens as goldens
from tests.support import quick
from tests.support.platforms import HAS_TRITON

pytestmark = pytest.mark.usefixtures("quick_compilation")

TIED, UNTIED, BIASED, _ = goldens.MODELS  # the fourth has another epsilon
TOLERANCE = 5e-6  # of the largest logit; see test_logits_are_those_of_transformers
TOKENS, SEQUENCES, SLOTS = 12, 4, 6  # of a serving step
SLOT_OF = (4, 0, 3)  # of each prompt


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    config: dict
    weights: dict
    model: Mamba2LM
    batch: np.ndarray
    logits: np.ndarray
    prompts: list
    continuations: np.ndarray

    @property
    def scale(self):
        return np.abs(self.logits).max()


def case_of(config, seed, results, directory):
    weights = goldens.weights(config, seed)
    goldens.write_checkpoint(directory, config, weights)
    batch, prompts = goldens.texts(config, seed)
    return Case(
        config,
        weights,
        load(directory),
        batch,
        results["logits"],
        prompts,
        results["continuations"],
    )


@pytest.fixture(autouse=True)
def exact_products():
    """float32 products in float32: a GPU may otherwise take TF32."""
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="module", params=goldens.MODELS)
def case(request, tmp_path_factory):
    name = request.param
    seed = list(goldens.MODELS).index(name)
    with np.load(goldens.GOLDENS) as file:
        results = {key: file[f"{name}/{key}"] for key in ("logits", "continuations")}
    config = goldens.MODELS[name]
    return case_of(config, seed, results, tmp_path_factory.mktemp("model"))


def compiled(function, **how):
    """`function(model, …)`, jitted: once for all models of one structure."""

    def split(graphdef, params, *rest):
        return function(nnx.merge(graphdef, params), *rest)

    jitted = quick.jit(split, static_argnums=0, **how)
    return lambda model, *rest: jitted(*nnx.split(model), *rest)


@compiled
def whole_texts(model, tokens, segment_ids):
    return model(tokens, segment_ids=segment_ids)


def rows_of(case):
    """All texts as rows and segment ids, and where the greedy choices lie.

    Two rows are the batch, one holds two texts, one a text and padding, as in training.
    """
    texts = [
        prompt + continuation.tolist()
        for prompt, continuation in zip(case.prompts, case.continuations, strict=True)
    ]
    tokens = np.zeros((goldens.BATCH + 2, goldens.LENGTH), np.int32)
    ids = np.full(tokens.shape, -1)
    tokens[: goldens.BATCH], ids[: goldens.BATCH] = case.batch, 0
    choices = []
    for number, (row, start) in enumerate([(2, 0), (2, len(texts[0])), (3, 0)]):
        end = start + len(texts[number])
        tokens[row, start:end], ids[row, start:end] = texts[number], number
        choices.append((row, slice(end - goldens.NEW_TOKENS - 1, end - 1)))
    return tokens, ids, choices


def logits_of(case):
    """Logits of the batch, and those that decided each continuation."""
    tokens, ids, choices = rows_of(case)
    logits = np.asarray(whole_texts(case.model, tokens, ids))
    return logits[: goldens.BATCH], np.stack([logits[choice] for choice in choices])


def assert_close(logits, expected, scale):
    error = np.abs(logits - expected).max() / scale
    assert error < TOLERANCE, f"{error:.2e} of the largest logit"


@functools.partial(compiled, donate_argnums=3)
def serve(model, tokens, cache, query_start_loc, slots, seen, metadata):
    return model.packed(
        tokens,
        cache,
        query_start_loc,
        cache_indices=slots,
        has_initial_state=seen,
        metadata=metadata,
    )


def serve_greedily(case, *, chunk=7):
    """Serves all prompts side by side in steps of TOKENS, each in chunks, greedily.

    Returns the logits that decided each token, of each prompt. Prompts enter one after
    the other, the longest first, so that prefills and decodes meet in one step.
    """
    texts = [list(prompt) for prompt in case.prompts]
    done = [0] * len(texts)
    deciding = [[] for _ in texts]
    cache = case.model.init_cache(SLOTS)
    for step in range(100):
        waiting = [
            i
            for i, found in enumerate(deciding)
            if len(found) < goldens.NEW_TOKENS and step >= 2 * (len(texts) - 1 - i)
        ]
        if not waiting:
            break
        tokens = np.full(TOKENS, -1, np.int32)  # padding need not be in the vocabulary
        offsets, work = [0], []
        for i in waiting:
            count = min(len(texts[i]) - done[i], chunk, TOKENS - offsets[-1])
            new = texts[i][done[i] : done[i] + count]
            tokens[offsets[-1] : offsets[-1] + count] = new
            offsets.append(offsets[-1] + count)
            work.append((i, count))
        spare = SEQUENCES - len(work)
        query_start_loc = np.array(offsets + [offsets[-1]] * spare, np.int32)
        slots = np.array([SLOT_OF[i] for i in waiting] + [PAD_SLOT_ID] * spare)
        seen = np.array([done[i] > 0 for i in waiting] + [False] * spare)
        metadata = build_metadata(query_start_loc, TOKENS)
        logits, cache = serve(
            case.model, tokens, cache, query_start_loc, slots, seen, metadata
        )
        logits = np.asarray(logits)
        assert np.isfinite(logits).all()
        for row, (i, count) in enumerate(work):
            done[i] += count
            if done[i] == len(texts[i]):
                deciding[i].append(logits[row])
                texts[i].append(int(logits[row].argmax()))
    return np.array(deciding)


def test_logits_are_those_of_transformers(case):
    # Two float32 computations that sum in different orders: up to 1.4e-6 was seen.
    logits, _ = logits_of(case)
    assert logits.dtype == np.float32
    assert_close(logits, case.logits, case.scale)


def test_greedy_texts_are_those_of_transformers(case):
    _, deciding = logits_of(case)
    assert deciding.argmax(-1).tolist() == case.continuations.tolist()


def test_served_greedy_texts_are_those_of_transformers(case):
    _, whole = logits_of(case)
    served = serve_greedily(case)
    assert served.argmax(-1).tolist() == case.continuations.tolist()
    assert_close(served, whole, case.scale)


@pytest.mark.skipif(not HAS_TRITON, reason="the interpreter is part of Triton")
@pytest.mark.parametrize("case", [BIASED], indirect=True)
def test_kernels_serve_the_same_texts(case, tmp_path):
    goldens.write_checkpoint(tmp_path, case.config, case.weights)
    model = load(tmp_path, implementation="interpret")
    served = serve_greedily(dataclasses.replace(case, model=model))
    assert served.argmax(-1).tolist() == case.continuations.tolist()


@pytest.mark.parametrize("case", [TIED, UNTIED, BIASED], indirect=True)
def test_original_layout_gives_the_same_logits(case, tmp_path):
    goldens.write_checkpoint(tmp_path, *goldens.original(case.config, case.weights))
    original = dataclasses.replace(case, model=load(tmp_path))
    for logits, expected in zip(logits_of(original), logits_of(case), strict=True):
        np.testing.assert_array_equal(logits, expected)


@pytest.mark.parametrize("case", [TIED], indirect=True)
def test_bfloat16_model_is_as_exact_as_its_dtype(case, tmp_path):
    goldens.write_checkpoint(tmp_path, case.config, case.weights)
    model = load(tmp_path, dtype=jnp.bfloat16)
    logits, _ = logits_of(dataclasses.replace(case, model=model))
    assert logits.dtype == np.float32
    # 1.5 % was seen, and 1.8 % of transformers in bfloat16.
    error = np.sqrt(np.square(logits - case.logits).mean()) / case.logits.std()
    assert 1e-4 < error < 0.03, f"{error:.2e}"


@pytest.mark.parametrize("given", [False, True], ids=["built", "given"])
def test_all_layers_share_one_metadata(given, monkeypatch):
    config = Mamba2Config(vocab_size=5, d_model=4, n_layers=3, d_state=2, headdim=4)
    offsets = np.array([0, 3, 4], np.int32)
    metadata = build_metadata(offsets, 6) if given else None
    passed = []
    packed = Mamba2Mixer.packed

    def recorded(self, *args, metadata, **kwargs):
        passed.append(metadata)
        return packed(self, *args, metadata=metadata, **kwargs)

    monkeypatch.setattr(Mamba2Mixer, "packed", recorded)

    def step():
        model = Mamba2LM(config, rngs=nnx.Rngs(0))
        cache, tokens = model.init_cache(2), jnp.zeros(6, jnp.int32)
        return model.packed(tokens, cache, offsets, metadata=metadata)[0]

    assert jax.eval_shape(step).shape == (2, 5)
    assert len(passed) == 3
    assert isinstance(passed[0], ConvMetadata)
    assert passed[0] is passed[1] is passed[2]
    assert not given or passed[0] is metadata


@pytest.mark.parametrize("name", goldens.MODELS)
def test_fresh_models_agree_with_transformers(name, tmp_path):
    pytest.importorskip("torch")
    # 5.17 normalises over all groups of a mixer at once, 5.24 by groups, as we do.
    pytest.importorskip("transformers", minversion="5.24")
    config, seed = goldens.MODELS[name], f"fresh {name}"
    case = case_of(config, seed, goldens.golden(config, seed), tmp_path)
    logits, deciding = logits_of(case)
    assert_close(logits, case.logits, case.scale)
    # A tie may fall either way: only choices that rounding cannot turn must agree.
    top = np.sort(deciding, axis=-1)
    clear = np.cumprod(top[..., -1] - top[..., -2] > TOLERANCE * case.scale, axis=-1)
    agree = deciding.argmax(-1) == case.continuations
    assert agree[clear.astype(bool)].all()
