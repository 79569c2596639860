"""Several processes as one run: who joins, who reads what, who writes, and how all of them end.

Every process runs the same command and the same programs, over the devices of all. What is not a program is shared out:

  * Reading: each of P processes decodes its P-th part of the pictures, and gets the others' decoded bytes from them,
    once, over the network. From there on the run is one of a single process with more devices, and equals it.
  * Writing: the first process writes the run folder. All of them write checkpoints into it, so they must see one file
    system there; a checkpoint knows nothing of how many wrote it.
  * Ending: what one process cannot go on after ends the others too, with its message (see `session`). A signal to any
    of them stops all of them after the same step, with a checkpoint (`agree`).

The processes find each other through JAX's own runtime: on TPU pods, Slurm, Kubernetes (indexed jobs) and Open MPI by
themselves, elsewhere by an address. Nothing here happens on import, and jax is imported only when it is needed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    import numpy as np

_FAILED = "jaxad/failed"  # the key under which a process says why it ends
_POLL = 1.0  # seconds between looks at it
_FOREVER = 10 * 24 * 3600 * 1000  # milliseconds
_ending = threading.Lock()  # taken by the thread that ends this process, and never given back: one message is enough


@dataclasses.dataclass(frozen=True)
class Cluster:
    """Several processes as one run; on TPU pods, Slurm, Kubernetes and Open MPI nothing need be given."""

    coordinator: str | None = None  # of a run on several machines: HOST:PORT of its first process
    processes: int | None = None  # that run this command; 1 keeps this one to itself, whatever a cluster says
    process: int | None = None  # which of them this is, from 0


def initialize(coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None) -> bool:
    """Joins the other processes of a run; to be called before jax computes anything.

    Args:
      coordinator: "host:port" of process 0. This and the others: None leaves it to the cluster's environment.
      num_processes: P; 1 keeps this process to itself whatever the environment says.
      process_id: from 0 to P - 1.

    Returns:
      Whether there are other processes. Where nothing is given and no cluster is detected, nothing is done.

    Raises:
      ValueError: flags that do not fit each other, or are missing where no cluster tells them.
    """
    import jax

    if num_processes == 1:
        return False
    given = (coordinator, num_processes, process_id)
    detected = _detect()
    if detected is None and given == (None, None, None):
        return False
    if detected is None and None in given:
        raise ValueError(
            f"--coordinator {coordinator}, --processes {num_processes}, --process {process_id}: no cluster was found "
            "that tells the rest; expected all three. Pass --coordinator HOST:PORT --processes P --process I, with I "
            "from 0 to P-1."
        )
    if coordinator is not None and not coordinator.rpartition(":")[2].isdigit():
        raise ValueError(
            f"--coordinator {coordinator} has no port; expected HOST:PORT. Pass --coordinator {coordinator}:1234."
        )
    if num_processes is not None and process_id is not None and not 0 <= process_id < num_processes:
        raise ValueError(
            f"--process {process_id} of --processes {num_processes}; expected 0 to {num_processes - 1}. "
            "Number the processes from 0."
        )
    # Its signal handler would swallow SIGTERM; runs have their own, on which all processes agree.
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(coordinator, num_processes, process_id)
    return jax.process_count() > 1


def _detect() -> int | None:
    """How many processes jax's detection finds in this environment; None: no cluster, or this process alone."""
    try:
        from jax._src.clusters import ClusterEnv
    except ImportError:  # jax has moved it: flags still work
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of clients that are not installed
        kinds = [kind for kind in ClusterEnv._cluster_types if not kind.opt_in_only_method]
        if "JOB_COMPLETION_INDEX" not in os.environ:  # only the pods of an indexed job belong together
            kinds = [kind for kind in kinds if kind.name != "k8s"]
        found = next((kind for kind in kinds if kind.is_env_present()), None)
        count = found.get_process_count() if found else 1
    return count if count > 1 else None


def check_alone(command: str) -> None:
    """Refuses to be one of several processes that a launcher has started, each of which would do the same.

    Raises:
      ValueError: a cluster is detected, see `initialize`.
    """
    found = _detect()
    if found is not None:
        raise ValueError(
            f"{command} was started as {found} processes, by Slurm, Open MPI or the like; expected one: each would do "
            f"the whole. Start it once (on Slurm: srun -n 1 jaxad {command} ...), and pass --workers N to share it out."
        )


def is_active() -> bool:
    """Whether this process is one of several."""
    return count() > 1


def count() -> int:
    """P, the processes of this run."""
    jax = _started()
    return jax.process_count() if jax else 1


def index() -> int:
    """Which of them this is, from 0."""
    jax = _started()
    return jax.process_index() if jax else 0


def is_first() -> bool:
    """Whether this process is the one that writes and talks."""
    return index() == 0


def _started() -> Any:
    """jax if it runs several processes. Asking jax itself would start its backend, after which none could join."""
    jax = sys.modules.get("jax")
    return jax if jax is not None and jax.distributed.is_initialized() else None


# --- sharing ------------------------------------------------------------------------------------------------------


def share(size: int) -> range:
    """The rows of `size` that this process reads: one run of neighbours each, of equal length but for the last."""
    length = -(-size // count())
    return range(min(index() * length, size), min((index() + 1) * length, size))


def gather(rows: np.ndarray) -> np.ndarray:
    """The rows of all processes in their order: (n_i, ...) on process i -> (sum of n_i, ...) on each.

    Every process calls it, with the same type and shape of a row.
    """
    if not is_active():
        return rows
    import numpy as np
    from jax.experimental import multihost_utils

    sizes = multihost_utils.process_allgather(np.int32(len(rows))).reshape(-1)
    padded = np.zeros((sizes.max(), *rows.shape[1:]), rows.dtype)
    padded[: len(rows)] = rows
    if not padded.size:
        return padded
    parts = multihost_utils.process_allgather(padded)
    return np.concatenate([part[:size] for part, size in zip(parts, sizes, strict=True)])


def gather_facts(facts: Sequence[Any]) -> list[Any]:
    """The same for a list of what JSON can write."""
    if not is_active():
        return list(facts)
    import numpy as np

    text = gather(np.frombuffer("".join(json.dumps(fact) + "\n" for fact in facts).encode(), np.uint8))
    return [json.loads(line) for line in text.tobytes().decode().splitlines()]


def agree(stop: bool, due: bool) -> tuple[bool, bool]:
    """What all processes act on: (whether any wants to stop, whether the first finds a checkpoint due)."""
    if not is_active():
        return stop, due
    import numpy as np

    wishes = gather(np.asarray([[stop, due]], np.uint8))
    return bool(wishes[:, 0].any()), bool(wishes[0, 1])


# --- ending -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def session(cluster: Cluster = Cluster()) -> Iterator[bool]:  # noqa: B008 - frozen
    """Joins the other processes for what is inside, and leaves together with them.

    An error inside, on any process, ends all of them at once: this one as usual with its message, the others with the
    same message and where it is from. Without that they would wait in their next exchange until a timeout.

    Yields:
      Whether there are other processes.

    Raises:
      ValueError: as from `initialize`. Errors inside pass through where there is one process.
    """
    if not initialize(cluster.coordinator, cluster.processes, cluster.process):
        yield False
        return
    watch = _Watch()
    try:
        yield True
    except SystemExit:  # agreed upon: every process gets here
        watch.leave()
        raise
    except BaseException as error:
        _end(error, watch)
    watch.leave()


def _end(error: BaseException, watch: _Watch) -> NoReturn:
    """Says what happened, here and to the others, and ends the process: its exit would wait for the others."""
    expected = isinstance(error, ValueError | OSError | KeyboardInterrupt) and not os.environ.get("JAXAD_DEBUG")
    text = " ".join(str(error).split()) or type(error).__name__
    _ending.acquire()
    if told := watch.look():  # what failed here is that another has gone
        _say_and_exit(told)
    if expected:
        print(f"jaxad: {text}", file=sys.stderr)
    else:
        traceback.print_exception(error)
    watch.tell(text)
    _exit(130 if isinstance(error, KeyboardInterrupt) else 2 if expected else 1)


def _say_and_exit(told: str) -> NoReturn:
    print(f"jaxad: process {told}", file=sys.stderr)
    if is_first():  # it serves the runtime, without which the others abort: it goes last
        time.sleep(3 * _POLL)
    _exit(2)


def _exit(status: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


class _Watch:
    """Looks every second whether another process has said that it ends."""

    def __init__(self):
        from jax._src import distributed  # there is no public way to the runtime's own key-value store

        self._client: Any = distributed.global_state.client
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._keep_looking, daemon=True)
        self._thread.start()

    def _keep_looking(self) -> None:
        while not self._left.wait(_POLL):
            told = self.look()
            if told and not self._left.is_set():
                _ending.acquire()
                _say_and_exit(told)

    def look(self) -> str | None:
        """Which process has ended and why, if any has said so."""
        with contextlib.suppress(Exception):  # nothing there; a lost runtime ends the process itself
            return self._client.key_value_try_get(_FAILED)
        return None

    def tell(self, text: str) -> None:
        """Ends the others with a message, and stays until they have had time to read it."""
        self._left.set()
        with contextlib.suppress(Exception):  # another was first, or nobody is left to tell
            self._client.key_value_set(_FAILED, f"{index()} ended: {text}")
        time.sleep((3 if is_first() else 2) * _POLL)

    def leave(self) -> None:
        """Waits for the others, still listening, and disconnects."""
        import jax

        with contextlib.suppress(Exception):
            self._client.wait_at_barrier("jaxad/end", _FOREVER)
        self._left.set()
        self._thread.join()
        jax.distributed.shutdown()
