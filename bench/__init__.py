"""The benchmark suite: `python -m bench` checks correctness, then times the reference against the package."""
