"""Mamba2 language models: load, train and serve."""
