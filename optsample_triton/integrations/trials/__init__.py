"""The smallest real use of each framework, for `optsample doctor`: tiny random models on this machine, no download.

Each module prints what it tried, or ends with an exception. The doctor runs it in a process of its own, so that what a
framework sets, logs or breaks stays there.
"""
