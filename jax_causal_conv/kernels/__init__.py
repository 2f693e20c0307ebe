"""The Triton kernels, their launches, and the bridge to jax-triton.

Importing anything below this package needs Triton; nothing above imports it before
a kernel is really lowered or interpreted.
"""
