"""Ablations: seeds x hyper-parameters x data sets, the members of each group in one compiled program.

    from jaxad import sweep
    table = sweep.run("METHOD", "synthetic", grid={"learning_rate": [1e-4, 3e-4]}, seeds=4, preset="tiny")

`grid` says which members there are, `stack` puts their data on the device, `member` is one member's whole run as pure
functions, `engine` computes groups of them, `stats` and `report` say what came out.
"""

from jaxad.sweep.api import run, run_request
from jaxad.sweep.engine import Limits
from jaxad.sweep.grid import Request

__all__ = ["Limits", "Request", "run", "run_request"]
