"""Reports and measurements; run them from the repository's root with `python -m`."""
