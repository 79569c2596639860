"""Set-up shared by all tests: four virtual CPU devices, a compile cache, and the paths of real data."""

import gc
import importlib.metadata
import os
import pathlib
import tempfile

# Before jax is imported. With fewer cores than virtual devices XLA's thread pool deadlocks in collectives unless
# NPROC is raised.
os.environ.setdefault("NPROC", "16")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
_FLAGS = "--xla_force_host_platform_device_count=4 --xla_cpu_collective_call_terminate_timeout_seconds=300"
_FLAGS = f"{os.environ.get('XLA_FLAGS', '')} {_FLAGS}".strip()
# XLA's older code generator is done sooner; gone in jaxlib 0.11.
_SOONER = "--xla_cpu_use_fusion_emitters=false" if importlib.metadata.version("jaxlib").startswith("0.10.") else ""
os.environ["XLA_FLAGS"] = f"{_FLAGS} {_SOONER}"
_CACHE = pathlib.Path(os.environ.get("JAXAD_TEST_CACHE", pathlib.Path(tempfile.gettempdir()) / "jaxad-test-cache"))
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHE / "xla"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
os.environ["JAXAD_CACHE"] = str(_CACHE / "jaxad")

import jax  # noqa: E402
import pytest  # noqa: E402

jax.devices()  # reads the flags; the TPU's compiler ends a process over one that it does not know
os.environ["XLA_FLAGS"] = _FLAGS
# Most tests run a program once or twice: compiling it well takes longer than it saves. See the mark `optimised`.
jax.config.update("jax_disable_most_optimizations", True)

_MAPS = pathlib.Path("/proc/self/maps")  # of Linux
_MANY = 20_000  # mappings; the kernel's limit is 65,530, and every compiled program takes dozens


@pytest.fixture
def compiled_alike() -> dict[str, str]:
    """The environment of a process whose programs round as those of tests do that compile without optimisations."""
    return {**os.environ, "XLA_FLAGS": f"{_FLAGS} {_SOONER}", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}


@pytest.fixture(autouse=True)
def few_mappings():
    """Lets go of compiled programs when they are many: at the kernel's limit XLA dies while it loads the next one."""
    yield
    if _MAPS.exists() and _MAPS.read_bytes().count(b"\n") > _MANY:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(autouse=True)
def optimisations(request):
    """Compiles as users do where a test is marked so, and for TPUs, where what the compiler says is looked at."""
    wanted = any(request.node.get_closest_marker(name) for name in ("optimised", "tpu_aot"))
    jax.config.update("jax_disable_most_optimizations", not wanted)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


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
