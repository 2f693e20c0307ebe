"""`python -m jax_causal_conv.mamba2.generate FOLDER --prompt TEXT`: continues a text.

The folder holds a checkpoint that `load` reads and its tokenizer.json, which the
package `tokenizers` reads. A model over bytes (a vocabulary of 256) needs no tokenizer.
Nothing is downloaded.
"""

import argparse
import codecs
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .checkpoint import CONFIG, load
from .config import Mamba2Config
from .engine import Engine, Event, Request
from .sampling import SamplingParams

__all__ = ["main", "printable", "stop_tokens", "stream", "text_of"]

TOKENIZER = "tokenizer.json"
BYTES = 256  # the vocabulary of a model whose tokens are bytes

_EXAMPLE = """\
The model that examples/train.py of the repository trains needs no tokenizer:
  python -m jax_causal_conv.mamba2.generate mamba2-bytes --prompt "The for statement"
"""


class Text(NamedTuple):
    """Between a model's tokens and text.

    Attributes:
        prompt: the tokens of the prompt.
        step: takes the next token and returns the text that it completes, often none,
            as a character may take several tokens.
    """

    prompt: list[int]
    step: Callable[[int], str]


def printable(text: str) -> str:
    """The text without control characters: no escape sequence reaches a terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


def stop_tokens(eos: int | tuple[int, ...] | None) -> tuple[int, ...]:
    """A config's end-of-text token, or tokens, as `Request` wants them."""
    if eos is None:
        return ()
    return eos if isinstance(eos, tuple) else (eos,)


def text_of(folder: Path, config: Mamba2Config, prompt: str) -> Text:
    """Reads the prompt with the folder's tokenizer, or as bytes.

    Raises:
        ImportError: there is a tokenizer, but the package `tokenizers` is missing.
        ValueError: there is none and the tokens are no bytes; or it cannot be read, or
            has more tokens than the model knows; or the prompt has no tokens.
    """
    start = [] if config.bos_token_id is None else [config.bos_token_id]
    if (folder / TOKENIZER).is_file():
        text = _tokenized(folder / TOKENIZER, config, prompt)
        text = text._replace(prompt=text.prompt or start)
    elif config.vocab_size == BYTES:
        text = _bytes(config, [*start, *prompt.encode()])
    else:
        raise ValueError(
            f"{folder} has no {TOKENIZER}, which a model with a vocabulary of "
            f"{config.vocab_size} tokens needs"
        )
    if not text.prompt:
        raise ValueError("--prompt has no tokens, and the model no token to start with")
    return text


def _tokenized(file: Path, config: Mamba2Config, prompt: str) -> Text:
    try:
        import tokenizers  # noqa: PLC0415 (needs the extra `generate`) (models over bytes do without)
        from tokenizers import decoders  # noqa: PLC0415 (extra "generate")
    except ModuleNotFoundError:
        raise ImportError(
            f'{file} needs tokenizers: pip install "jax-causal-conv[generate]"'
        ) from None
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the package raises no narrower one
        raise ValueError(f"{file} is no tokenizer: {error}") from None
    if (size := tokenizer.get_vocab_size()) > config.vocab_size:
        raise ValueError(
            f"{file} has {size} tokens, the model's vocabulary {config.vocab_size}"
        )
    stream = decoders.DecodeStream(skip_special_tokens=True)

    def step(token: int) -> str:
        # A vocabulary may be padded with tokens that mean nothing.
        if tokenizer.id_to_token(token) is None:
            return ""
        return stream.step(tokenizer, token) or ""

    tokens = tokenizer.encode(prompt).ids
    for token in tokens:  # what was read decides about spaces before what comes
        step(token)
    return Text(tokens, step)


def _bytes(config: Mamba2Config, prompt: list[int]) -> Text:
    # Bytes of a character come one by one; a young model's may be no UTF-8 at all.
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def step(token: int) -> str:
        return decoder.decode(bytes([token]))

    return Text(prompt, step)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m jax_causal_conv.mamba2.generate",
        description="Continues a text with a Mamba2 checkpoint from a local folder.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add: Callable[..., Any] = parser.add_argument
    add("folder", type=Path, help=f"of {CONFIG}, the weights and {TOKENIZER}")
    add("--prompt", required=True, help="the text to continue")
    add("--max-new-tokens", type=int, default=256, help="default: %(default)s")
    add("--temperature", type=float, default=0.7, help="0 is greedy (%(default)s)")
    add("--top-k", type=int, default=0, help="0 is off (%(default)s)")
    add("--top-p", type=float, default=0.95, help="1 is off (%(default)s)")
    add("--seed", type=int, default=0, help="the same draws the same (%(default)s)")
    return parser.parse_args(argv)


def stream(options: argparse.Namespace, write: Callable[[str], object]) -> None:
    """Writes the prompt, then the text that continues it, as it comes.

    Raises:
        ImportError, OSError, SafetensorError, TypeError, ValueError: nothing was
            written; the message says what is wrong.
    """
    folder = options.folder
    if not folder.is_dir():
        raise ValueError(f"no folder {folder}; a checkpoint must be a local folder")
    if not (folder / CONFIG).is_file():
        raise ValueError(f"{folder} has no {CONFIG}: it holds no checkpoint")
    sampling = SamplingParams(
        options.temperature, top_k=options.top_k, top_p=options.top_p, seed=options.seed
    )
    model = load(folder)
    text = text_of(folder, model.config, options.prompt)

    def on_event(event: Event) -> None:
        if event.token is not None and event.finish_reason != "stop":
            write(printable(text.step(event.token)))

    engine = Engine(model, num_slots=1, max_tokens_per_step=256)
    engine.submit(
        Request(
            prompt=text.prompt,
            max_new_tokens=options.max_new_tokens,
            sampling=sampling,
            stop_token_ids=stop_tokens(model.config.eos_token_id),
            on_event=on_event,
        )
    )
    write(printable(options.prompt))
    engine.run()


def main(argv: Sequence[str] | None = None) -> int:
    """The program: 0 if the text was written, 2 if something is wrong or missing."""
    options = parse(argv)
    try:
        stream(options, lambda text: print(text, end="", flush=True))
        print()
    except BrokenPipeError:  # who reads has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        print()
        return 130
    except (ImportError, OSError, TypeError, ValueError) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
