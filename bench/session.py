"""`python -m bench.session` runs tests, benchmark and sweep on a GPU, unattended: bench/gpu/session.py."""

from bench.gpu.session import main

if __name__ == "__main__":
    raise SystemExit(main())
