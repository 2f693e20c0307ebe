"""The programs that train a byte-level Mamba2 and serve it, from end to end."""

import json
import math

import pytest

nnx = pytest.importorskip("flax.nnx")
for package in ("matplotlib", "optax", "rich", "safetensors"):
    pytest.importorskip(package)

import jax
import numpy as np

from examples import serve, train
from jax_causal_conv.mamba2 import Event, Mamba2LM, Stats, checkpoint

pytestmark = pytest.mark.usefixtures("quick_compilation")

PNG = b"\x89PNG\r\n\x1a\n"
LENGTH = 32


# ---- Text --------------------------------------------------------------------------


def test_rows_hold_every_byte_and_every_end_once():
    rng = np.random.default_rng(0)
    texts = [rng.bytes(n).replace(b"\0", b"x") for n in (1, 70, 0, 7, 31, 32)]
    rows = train.pack(texts, LENGTH)
    ids = rows.segment_ids.ravel()
    total = sum(len(text) + 1 for text in texts)
    assert rows.inputs.shape == (-(-total // LENGTH), LENGTH)
    for i, text in enumerate(texts):
        inputs, targets = rows.inputs.ravel()[ids == i], rows.targets.ravel()[ids == i]
        assert inputs.tolist() == [train.END, *text]
        assert targets.tolist() == [*text, train.END]
    np.testing.assert_array_equal(ids < 0, np.arange(ids.size) >= total)


def test_an_epoch_of_batches_is_every_document_once():
    rng = np.random.default_rng(1)
    # As many tokens, ends included, as two batches of two rows.
    texts = [rng.bytes(n).replace(b"\0", b"x") for n in (100, 9, 16)]
    batches = train.batches(texts, batch=2, length=LENGTH, seed=0)
    orders = []
    for _ in range(3):
        epoch = [next(batches), next(batches)]
        ids = np.concatenate([rows.segment_ids.ravel() for rows in epoch])
        targets = np.concatenate([rows.targets.ravel() for rows in epoch])
        want = sorted(b"".join(text + b"\0" for text in texts))
        assert sorted(targets[ids >= 0].tolist()) == want
        orders.append(targets.tolist())
    assert orders[0] != orders[1] != orders[2]


def test_no_paragraph_is_in_training_and_in_held_out_text():
    training, held_out = train.documents()
    paragraphs = [
        {tuple(p.split()) for text in texts for p in text.decode().split("\n\n")}
        for texts in (training, held_out)
    ]
    assert not paragraphs[0] & paragraphs[1]
    sizes = [sum(map(len, texts)) for texts in (training, held_out)]
    assert sizes[0] > 250_000 and 0.05 < sizes[1] / sizes[0] < 0.2, sizes
    assert not any(bytes([train.END]) in text for text in training + held_out)


def test_bigram_cross_entropy_is_that_of_a_computation_by_hand():
    def rows(pairs, padding):
        inputs, targets = np.array(pairs, np.int32).T[:, None]
        return train.Rows(inputs, targets, np.array([padding], np.int32))

    training = rows([(0, 1), (1, 1), (1, 2), (2, 0), (3, 3)], [0, 0, 1, 1, -1])
    evaluation = rows([(1, 1), (1, 0), (3, 2), (3, 3)], [5, 5, 6, -1])
    # Targets 0, 1, 2 occur 1, 2, 1 times, so that p = (count + 3 · 1/4) / (4 + 3);
    # token 1 has 2 successors, both different; token 3 has none (but in padding).
    p = [1.75 / 7, 2.75 / 7, 1.75 / 7]
    after_1 = [(0 + 2 * p[0]) / 4, (1 + 2 * p[1]) / 4]
    want = -(math.log(after_1[1]) + math.log(after_1[0]) + math.log(p[2])) / 3
    got = train.bigram_cross_entropy(training, evaluation, vocab=4)
    assert got == pytest.approx(want, rel=1e-12)


# ---- Train and serve ---------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The output directory of a short training run."""
    out = tmp_path_factory.mktemp("mamba2") / "made" / "here"
    sizes = ["--d-model", "16", "--layers", "1", "--batch", "32"]
    steps = ["--steps", "20", "--length", str(LENGTH), "--learning-rate", "0.02"]
    assert train.main([*sizes, *steps, "--out", str(out)]) == 0
    return out


def test_training_lowers_the_held_out_loss_and_draws_it(trained):
    model = checkpoint.load(trained)
    assert model.config.vocab_size == 256
    assert model.config.eos_token_id == train.END
    _, texts = train.documents()
    rows = train.Rows(*(array[:64] for array in train.pack(texts, LENGTH)))
    graph, params = nnx.split(model)
    untrained = nnx.state(Mamba2LM(model.config, rngs=nnx.Rngs(0)))
    loss = jax.jit(lambda params: train.summed_loss(graph, params, rows))
    (before, count), (after, _) = loss(untrained), loss(params)
    assert count == rows.inputs.size
    # Untrained, all 256 bytes are about as likely; 3.4 is what their frequencies give.
    before, after = before / count, after / count
    assert abs(before - math.log(256)) < 0.2, before
    assert after < 4.0, after
    assert (trained / train.LOSS_CURVE).read_bytes().startswith(PNG)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--learning-rate", "nan"], "--learning-rate must be finite"),
        (["--learning-rate", "0"], "--learning-rate must be finite and above 0"),
        (["--seed", "-1"], "--seed must be in"),
        (["--steps", "0"], "--steps must be at least 1"),
        (["--out", __file__], "--out must be a directory"),
    ],
)
def test_options_that_make_no_sense_are_named(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("texts", [([], [b"x"]), ([b"x"], [])])
def test_training_without_text_says_so(texts, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "documents", lambda: texts)
    assert train.main(["--out", str(tmp_path / "new")]) == 2
    assert "no help topics" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("steps", [1, 20])  # the last update, or one before it
def test_training_that_diverges_saves_nothing(steps, tmp_path, monkeypatch, capsys):
    texts = [bytes(range(1, 200))]
    monkeypatch.setattr(train, "documents", lambda: (texts, texts))
    nothing = train.optax.sgd(float("nan"))
    monkeypatch.setattr(train, "optimizer", lambda steps, peak: nothing)
    sizes = ["--d-model", "16", "--layers", "1", "--batch", "2"]
    arguments = [*sizes, "--length", "32", "--steps", str(steps)]
    assert train.main([*arguments, "--out", str(tmp_path / "new")]) == 1
    message = capsys.readouterr().err
    assert "the loss is nan after 1 steps" in message and "--learning-rate" in message
    assert not (tmp_path / "new").exists()


@pytest.fixture
def runs(monkeypatch):
    """The runs of all servers, in turn; with a recorded list, those instead."""
    runs, recorded = [], []
    real = serve.Server.serve

    def run(server, requests, arrivals):
        runs.append(recorded.pop(0) if recorded else real(server, requests, arrivals))
        return runs[-1]

    monkeypatch.setattr(serve.Server, "serve", run)
    return runs, recorded


def test_served_requests_get_the_answers_they_get_alone(
    trained, capsys, monkeypatch, tmp_path, runs
):
    runs, recorded = runs
    image = tmp_path / "new" / "batches.png"
    few = ["--requests", "5", "--max-new-tokens", "9", "--slots", "4", "--budget", "4"]
    few += ["--system", "70"]
    arguments = [str(trained), *few, "--gap", "1", "--plot", str(image)]
    arguments += ["--rounds", "2", "--prompt", "Grüße an "]
    assert serve.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "Grüße an " in printed
    assert "Every request got the answer that it gets alone." in printed
    assert image.read_bytes().startswith(PNG)

    together, alone, _, drafted, *_ = runs
    assert len(runs) == 8
    assert max(step.running for step in together.steps) > 1
    assert max(step.running for step in alone.steps) == 1
    assert bytes(together.generations[0].prompt[1:].tolist()).decode() == "Grüße an "
    spared = [Stats(run.steps, []).prefix_tokens for run in runs]
    assert [count > 0 for count in spared] == [False, False, True, True] * 2
    assert sum(step.draft_tokens for step in drafted.steps) > 0
    for run in runs:
        assert all(5 <= len(tokens) <= 9 or tokens[-1] == 0 for tokens in run.tokens)
        drawn = sum(step.decode_tokens + step.accepted_tokens for step in run.steps)
        assert drawn == sum(len(tokens) - 1 for tokens in run.tokens)
        assert run.compiled_meanwhile == 0
        assert (run.first_tokens > 0).all()
        assert (run.first_tokens <= run.latencies).all()

    # The same again, but for one token.
    alone.generations[3].tokens[-1] ^= 1
    recorded += runs
    monkeypatch.setattr(serve.Engine, "warmup", lambda engine: None)
    assert serve.main(arguments) == 1
    assert "other answers than alone: [3]" in capsys.readouterr().out


def test_serving_without_a_checkpoint_says_how_to_make_one(tmp_path, capsys):
    assert serve.main([str(tmp_path / "none")]) == 2
    message = capsys.readouterr().err
    assert f"examples.train --out {tmp_path / 'none'}" in message


def test_serving_another_vocabulary_says_that_its_tokenizer_is_missing(
    tmp_path, capsys
):
    config = {"model_type": "mamba2", "vocab_size": 50288}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert serve.main([str(tmp_path)]) == 2
    assert "vocabulary of 50288 tokens" in capsys.readouterr().err


def test_streamed_bytes_become_text_without_escape_sequences():
    written = []
    on_event = serve.streamer(written.append)
    for byte in "aß€\n".encode() + b"\x1b[2J\xff":
        on_event(Event(0, byte))
    on_event(Event(0, "ß".encode()[0]))
    on_event(Event(0, train.END, "stop"))
    assert "".join(written) == "aß€\n\ufffd[2J\ufffd\ufffd"


def test_all_kinds_of_stop_tokens_are_known():
    assert serve.stop_tokens(None) == ()
    assert serve.stop_tokens(0) == (0,)
    assert serve.stop_tokens((0, 3)) == (0, 3)
