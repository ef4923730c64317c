"""The kernels as compiled, read without a GPU, and the bounds that follow.

entry    which kernels are read, in which configurations
build    compiles an entry for a target
machine  finds the loops of the machine code and counts what they do
offsets  finds row offsets that are computed in 32 bits
report   what was read of one entry, as rows
check    these rows against the committed ones (bench/results/codegen.csv) and against absolute budgets
command  `python -m bench.codegen`
bounds   the least time that a device can take
"""
