"""Trains a small byte-level Mamba2 on the Python language reference, on a CPU.

The text is what every Python carries for `help()`: the topics of `pydoc_data`, about
400,000 bytes without repetitions. Each topic is a document. Documents are packed back
to back into rows, and segment ids keep them apart. Some are held out; the model has to
predict them much better than the frequencies of byte pairs do. What is saved is a
checkpoint in transformers' layout, for `examples.serve` and
`python -m jax_causal_conv.mamba2.generate`.
"""

import argparse
import functools
import math
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.figure
import numpy as np
import optax
from flax import nnx
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from examples.byte_text import END, VOCAB, documents
from jax_causal_conv import pack_documents
from jax_causal_conv.mamba2 import Mamba2Config, Mamba2LM, save

WEIGHT_DECAY = 0.1
CLIP = 1.0
LOSS_CURVE = "loss.png"


# ---- Rows --------------------------------------------------------------------------


class Rows(NamedTuple):
    """Packed documents, `(R, L)` int32 each."""

    inputs: np.ndarray
    targets: np.ndarray  # the token that follows each input in its document
    segment_ids: np.ndarray  # number of the document, negative in padding


def pack(texts: Sequence[bytes], length: int) -> Rows:
    """Documents back to back in rows of `length` tokens; the last row is padded."""
    tokens = [np.frombuffer(text, np.uint8).astype(np.int32) for text in texts]
    inputs = [np.append(END, document) for document in tokens]
    targets = [np.append(document, END) for document in tokens]
    packed = pack_documents(inputs, length, pad=END)
    after = pack_documents(targets, length, pad=END).tokens
    return Rows(packed.tokens, after, packed.segment_ids)


def batches(
    texts: Sequence[bytes], batch: int, length: int, seed: int
) -> Iterator[Rows]:
    """Endlessly: the documents in a new order, packed, in `batch` rows at a time."""
    rng = np.random.default_rng(seed)
    left = Rows(*np.zeros((3, 0, length), np.int32))
    while True:
        shuffled = [texts[i] for i in rng.permutation(len(texts))]
        epoch = pack(shuffled, length)
        order = rng.permutation(len(epoch.inputs))
        left = Rows(
            *(np.concatenate([a, b[order]]) for a, b in zip(left, epoch, strict=True))
        )
        while len(left.inputs) >= batch:
            yield Rows(*(a[:batch] for a in left))
            left = Rows(*(a[batch:] for a in left))


# ---- What to beat ------------------------------------------------------------------


def bigram_cross_entropy(training: Rows, evaluation: Rows, vocab: int = VOCAB) -> float:
    """Nats per token of a bigram model, fitted to one text and asked about another.

    Smoothed as Witten and Bell do ("The zero-frequency problem", 1991): after a token
    with n successors in training, t of them different, a token has the probability
    (count + t · p) / (n + t), with p its frequency regardless of what stands before
    it; p is smoothed in the same way towards 1 / `vocab`. No parameter is tuned.
    """

    def smoothed(counts: np.ndarray, prior: np.ndarray) -> np.ndarray:
        kinds = np.count_nonzero(counts, axis=-1, keepdims=True)
        total = counts.sum(axis=-1, keepdims=True) + kinds
        return np.where(total > 0, counts + kinds * prior, prior) / np.maximum(total, 1)

    counts = np.zeros((vocab, vocab))
    real = training.segment_ids >= 0
    np.add.at(counts, (training.inputs[real], training.targets[real]), 1)
    uniform = np.full(vocab, 1 / vocab)
    pairs = smoothed(counts, smoothed(counts.sum(axis=0), uniform))
    real = evaluation.segment_ids >= 0
    return -np.log(pairs[evaluation.inputs[real], evaluation.targets[real]]).mean()


# ---- Training ----------------------------------------------------------------------


def summed_loss(graph: Any, params: Any, rows: Rows) -> tuple[jax.Array, jax.Array]:
    """Nats of all tokens that are not padding, and how many they are."""
    logits = nnx.merge(graph, params)(rows.inputs, segment_ids=rows.segment_ids)
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, rows.targets)
    real = rows.segment_ids >= 0
    return jnp.sum(nats, where=real), jnp.sum(real)


def optimizer(steps: int, peak: float) -> optax.GradientTransformation:
    """AdamW with clipping, warmup and a cosine; vectors are not decayed."""
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=peak,
        warmup_steps=min(max(steps // 10, 1), steps - 1),
        decay_steps=steps,
        end_value=peak / 20,
    )
    return optax.chain(
        optax.clip_by_global_norm(CLIP),
        optax.adamw(
            schedule,
            b2=0.98,
            weight_decay=WEIGHT_DECAY,
            mask=functools.partial(jax.tree.map, lambda p: p.ndim > 1),
        ),
    )


class Trainer:
    """A model, its optimizer's state, and the two jitted functions."""

    def __init__(self, model: Mamba2LM, *, steps: int, learning_rate: float):
        graph, self.params = nnx.split(model)
        updates = optimizer(steps, learning_rate)
        self.model = model
        self.opt_state = updates.init(self.params)

        # Donated: parameters and moments are updated in place.
        @functools.partial(jax.jit, donate_argnums=(0, 1))
        def step(params, opt_state, rows):
            def mean_loss(params):
                total, count = summed_loss(graph, params, rows)
                return total / count

            loss, gradients = jax.value_and_grad(mean_loss)(params)
            change, opt_state = updates.update(gradients, opt_state, params)
            return optax.apply_updates(params, change), opt_state, loss

        self._step = step
        self._loss = jax.jit(functools.partial(summed_loss, graph))

    def step(self, rows: Rows) -> jax.Array:
        """One update; returns the batch's loss before it, without waiting for it."""
        self.params, self.opt_state, loss = self._step(
            self.params, self.opt_state, rows
        )
        return loss

    def evaluate(self, rows: Rows, batch: int) -> float:
        """Nats per token, in batches of one shape."""
        missing = -len(rows.inputs) % batch
        padded = Rows(
            *(
                np.pad(array, ((0, missing), (0, 0)), constant_values=fill)
                for array, fill in zip(rows, (END, END, -1), strict=True)
            )
        )
        total = count = 0.0
        for start in range(0, len(padded.inputs), batch):
            part = Rows(*(array[start : start + batch] for array in padded))
            nats, tokens = self._loss(self.params, part)
            total, count = total + float(nats), count + float(tokens)
        return total / count

    def trained(self) -> Mamba2LM:
        """The model with the parameters of now."""
        nnx.update(self.model, self.params)
        return self.model


# ---- The program -------------------------------------------------------------------


class Diverged(Exception):
    """The loss is not a number any more."""


class Curve(NamedTuple):
    """What a run went through, in nats per byte."""

    training: list[float]  # of each step's batch
    held_out: list[tuple[int, float]]  # steps done, and the loss then


def train(
    trainer: Trainer,
    training: Iterator[Rows],
    evaluation: Rows,
    options: argparse.Namespace,
    console: Console,
) -> Curve:
    """Takes `options.steps` steps, and looks at the held-out rows now and then.

    Raises:
        Diverged: a loss is not finite; the last one is that of the final parameters.
    """

    def finite(loss: float, step: int) -> float:
        if not math.isfinite(loss):
            raise Diverged(
                f"the loss is {loss} after {step} steps: try a smaller --learning-rate "
                f"than {options.learning_rate}"
            )
        return loss

    losses: list[float] = []
    held_out: list[tuple[int, float]] = []
    evaluate_at = set(np.linspace(0, options.steps, 6, dtype=int)[1:].tolist())
    columns = (
        TextColumn("training"),
        BarColumn(),
        TextColumn("step {task.completed}/{task.total}"),
        TextColumn("{task.fields[loss]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=options.steps, loss="compiling")
        newest = trainer.step(next(training))
        for done in range(1, options.steps + 1):
            if done in evaluate_at:
                nats = trainer.evaluate(evaluation, options.batch)
                held_out.append((done, finite(nats, done)))
            loss = newest
            # Dispatched before the last loss is fetched: the device never waits.
            if done < options.steps:
                newest = trainer.step(next(training))
            losses.append(finite(float(loss), done - 1))
            bits = losses[-1] / np.log(2)
            progress.update(task, advance=1, loss=f"{bits:.2f} bits per byte")
    return Curve(losses, held_out)


def plot(path: Path, curve: Curve, bigram: float, tokens_per_step: int) -> None:
    """Draws the losses over the bytes that were read."""
    figure = matplotlib.figure.Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    read = np.arange(1, len(curve.training) + 1) * tokens_per_step
    axes.plot(read, np.array(curve.training) / np.log(2), lw=0.7, label="training")
    steps, held_out = np.array(curve.held_out).T
    axes.plot(
        steps * tokens_per_step, held_out / np.log(2), "o-", label="held-out topics"
    )
    axes.axhline(bigram / np.log(2), color="k", ls="--", label="bigrams, held-out")
    axes.set(xlabel="bytes read", ylabel="bits per byte", ylim=(0, None))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.legend()
    figure.savefig(path, dpi=120)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m examples.train", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=4, help="rows per step")
    parser.add_argument("--length", type=int, default=256, help="bytes per row")
    parser.add_argument("--d-model", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--learning-rate", type=float, default=5e-3, help="its peak")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("mamba2-bytes"),
        help="directory of the checkpoint and the loss curve (default: %(default)s)",
    )
    options = parser.parse_args(argv)
    for name in ("steps", "batch", "length", "d_model", "layers"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if not (math.isfinite(options.learning_rate) and options.learning_rate > 0):
        parser.error(
            f"--learning-rate must be finite and above 0, got {options.learning_rate}"
        )
    if not 0 <= options.seed < 2**32:
        parser.error(f"--seed must be in [0, 2**32), got {options.seed}")
    if options.out.exists() and not options.out.is_dir():
        parser.error(f"--out must be a directory, and {options.out} is none")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    console = Console(highlight=False)
    texts, held_out = documents()
    if not (texts and held_out):
        print("error: this Python has no help topics to train on", file=sys.stderr)
        return 2
    evaluation = pack(held_out, options.length)
    bigram = bigram_cross_entropy(pack(texts, options.length), evaluation)

    config = Mamba2Config(
        vocab_size=VOCAB,
        d_model=options.d_model,
        n_layers=options.layers,
        d_state=32,
        headdim=math.gcd(64, 2 * options.d_model),
        chunk_size=32,
        bos_token_id=END,
        eos_token_id=END,
    )
    model = Mamba2LM(config, rngs=nnx.Rngs(options.seed))
    size = sum(array.size for array in jax.tree.leaves(nnx.state(model)))
    console.print(
        f"{len(texts)} topics of {sum(map(len, texts)):,} bytes, {len(held_out)} held "
        f"out of {sum(map(len, held_out)):,}; a model of {size:,} parameters"
    )
    trainer = Trainer(model, steps=options.steps, learning_rate=options.learning_rate)
    rows = batches(texts, options.batch, options.length, options.seed)
    started, cpu_started = time.perf_counter(), time.process_time()
    try:
        curve = train(trainer, rows, evaluation, options, console)
    except Diverged as error:
        print(f"error: {error}; nothing is saved", file=sys.stderr)
        return 1
    seconds = time.perf_counter() - started
    cpu_seconds = time.process_time() - cpu_started

    save(options.out, trainer.trained())
    tokens_per_step = options.batch * options.length
    plot(options.out / LOSS_CURVE, curve, bigram, tokens_per_step)

    table = Table(title="Held-out topics", title_justify="left")
    table.add_column()
    table.add_column("bits per byte", justify="right")
    table.add_column("nats per byte", justify="right")
    for name, nats in [("bigrams", bigram), ("Mamba2", curve.held_out[-1][1])]:
        table.add_row(name, f"{nats / np.log(2):.3f}", f"{nats:.3f}")
    console.print(table)
    console.print(
        f"{options.steps * tokens_per_step:,} bytes read in {seconds:.0f} s "
        f"({cpu_seconds:.0f} s of CPU time), compilation included"
    )
    console.print(f"checkpoint and {LOSS_CURVE}: {options.out}", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
