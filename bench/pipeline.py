"""`python -m bench.pipeline` times `optsample generate` against a loop over the reference: bench/speed/pipeline.py."""

from bench.speed.pipeline import main

if __name__ == "__main__":
    raise SystemExit(main())
