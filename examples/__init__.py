"""Programs that use the package; in a clone, `python -m examples.NAME` runs them."""
