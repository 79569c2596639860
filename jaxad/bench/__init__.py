"""Benchmarks that cannot fool themselves: one harness for methods, ops and metrics.

    case.py      the vocabulary: Case, Contender, and how outputs are compared
    program.py   a compiled program with what XLA and its jaxpr say of it: FLOPs, bytes, memory
    machine.py   ceilings of this machine, measured; peak memory as seen; versions
    race.py      runs the contenders of a case in turn and refuses wrong outputs and un-synced timings
    methods.py   the cases of a method: each training phase, and scoring
    report.py    the record as JSON, tables, and the comparison with an older record
    __main__.py  `python -m jaxad.bench`, for checkouts without the command line's packages

`jaxad bench` and `python -m jaxad.bench` call `jaxad.bench.__main__.bench`.
"""
