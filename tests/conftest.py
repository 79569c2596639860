"""Set-up shared by all tests: four virtual CPU devices, a compile cache, and the paths of real data."""

import gc
import os
import pathlib
import tempfile

# Before jax is imported. With fewer cores than virtual devices XLA's thread pool deadlocks in collectives unless
# NPROC is raised.
os.environ.setdefault("NPROC", "16")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
_FLAGS = "--xla_force_host_platform_device_count=4 --xla_cpu_collective_call_terminate_timeout_seconds=300"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAGS}".strip()
_CACHE = pathlib.Path(os.environ.get("JAXAD_TEST_CACHE", pathlib.Path(tempfile.gettempdir()) / "jaxad-test-cache"))
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHE / "xla"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
os.environ["JAXAD_CACHE"] = str(_CACHE / "jaxad")

import jax  # noqa: E402
import pytest  # noqa: E402

_MAPS = pathlib.Path("/proc/self/maps")  # of Linux
_MANY = 20_000  # mappings; the kernel's limit is 65,530, and every compiled program takes dozens


@pytest.fixture(autouse=True)
def few_mappings():
    """Lets go of compiled programs when they are many: at the kernel's limit XLA dies while it loads the next one."""
    yield
    if _MAPS.exists() and _MAPS.read_bytes().count(b"\n") > _MANY:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session")
def shared() -> pathlib.Path:
    """The folder with real pictures and weights, named by JAXAD_SHARED; tests that need it are skipped without."""
    where = os.environ.get("JAXAD_SHARED")
    if not where:
        pytest.skip(
            "real data not given: set JAXAD_SHARED to a folder with data/mvtec/bottle (MVTec AD, mvtec.com), "
            "data/magnetic_tile, data/ucsd_ped2 and data/mnist"
        )
    path = pathlib.Path(where).resolve()
    if not (path / "data").is_dir():
        pytest.fail(f"JAXAD_SHARED={where} has no folder 'data'")
    return path
