"""Many simulated hosts (see `bench.hosts`) in a few processes, and what they say of themselves."""

import contextlib
import multiprocessing
import time
from collections import Counter
from collections.abc import Sequence
from ipaddress import IPv4Network
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Self

from bench.hosts import State, Tally, checksum, ip_of, serve

# Seconds until a process that does not answer is given up.
_ANSWER = 120.0


class Fleet:
    """Many hosts in a few processes. A context manager: they end with it."""

    def __init__(
        self,
        endpoints: str,
        prefix: str,
        count: int,
        processes: int,
        previous: dict[int, IPv4Network] | None = None,
    ) -> None:
        """``previous``: the subnets that the hosts' subnet files name."""
        known = previous or {}
        # spawn: a fork would copy the parent's threads' locks.
        context = multiprocessing.get_context("spawn")
        self._pipes: list[Connection] = []
        self._processes = []
        for share in range(processes):
            hosts = {n: known.get(n) for n in range(share, count, processes)}
            ours, theirs = context.Pipe()
            process = context.Process(
                target=serve, args=(theirs, endpoints, prefix, hosts), daemon=True
            )
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)
        self._cpu = 0.0
        self.tally()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # Whoever was interrupted does not wait until thousands of threads have ended.
        if kind is None:
            with contextlib.suppress(OSError, EOFError, TimeoutError):
                self._ask("stop")
        for process in self._processes:
            if kind is None:
                process.join(5.0)
            process.kill()
            process.join()

    def start(self) -> float:
        """All hosts begin at one instant; return it (time.monotonic())."""
        when = time.monotonic() + 0.5
        self._ask("open", when)
        return when

    def renew(self, numbers: Sequence[int]) -> float:
        """These hosts renew their leases at one instant; return it."""
        when = time.monotonic() + 0.2
        self._ask("renew", list(numbers), when)
        return when

    def states(self) -> list[State]:
        """How each host is now, by number."""
        found: list[State] = [state for part in self._ask("states") for state in part]
        return sorted(found, key=lambda state: state.number)

    def tally(self) -> Tally:
        """What all have done since the last call."""
        parts: list[Tally] = self._ask("tally")
        cpu = sum(part.cpu for part in parts)
        used, self._cpu = cpu - self._cpu, cpu
        return Tally(
            sum((part.calls for part in parts), Counter()),
            tuple(n for part in parts for n in part.lost),
            sum((part.logged for part in parts), Counter()),
            used,
        )

    def _ask(self, name: str, *arguments: object) -> list[Any]:
        """Ask every process, then wait for every answer. Raises TimeoutError."""
        for pipe in self._pipes:
            pipe.send((name, arguments))
        answers = []
        for pipe in self._pipes:
            if not pipe.poll(_ANSWER):
                raise TimeoutError(f"a process of the simulation does not answer: {name}")
            answers.append(pipe.recv())
        return answers


def agreed(states: Sequence[State]) -> int:
    """How many hosts use exactly the leases that all the others hold."""
    leases = [(s.subnet, ip_of(s.number)) for s in states if s.subnet is not None]
    total = checksum(leases)
    return sum(
        state.subnet is not None
        and state.peers == len(leases) - 1
        and state.sum == total ^ checksum([(state.subnet, ip_of(state.number))])
        for state in states
    )
