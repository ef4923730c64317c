"""What is measured, in four wings.

speed     times the package against the reference and other packages, checked for correctness first
compiled  reads the compiled kernels without a GPU, and bounds what a device can do from that
gpu       an unattended run on a GPU: the tests, the benchmark, a sweep over launch shapes
theory    measures what the documents claim

gpu imports speed and compiled, speed imports compiled; compiled and theory import no other wing. `paths`, `charts` and
`tables` are for all. The other modules are the commands, `python -m bench.NAME`.
"""
