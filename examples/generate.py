"""Continues a text with a Mamba2 checkpoint from a local folder.

The folder holds a model in either published layout, such as `examples.train` leaves
behind, and, unless the model reads bytes, its tokenizer.json.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from examples.byte_text import END, VOCAB, printable, stop_tokens
from jax_causal_conv.mamba2 import Engine, Mamba2Config, Request, SamplingParams, load


class Tokenizer(NamedTuple):
    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]


def tokenizer_of(folder: Path, config: Mamba2Config) -> Tokenizer:
    """The tokenizer in the folder, or that of a model over bytes.

    Raises:
        ImportError: there is one, but the package `tokenizers` is not installed.
        ValueError: there is none, and the model's tokens are no bytes.
    """
    file = folder / "tokenizer.json"
    if file.is_file():
        import tokenizers  # noqa: PLC0415 (models over bytes do without)

        found = tokenizers.Tokenizer.from_file(str(file))
        return Tokenizer(lambda text: found.encode(text).ids, found.decode)
    if config.vocab_size != VOCAB:
        raise ValueError(f"{folder} has no tokenizer.json, which its model needs")
    return Tokenizer(
        lambda text: [END, *text.encode()],
        lambda tokens: bytes(t for t in tokens if t != END).decode(errors="replace"),
    )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m examples.generate", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("checkpoint", type=Path, help="the folder")
    parser.add_argument("prompt", help="the text to continue")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=0.7, help="0 is greedy")
    parser.add_argument("--top-p", type=float, default=0.95)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    try:
        sampling = SamplingParams(
            options.temperature, top_p=options.top_p, seed=options.seed
        )
        model = load(options.checkpoint)
        tokenizer = tokenizer_of(options.checkpoint, model.config)
        engine = Engine(model, num_slots=1, max_tokens_per_step=256)
        generation = engine.submit(
            Request(
                prompt=tokenizer.encode(options.prompt),
                max_new_tokens=options.max_new_tokens,
                sampling=sampling,
                stop_token_ids=stop_tokens(model.config.eos_token_id),
            )
        )
    except (FileNotFoundError, ImportError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    engine.run()
    text = tokenizer.decode([*generation.prompt.tolist(), *generation.tokens])
    print(printable(text))
    return 0


if __name__ == "__main__":
    sys.exit(main())
