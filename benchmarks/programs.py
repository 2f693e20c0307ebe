"""What there is to see in a lowered or compiled program."""

import re
from typing import Any


def implementation(lowered: Any) -> str:
    """Whose kernels a `jax.stages.Lowered` calls: "Triton", "Mosaic" or only "XLA"."""
    text = lowered.as_text()
    for name, call in (("Triton", "triton_kernel_call"), ("Mosaic", "mosaic_gpu")):
        if call in text:
            return name
    return "XLA"


def cache_copies(hlo: str, shape: tuple[int, ...]) -> int:
    """Copies and conversions of `shape`, or its rows flattened, in HLO text."""
    flat = (shape[0] * shape[1], shape[2])
    sizes = "|".join(re.escape(",".join(map(str, s))) for s in (shape, flat))
    return len(re.findall(rf"\[(?:{sizes})\]\S* (?:copy|(?:bitcast-)?convert)\(", hlo))


def peak_bytes(compiled: Any) -> int:
    """Memory of a `jax.stages.Compiled` as XLA plans it: arguments, results, between.

    Results that lie in donated arguments count once.
    """
    plan = compiled.memory_analysis()
    kept = plan.argument_size_in_bytes + plan.output_size_in_bytes
    return kept - plan.alias_size_in_bytes + plan.temp_size_in_bytes
