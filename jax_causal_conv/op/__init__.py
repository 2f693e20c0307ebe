"""From a public op's checked arguments to the implementation that computes it."""
