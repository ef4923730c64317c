"""The torch custom ops: schema, fake implementations and autograd. Each op picks its backend by the rows' device.

Rows arrive here as [N, V] or [outer, inner, V] with a contiguous last dimension. On the Triton backend the ops never
synchronise with the host, so that they can be compiled (fullgraph) and captured in a CUDA graph.
"""

from optsample_triton.ops import divergence as divergence  # importing a module defines its ops
from optsample_triton.ops import linear_logprob as linear_logprob
from optsample_triton.ops import logprob as logprob
from optsample_triton.ops import sample as sample
from optsample_triton.ops import solve as solve
from optsample_triton.ops import verify as verify
