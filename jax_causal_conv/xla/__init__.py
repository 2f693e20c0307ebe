"""The ops in XLA: the readable truth, and the path for CPUs and TPUs."""
