"""The processes of a run: found on every start, and none outlives another's death.

Every process runs the same program on its own devices, and process 0 alone writes. They decide
alike, since what they decide by is a result of the devices, or has come from process 0.
"""

import contextlib
import json
import os
import socket
import sys
import threading
import time
from typing import Any, cast

import jax
import numpy as np
from jax._src.distributed import global_state  # there is no other way to the address
from jax.experimental import multihost_utils

from revjax.training.errors import ConfigError, TrainingError

HEARTBEAT_SECONDS = 30  # after which JAX ends a process that waits for a machine out of reach
JOIN_SECONDS = 120
LEAVE_SECONDS = 120  # at the end JAX gives the last process so much longer than the first
HEARING_SECONDS = 5
GOODBYE = b"."


def join_processes(
    coordinator: str | None = None, number: int | None = None, process: int | None = None
) -> None:
    """Join the other processes of a run, if it has any; before JAX is used for anything else.

    Args:
        coordinator: "host:port" of process 0, whose port is free there.
        number: of processes.
        process: which of them this is, from 0.

    Where none of the three is given, `jax.distributed.initialize` looks for SLURM, Kubernetes, Open
    MPI and TPU pods, and for `JAX_COORDINATOR_ADDRESS`; where it finds nothing, this process is
    alone.

    Raises:
        ConfigError: some of the three are given and others are neither given nor found.
        TrainingError: the others cannot be reached.
    """
    jax.config.update("jax_enable_preemption_service", False)  # else SIGTERM is no longer ours
    given = (coordinator, number, process)
    try:
        jax.distributed.initialize(
            coordinator,
            number,
            process,
            initialization_timeout=JOIN_SECONDS,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=LEAVE_SECONDS,
        )
    except ValueError as error:
        if any(value is not None for value in given) or "coordinator_address" not in str(error):
            raise ConfigError(
                f"--coordinator={coordinator}, --processes={number} and --process={process}: "
                f"JAX refuses them ({error}); give all three, or none."
            ) from error
    except RuntimeError as error:
        if given == (None,) * 3 and "before any JAX calls" in " ".join(str(error).split()):
            return  # a process that has been using JAX is alone
        raise TrainingError(
            f"the run's other processes were not met within {JOIN_SECONDS} seconds "
            f"({str(error).splitlines()[0]}); start all at once, with the same --coordinator."
        ) from error
    if jax.process_count() > 1 and jax.default_backend() == "cpu":
        # With JAX 0.10.2 programs from it return garbage where processes exchange anything.
        jax.config.update("jax_enable_compilation_cache", False)


def is_first() -> bool:
    """Whether this is process 0, the one that writes."""
    return jax.process_index() == 0


def from_first(value: Any) -> Any:
    """What process 0 gives, in every process: anything that JSON holds."""
    if jax.process_count() == 1:
        return value
    text = json.dumps(value).encode()
    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    sent = np.frombuffer(text.ljust(length)[:length], np.uint8)
    return json.loads(bytes(np.asarray(multihost_utils.broadcast_one_to_all(sent))))


def arrays_from_first(tree: Any) -> Any:
    """The arrays of process 0, to the last bit, in every process, as numpy's.

    Args:
        tree: of arrays; in other processes only its structure, shapes and dtypes count.
    """

    def share(array: Any) -> np.ndarray:
        array = np.asarray(array)
        words = array.reshape(-1).view(np.uint8)  # a sum with zeros would lose the sign of -0.0
        words = np.asarray(multihost_utils.broadcast_one_to_all(words))
        return words.view(array.dtype).reshape(array.shape)

    return tree if jax.process_count() == 1 else jax.tree.map(share, tree)


class Companions:
    """Ends this process, with a sentence, as soon as another of the run has died.

    A process that waits for the devices of one that is gone would wait for ever. So process 0 has
    an open connection to each of the others, over which nothing is said but a goodbye: whose end
    comes without one has died. JAX's own heartbeat sees only that a machine is out of reach.

    In a `with` statement the goodbye is said at its end, unless an error ends it, and the others'
    is waited for. JAX aborts all processes where one comes to its end long before another, and
    process 0 has the last checkpoint still to write.
    """

    def __init__(self) -> None:
        """Connect; at once where there is one process."""
        self._connections: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._leaving = False
        if jax.process_count() == 1:
            return
        address = cast(str, global_state.coordinator_address)
        host = address.rpartition(":")[0].strip("[]")
        if is_first():
            listener = socket.create_server(("", 0))
            listener.settimeout(JOIN_SECONDS)
            from_first(listener.getsockname()[1])
            for _ in range(jax.process_count() - 1):
                connection, _ = listener.accept()
                self._watch(connection, int.from_bytes(connection.recv(4)))
            listener.close()
        else:
            port = from_first(None)
            connection = socket.create_connection((host, port), timeout=JOIN_SECONDS)
            connection.sendall(jax.process_index().to_bytes(4))
            self._watch(connection, 0)

    def _watch(self, connection: socket.socket, process: int) -> None:
        connection.settimeout(None)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self._connections.append(connection)
        thread = threading.Thread(target=self._listen, args=(connection, process), daemon=True)
        self._threads.append(thread)
        thread.start()

    def _listen(self, connection: socket.socket, process: int) -> None:
        try:
            said = connection.recv(1)
        except OSError:
            said = b""
        if said == GOODBYE or self._leaving:
            return
        sentence = (
            f"train.py: process {process} of the run has ended, and process {jax.process_index()} "
            "cannot go on without it; start all of them again, and the run goes on from its newest "
            "checkpoint.\n"
        )
        os.write(sys.stderr.fileno(), sentence.encode())
        os._exit(1)

    def __enter__(self) -> "Companions":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            if not is_first():
                self._say_goodbye()
            for thread in self._threads:
                thread.join()
            if is_first():  # it has heard all of the others, who leave when they hear it
                self._say_goodbye()
        elif issubclass(kind, (jax.errors.JaxRuntimeError, ValueError)):  # JAX's, not of our own
            # Perhaps since a device's process has died: then the thread that hears it ends this.
            deadline = time.monotonic() + HEARING_SECONDS
            for thread in self._threads:
                thread.join(max(0.0, deadline - time.monotonic()))
        self._leaving = True
        for connection in self._connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)  # at once, though its thread still has it
            connection.close()

    def _say_goodbye(self) -> None:
        for connection in self._connections:
            with contextlib.suppress(OSError):  # it has died, which its thread is about to say
                connection.sendall(GOODBYE)
