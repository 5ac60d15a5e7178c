"""The benchmark harness: contestants and cases as data, processes that take turns, results as JSON, tables and plots.

Start reading in ``cases.py``; ``benchmarks/run.py`` is the command.
"""
