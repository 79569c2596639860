"""What this machine can do, measured in the process that measures the rest: ceilings and memory."""

from __future__ import annotations

import functools
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxad import allocator
from jaxad.cores import usable_cores

_SIZES = {"cpu": (2048, (8, 64, 128), 1 << 26)}  # matrix; pictures, pixels a side, channels; bytes copied
_ACCELERATOR = (8192, (64, 64, 256), 1 << 30)
_REPEATS = 3


class Ceilings:
    """The best rates seen in this process, by dtype: FLOP/s of "product" and "convolution", bytes/s of "copy"."""

    def __init__(self) -> None:
        self.best: dict[str, dict[str, float]] = {}

    def measure(self, dtype: str) -> dict[str, float]:
        """Measures once more; before and after each case, since a shared machine is not always equally fast."""
        best = self.best.setdefault(dtype, {})
        for name, (function, argument, amount) in _tests(dtype, jax.default_backend()).items():
            for _ in range(_REPEATS):
                began = time.perf_counter()
                jax.block_until_ready(function(argument))
                best[name] = max(best.get(name, 0.0), amount / (time.perf_counter() - began))
        return dict(best)


@functools.cache
def _tests(dtype: str, backend: str) -> dict[str, tuple[Callable, Any, float]]:
    """name -> (compiled program, its argument, FLOPs or bytes)."""
    side, (batch, pixels, channels), size = _SIZES.get(backend, _ACCELERATOR)
    numbers = np.random.default_rng(0)

    def draw(*shape):
        return jnp.asarray(numbers.standard_normal(shape, np.float32), dtype)

    kernel = draw(3, 3, channels, channels)

    def convolve(image):
        layout = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(image, kernel, (1, 1), "SAME", dimension_numbers=layout)

    matrix, image = draw(side, side), draw(batch, pixels, pixels, channels)
    held = [jnp.zeros(size // 4, jnp.float32)]
    add_one = jax.jit(lambda x: x + 1, donate_argnums=0)  # in place: new memory would be paid for page by page

    def copy(_):
        held[0] = add_one(held[0])
        return held[0]

    tests: dict[str, tuple[Callable, Any, float]] = {
        "product": (jax.jit(lambda x: x @ x), matrix, 2.0 * side**3),
        "convolution": (jax.jit(convolve), image, 2.0 * image.size * 9 * channels),
        "copy": (copy, None, 2.0 * size),
    }
    for function, argument, _ in tests.values():
        jax.block_until_ready(function(argument))
    return tests


class PeakMemory:
    """Peak memory while the body runs: `bytes` above what was held at the start, and `how` it was seen.

    None where it cannot be told: the peak of an accelerator never falls, so a smaller one hides behind a larger.
    """

    bytes: int | None = None
    how = "device"

    def __enter__(self) -> PeakMemory:
        self._stats = jax.local_devices()[0].memory_stats
        if self._stats() is None:
            self.how = "resident set" if _reset_peak() else "unknown"
            self._start = _status("VmRSS")
        else:
            self._start, self._before = self._stats()["bytes_in_use"], self._stats()["peak_bytes_in_use"]
        return self

    def __exit__(self, *error: object) -> None:
        if self.how == "device":
            peak = self._stats()["peak_bytes_in_use"]
            self.bytes = peak - self._start if peak > self._before else None
        elif self.how == "resident set":
            self.bytes = max(_status("VmHWM") - self._start, 0)


def _reset_peak() -> bool:
    """Linux forgets the largest resident set of this process when told so. Freed memory is given back first."""
    allocator.give_back()  # glibc's; what another one keeps hides a part of the growth
    try:
        pathlib.Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _status(field: str) -> int:
    try:
        lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), 0)


class OtherLoad:
    """How busy other programs keep the processors while the body runs: `share` of their time, None where not told."""

    share: float | None = None

    def __enter__(self) -> OtherLoad:
        self._start = _processor_seconds()
        return self

    def __exit__(self, *error: object) -> None:
        if self._start is not None and (end := _processor_seconds()) is not None:
            everyone, own, idle = (after - before for before, after in zip(self._start, end, strict=True))
            self.share = max(everyone - own, 0.0) / max(everyone + idle, 1e-9)


def _processor_seconds() -> tuple[float, float, float] | None:
    """Seconds since the start: of all programs, of this one and its children, and idle; Linux knows."""
    try:
        fields = pathlib.Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
    except OSError:
        return None
    user, nice, system, idle, waiting, *rest = (int(n) / os.sysconf("SC_CLK_TCK") for n in fields)
    own = os.times()
    return user + nice + system + sum(rest), sum(own[:4]), idle + waiting


def environment() -> dict[str, Any]:
    """Versions, device and commit of a record; torch's and scikit-learn's versions where they are loaded."""
    from jaxad import files

    facts = files.environment()
    facts["command"] = ["/".join(pathlib.Path(sys.argv[0]).parts[-2:]), *sys.argv[1:]]  # no folders of this machine
    facts["commit_modified"] = _is_modified()
    facts["backend"] = jax.default_backend()
    facts["threads"] = usable_cores()
    for name in ("torch", "sklearn", "scipy"):
        if sys.modules.get(name) is not None:
            facts["versions"][name] = sys.modules[name].__version__
    return facts


def _is_modified() -> bool | None:
    """Whether the package's files differ from those of the commit that the record names; None outside a checkout."""
    package = str(pathlib.Path(__file__).parents[1])
    command = ["git", "-C", package, "status", "--porcelain", "--untracked-files=no", "."]
    try:
        return bool(subprocess.run(command, capture_output=True, timeout=5, check=True).stdout)
    except (OSError, subprocess.SubprocessError):
        return None
