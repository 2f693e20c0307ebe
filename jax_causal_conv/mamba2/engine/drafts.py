"""Guesses of the next tokens, which the model verifies several of in one step.

The model draws a token after each of the guesses, as it would without them: with the
same seed and position from the same distribution. As long as what it draws is what was
guessed, it has drawn the next token too; the first one that differs is the last. So a
request gets the very tokens that it gets without drafts, drawn ones as well as greedy
ones. For guesses that are tokens rather than distributions this is the usual rule of
speculative sampling (accept x with the probability p(x), and draw from the rest
otherwise) in other words.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence, Set
from typing import Any, NamedTuple

import numpy as np

from ..sampling import SamplingParams
from .requests import Generation, Request
from .validation import brief, items_of


class DraftRequest(NamedTuple):
    """A request whose next tokens are to be guessed.

    Attributes:
        tokens: `(L,)` int32, read-only: its prompt and what it has drawn.
        limit: how many guesses there may be at most, >= 1.
        sampling: how it draws, with its seed: who draws the token at position L + i
            with `sample` from a similar distribution is likely to draw the same.
    """

    tokens: np.ndarray
    limit: int
    sampling: SamplingParams


# How many of the last tokens are searched for a repetition before all others.
RECENT = 256

# Guesses for each of the requests: at most `limit` tokens, none if it has no idea.
Draft = Callable[[Sequence[DraftRequest]], Sequence[Sequence[int] | np.ndarray]]


@dataclasses.dataclass(frozen=True)
class NgramDraft:
    """Guesses that what followed the last few tokens before will follow again.

    For texts that repeat themselves or their prompts: code, summaries, answers to
    questions about a document. Costs no model.

    Attributes:
        longest: so many last tokens are looked for at first,
        shortest: and down to so many where they do not occur. The latest occurrence
            that is followed by as many tokens as are wanted counts, else the first.

    Raises:
        ValueError: not 1 <= shortest <= longest.
    """

    longest: int = 4
    shortest: int = 2

    def __post_init__(self):
        if not 1 <= self.shortest <= self.longest:
            raise ValueError(
                "shortest must be in [1, longest], got "
                f"{self.shortest} and {self.longest}"
            )

    def __call__(self, requests: Sequence[DraftRequest]) -> list[np.ndarray]:
        """Guesses for each of the requests."""
        return [self._continue(request) for request in requests]

    def _continue(self, request: DraftRequest) -> np.ndarray:
        tokens, limit = request.tokens, request.limit
        # A text that goes round in circles has all of them just before: its bytes say
        # so at once. (What is found between two tokens does not count.)
        start, width = max(len(tokens) - RECENT, 0), tokens.itemsize
        recent = tokens[start:].tobytes()
        before = max(len(recent) - limit * width, 0)
        place = recent.rfind(recent[-self.longest * width :], 0, before)
        if place >= 0 and place % width == 0:
            first = start + place // width + self.longest
            return tokens[first : first + limit]
        # Whether the last `size` tokens begin at a place before, too: a byte for each,
        # as bytes are searched in less time than arrays.
        size, same = 1, tokens[:-1] == tokens[-1]
        begins = same.tobytes()
        while size < self.longest and 1 in begins:
            same = same[1:] & (tokens[: -1 - size] == tokens[-1 - size])
            if 1 not in (longer := same.tobytes()):
                break
            begins, size = longer, size + 1
        if size < self.shortest or 1 not in begins:
            return tokens[:0]
        latest = begins.rfind(1, 0, max(len(tokens) - limit - size + 1, 0))
        first = size + (latest if latest >= 0 else begins.find(1))
        return tokens[first : first + limit]


class ModelDraft:
    """Guesses what a smaller model draws, with the same seeds.

    It is served by an engine of its own, with a prefix cache: the snapshot that a text
    leaves is where its continuation starts from, whatever was rejected.
    """

    def __init__(self, engine: Any):
        self.engine = engine
        self._asked: list[Generation] = []

    def __call__(self, requests: Sequence[DraftRequest]) -> list[list[int]]:
        """Guesses for each of the requests."""
        for generation in self._asked:  # left over from an interrupted call
            self.engine.cancel(generation.id)
        self._asked = []
        for tokens, limit, sampling in requests:
            self._asked.append(self.engine.submit(Request(tokens, limit, sampling)))
        self.engine.run()
        return [generation.tokens for generation in self._asked]


class Text:
    """A prompt and what has been drawn, in an array with room for more.

    Only what is new is converted. What has been returned stays as it is, since there
    are only ever tokens added to it.
    """

    def __init__(self, prompt: np.ndarray):
        self._room = np.resize(prompt, 2 * len(prompt))
        self._start = self._end = len(prompt)

    def followed_by(self, tokens: list[int]) -> np.ndarray:
        """The prompt and all of these, read-only."""
        end = self._start + len(tokens)
        if end > len(self._room):
            self._room = np.resize(self._room, 2 * end)
        self._room[self._end : end] = tokens[self._end - self._start :]
        self._end = end
        text = self._room[:end]
        text.setflags(write=False)
        return text


class Drafting:
    """Asks a draft, and checks what it says.

    Attributes:
        draft: the draft.
        most: how many guesses a request may get in a step.
    """

    def __init__(self, draft: Draft, most: int, vocab_size: int):
        self.draft = draft
        self._vocab_size = vocab_size
        self.most = most
        self._texts: dict[int, Text] = {}  # of the last call, by number

    def ask(self, generations: Iterable[Generation]) -> dict[int, list[int]]:
        """Guesses by the number of the request.

        Where the draft fails, the requests concerned go on without drafts, and the
        error is raised.
        """
        asked, texts = {}, {}
        for generation in generations:
            left = generation.terms.max_new_tokens - len(generation.tokens)
            limit = min(self.most, left - 1)  # the model draws one more
            if generation.drafts and not generation.prompt_left and limit > 0:
                text = self._texts.get(generation.id) or Text(generation.prompt)
                texts[generation.id] = text
                tokens = text.followed_by(generation.tokens)
                asked[generation] = DraftRequest(tokens, limit, generation.sampling)
        self._texts = texts
        if not asked:
            return {}
        concerned = list(asked)
        try:
            guesses = self.draft(list(asked.values()))
            if not isinstance(guesses, Sequence) or len(guesses) != len(asked):
                raise TypeError(
                    f"the draft must return a sequence of {len(asked)}, one item per "
                    f"request, got {brief(guesses)}"
                )
            checked = {}
            for (generation, request), guess in zip(
                asked.items(), guesses, strict=True
            ):
                concerned = [generation]
                checked[generation.id] = self._check(generation.id, guess, request)
        except Exception as error:
            for generation in concerned:
                generation.drafts = False
            numbers = [generation.id for generation in concerned]
            error.add_note(f"The requests {numbers} go on without drafts.")
            raise
        return checked

    def _check(self, id: int, guess: Any, request: DraftRequest) -> list[int]:
        name = f"the draft for request {id}"
        what = f"at most {request.limit} tokens in [0, {self._vocab_size})"
        items = items_of(name, guess, what, refused=(Set,))
        tokens = items.tolist() if isinstance(items, np.ndarray) else items
        if len(tokens) > request.limit:
            raise ValueError(f"{name} must be {what}, got {len(tokens)}")
        if outside := [t for t in tokens if not 0 <= t < self._vocab_size]:
            raise ValueError(f"{name} must be {what}, got {min(outside)}")
        return tokens
