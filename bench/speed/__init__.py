"""What is timed, and against whom.

cases, inputs     what is timed: sizes, and the logits that go with them
works             what the package does in a case; judges says whether it is right, before it is timed
listed, peers     against whom: the documents' functions, and other packages
timing, run       how: one case, from its check to its times
results, goals    result files, and what was to be reached
expected          the bounds of cases on GPUs
table, plot, page_tables  what is shown
command           `python -m bench`; pipeline, sweeps and token_logprobs have commands of their own
"""
