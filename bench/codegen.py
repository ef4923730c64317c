"""`python -m bench.codegen` reads the kernels as compiled, without a GPU: bench/compiled/command.py."""

from bench.compiled.command import main

if __name__ == "__main__":
    raise SystemExit(main())
