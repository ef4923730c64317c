"""An unattended run on a GPU.

session  runs the stages and writes how they ended: `python -m bench.session`
stages   the plan: what is run, for how long, with which tools
probe    small calls for the sanitizer, large ones for the profiler
warm     compiles in several processes what will be timed
tune     a sweep over launch shapes
"""
