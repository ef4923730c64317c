"""`python -m bench` checks correctness, then times, as a table: bench/speed/command.py."""

from bench.speed.command import main

if __name__ == "__main__":
    raise SystemExit(main())
