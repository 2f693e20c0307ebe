"""The Triton kernels, and how they get from an op's arrays to the GPU.

`launch` yields an op's launches (`record`) of the kernels, with `tiles`; `bridge` hands
each to jax-triton, or `interpreter` to Triton's interpreter, by way of an `entry`.
`lowered` reads what has come of it.

`tiles`, `record` and `lowered` may be imported anywhere. The others need Triton;
nothing above imports them before a kernel is really lowered or interpreted.
"""
