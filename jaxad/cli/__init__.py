# ruff: noqa: I001
"""The command line. Nothing heavy is imported before a command needs it: `jaxad --help` knows no jax."""

from __future__ import annotations

import os
import sys

from jaxad import allocator, cache
from jaxad.cli import run, sweep, bench, facts  # noqa: F401 - each registers its verbs, in the order of the help
from jaxad.cli.app import app

_FAILED, _INTERRUPTED = 2, 130


def _use_compile_cache() -> None:
    """Compiled programs outlive the process, unless JAXAD_CACHE=off or jax was told where to keep them."""
    folder = cache.folder("xla")
    if folder is None:
        return
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")


def main(arguments: list[str] | None = None) -> None:
    """Runs a command; what the user got wrong is one line on standard error and exit status 2."""
    _use_compile_cache()
    if arguments is None:  # a process of our own
        allocator.keep_freed_memory()
    try:
        app.cli(prog="jaxad", description="Image anomaly detection in JAX.", args=arguments)
    except BrokenPipeError:  # whoever read our output, such as `head`, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (ValueError, OSError) as error:
        if os.environ.get("JAXAD_DEBUG"):
            raise
        print(f"jaxad: {error}", file=sys.stderr)
        sys.exit(_FAILED)
    except KeyboardInterrupt:
        print("jaxad: interrupted", file=sys.stderr)
        sys.exit(_INTERRUPTED)
