"""Text as bytes, which needs no tokenizer: what the Mamba2 programs share."""

from pydoc_data.topics import topics

from jax_causal_conv.mamba2.generate import BYTES, printable, stop_tokens

__all__ = ["END", "VOCAB", "documents", "printable", "stop_tokens"]

VOCAB = BYTES  # a token is a byte
END = 0  # stands before and after every document; no text has it
HELD_OUT_EVERY = 8  # of the topics in alphabetical order


def documents() -> tuple[list[bytes], list[bytes]]:
    """The topics for training, and those held out.

    Topics repeat each other, so every paragraph is kept once, in a held-out topic if
    there is one that has it: nothing that is held out occurs in the training text.
    """
    names = sorted(topics)
    held_out = names[::HELD_OUT_EVERY]
    seen = set()

    def new_paragraphs(name: str) -> bytes:
        kept = []
        for paragraph in topics[name].split("\n\n"):
            words = tuple(paragraph.split())
            if words not in seen:
                seen.add(words)
                kept.append(paragraph)
        return "\n\n".join(kept).encode()

    evaluation = [new_paragraphs(name) for name in held_out]
    training = [new_paragraphs(name) for name in names if name not in held_out]
    return [text for text in training if text], [text for text in evaluation if text]
