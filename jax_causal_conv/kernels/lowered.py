"""Reads Triton kernels out of a lowered program, as they would run."""

import dataclasses
import re
import zlib
from collections.abc import Iterator
from typing import Any

_CUSTOM_CALLS = ("triton_kernel_call", "triton_kernel_call_ffi")


@dataclasses.dataclass(frozen=True)
class LoweredKernel:
    """A Triton kernel as it is embedded in a lowered program.

    Attributes:
        name: of the kernel function.
        ptx: its code.
        num_warps: warps per program.
        grid: number of programs.
    """

    name: str
    ptx: str
    num_warps: int
    grid: int

    @property
    def ptx_version(self) -> str:
        """For example "8.0"."""
        return self._directive("version")

    @property
    def target(self) -> str:
        """For example "sm_90a"."""
        return self._directive("target")

    def _directive(self, name: str) -> str:
        match = re.search(rf"^\.{name}\s+([\w.]+)", self.ptx, re.MULTILINE)
        return match.group(1) if match else "unknown"


def lowered_kernels(lowered: Any) -> list[LoweredKernel]:
    """The Triton kernels in a `jax.stages.Lowered`, in program order.

    They are read out of the custom calls themselves, so what is looked at is what
    would run.
    """
    return [
        _decode_kernel(_payload(op))
        for op in _operations(lowered.compiler_ir("stablehlo").operation)
        if op.name == "stablehlo.custom_call"
        and op.attributes["call_target_name"].value in _CUSTOM_CALLS
    ]


def _operations(op: Any) -> Iterator[Any]:
    for region in op.regions:
        for block in region.blocks:
            for inner in block.operations:
                yield inner.operation
                yield from _operations(inner.operation)


def _payload(op: Any) -> bytes:
    """The serialised kernel call: jax-triton 0.3 has it bare, 0.4 as a named field."""
    if "mhlo.backend_config" in op.attributes:
        opaque = op.attributes["mhlo.backend_config"]["opaque"]
    else:
        opaque = op.attributes["backend_config"]
    return zlib.decompress(opaque.value_bytes)


def _decode_kernel(payload: bytes) -> LoweredKernel:
    """Reads TritonAnyKernelCall > TritonKernelCall > TritonKernel of jaxlib."""
    call = dict(_protobuf_fields(dict(_protobuf_fields(payload))[1]))
    kernel = dict(_protobuf_fields(call[1]))
    return LoweredKernel(kernel[1].decode(), kernel[4].decode(), kernel[2], call[2])


def _protobuf_fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """(field number, int or bytes) of one message in protobuf's wire format."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    fixed_sizes = {1: 8, 5: 4}
    while at < len(data):
        number, wire_type = divmod(varint(), 8)
        if wire_type == 0:
            yield number, varint()
            continue
        size = varint() if wire_type == 2 else fixed_sizes[wire_type]
        yield number, data[at : at + size]
        at += size
