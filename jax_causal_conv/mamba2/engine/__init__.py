"""Continuous batching for `Mamba2LM`: requests come and go, one jitted call per step.

A step packs one token of every decoding request and, within its budget of tokens, the
next chunks of the prompts that still wait. It runs the model over all of them and draws
the next tokens, in one executable with donated caches. Batches are padded to one of a
few shapes (`Bucket`), each of which is compiled once, by `Engine.warmup` or when it is
first used. On a GPU decodes are compiled once more without a sampler, for steps that
leave nothing to chance.

The newest token of each slot stays on the device, where the next step finds it. So the
engine can dispatch a step before the host knows what the previous one has drawn, and
the host works while the device does. The price is that a request which draws a stop
token has already been given a row in the next step. That row's result is thrown away.
With drafts, which need to know all tokens, each step waits for the one before it.

Where things are:

- `engine`: what a server calls, and a step from its plan to its events;
- `requests`, `validation`: what to generate, and the checks of it;
- `schedule`: who has a slot, who waits, who takes part in the next step;
- `buckets`, `batches`, `device`: shapes, arrays and the compiled step;
- `placement`: the mesh, if there is one, and what each device of it has;
- `prefixes`: snapshots of prompts, for forks and for prompts that begin alike;
- `drafts`: guesses of the next tokens, and the checks of them;
- `delivery`: events on their way to callbacks and to the caller;
- `recovery`: what holds after an interruption anywhere;
- `stats`: steps and finished requests, for reading.
"""

from .buckets import Bucket
from .drafts import DraftRequest, NgramDraft
from .engine import Engine
from .requests import Event, Generation, QueueFull, Request
from .stats import Stats, StepStats

__all__ = [
    "Bucket",
    "DraftRequest",
    "Engine",
    "Event",
    "Generation",
    "NgramDraft",
    "QueueFull",
    "Request",
    "Stats",
    "StepStats",
]
