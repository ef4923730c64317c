"""An executor of the PTX that Triton compiles: the kernels as GPUs get them, run on a CPU and watched.

The interpreter runs a kernel's Python, program by program, on whole tiles. What the compiler makes of it (layouts,
reductions through shared memory, barriers, masks, vector loads, the sharing of a row between programs) it never sees.
Here Triton's own front end compiles each launch, for sm_90 or another architecture, and instead of a GPU this package
executes the result with NumPy: registers are arrays over the threads of a few programs.

    python -m pytest --compiled -m "" tests/test_solve_cases.py

runs a file's tests that have a backend, with the backend "compiled"; without ``-m ""`` the few that tests/core.py
names. ``--arch 80`` or 100 chooses another architecture. The first run compiles each kernel, for seconds or a minute;
``driver.py`` says where the results are kept. docs/compiled.md says what was found: ``record.py`` keeps what a run
measured, and ``page.py`` makes the page's tables of it.

A launch fails with the line of PTX and of Python where it

* touches memory out of bounds, in the holes between rows, or off its alignment
* has a race in shared or global memory, between threads of a program or between programs. Programs are ordered by what
  they release and acquire (``order.py``), not by how they happened to run
* reads shared memory that nobody wrote, or lets a register that nobody wrote decide a store, an address or a branch
* shuffles a part of a warp, waits at a barrier that some threads never reach, or at two barriers at once
* contains an opcode, modifier or operand that ``opcodes.py`` does not spell out

Arithmetic is exact to the bit, with fused multiplications and flushed denormals. Where the manual grants an error, one
is chosen by a seed: of up to two units in the last place for exponentials (``arithmetic.py``). Every launch runs twice
(inside ``driver.running`` once), the second time with its programs in another order and number, and with other junk in
registers and shared memory: the results may not differ by a bit. ``machine.same_bits`` tries more orders. New tensors
are full of NaN, so that a result shows whether it read what nobody wrote.

It cannot see what ptxas makes of the PTX (its own fusing of a product and a sum, spills, the limit of registers), how
long anything takes, the true last bits of approximate instructions, the payload of a NaN, caches that are not coherent,
or a plain store that sets a counter back beside relaxed atomics of other programs. A loop that waits for another
program is a fault, since it need not end here. Tensor cores, asynchronous copies and AMD are not known.
"""
