"""`python -m bench.plot` draws the figures and writes the documents' tables: bench/speed/plot.py."""

from bench.speed.plot import main

if __name__ == "__main__":
    raise SystemExit(main())
