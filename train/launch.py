"""Runs in several processes, before JAX is imported: which processes they are, and what is said when one of them ends.

`jpeft train` in several processes does its work in a child. JAX's runtime ends a process whose neighbours are gone by
SIGABRT, from a thread of its own, where Python has no say; the parent remains, and turns that into a message and an
exit code of which schedulers can make use.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
import threading
from collections.abc import Mapping
from types import FrameType

OTHER_ENDED = 75  # EX_TEMPFAIL of sysexits.h: the same command again may well succeed


@dataclasses.dataclass(frozen=True)
class Group:
    """The processes of a run: the address where the first one listens, how many, and which this one is.

    What is None JAX finds in the variables of SLURM, Open MPI or a TPU pod.
    """

    coordinator: str | None = None
    count: int | None = None
    number: int | None = None


def group_of(
    processes: str | None, number: int | None, coordinator: str | None, environment: Mapping[str, str]
) -> Group | None:
    """The processes that the options name, or else those that a launcher's variables show; None: this one alone.

    processes: a number, or "auto". Raises ValueError for options that do not fit together.
    """
    if processes is None:
        if number is not None:
            raise ValueError("--process-id: give --processes as well: how many there are in all")
        if not _launched(environment) and coordinator is not None:
            raise ValueError("--coordinator: give --processes as well: how many there are in all")
        return Group(coordinator) if _launched(environment) else None
    if processes == "auto":
        return Group(coordinator, None, number)
    if not processes.isdecimal() or int(processes) < 1:
        raise ValueError(f"--processes: {processes!r} is no positive whole number, and not auto")
    count = int(processes)
    if number is not None and not 0 <= number < count:
        raise ValueError(f"--process-id: {number} is not among the {count} processes, which count from 0")
    if count == 1:
        return None
    if not _launched(environment) and (number is None or coordinator is None):
        missing = "--process-id" if number is None else "--coordinator"
        raise ValueError(f"{missing}: no launcher that JAX knows has started this process, so give it")
    return Group(coordinator, count, number)


def _launched(environment: Mapping[str, str]) -> bool:
    """Whether a launcher that JAX knows has started several processes, of which this is one.

    TPU virtual machines say so only when they are asked over the network, which is what "auto" is for.
    """

    def more(name: str) -> bool:
        return environment.get(name, "").isdecimal() and int(environment[name]) > 1

    slurm = {"SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID"} <= environment.keys()
    open_mpi = "OMPI_MCA_orte_hnp_uri" in environment
    hosts = environment.get("TPU_PROCESS_ADDRESSES", environment.get("TPU_WORKER_HOSTNAMES", ""))
    return (
        (slurm and more("SLURM_NTASKS"))
        or (open_mpi and more("OMPI_COMM_WORLD_SIZE"))
        or "," in hosts
        or (bool(hosts) and more("MEGASCALE_NUM_SLICES"))
    )


def supervised() -> int | None:
    """Goes on in a child process, where it returns None; in this one it returns the child's exit code at its end.

    Signals are passed on to the child, and it does not outlive this process.
    """
    reading, writing = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if not child:
        os.close(writing)
        # A group of its own: Ctrl-C in a terminal comes once, by way of the parent.
        os.setpgid(0, 0)
        threading.Thread(target=_end_with_parent, args=(reading,), daemon=True).start()
        return None
    os.close(reading)

    def pass_on(number: int, _: FrameType | None) -> None:
        os.kill(child, number)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, pass_on)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code == -signal.SIGABRT:
        print(
            "error: the run ended here because another of its processes ended, or was not heard of for "
            "mesh.heartbeat_timeout seconds: what it printed itself says why. The same command in every process goes "
            "on from the last checkpoint",
            file=sys.stderr,
        )
        return OTHER_ENDED
    if code < 0:
        name = signal.Signals(-code).name
        hint = ", as when memory runs out" if code == -signal.SIGKILL else ""
        print(f"error: this process of the run was ended by {name}{hint}", file=sys.stderr)
        return 128 - code
    return code


def _end_with_parent(reading: int) -> None:
    os.read(reading, 1)  # returns when the other end, which only the parent holds, is closed
    os._exit(128 + signal.SIGKILL)
