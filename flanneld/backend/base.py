"""What a backend is, for `flanneld.main` and the registry."""

import threading
from collections.abc import Callable
from typing import Protocol

from flanneld.heartbeat import Heartbeat
from flanneld.interface import ExternalInterface
from flanneld.subnet.config import Config
from flanneld.subnet.env import Previous
from flanneld.subnet.lease import Lease
from flanneld.subnet.manager import SubnetManager


class Network(Protocol):
    """This host's part of the overlay network, once registered."""

    @property
    def lease(self) -> Lease:
        """Our own lease, as acquired."""
        ...

    @property
    def mtu(self) -> int:
        """The MTU of containers, in bytes."""
        ...

    def run(
        self, stop: threading.Event, synced: Callable[[], None], heart: Heartbeat | None = None
    ) -> None:
        """Follow the other hosts' leases until ``stop``; runs in a thread of its own.

        Calls ``synced`` once, when the first set of peers is in the kernel. Raises only if it
        cannot go on. What it has set up in the kernel stays behind, a udp tunnel excepted. Each
        loop has a pulse of ``heart``, in this thread and in others that it starts.
        """
        ...

    def wake(self) -> None:
        """Make `run` look at ``stop`` at once."""
        ...

    def report(self) -> None:
        """Have `run` log its state. Called by a signal handler, so it takes no lock."""
        ...


class Backend(Protocol):
    """A way to get packets to the other hosts' subnets."""

    def register_network(self, config: Config, stop: threading.Event) -> Network:
        """Acquire a lease and configure the device.

        Raises BackendError if the config's backend keys are wrong or the host cannot do it, and
        Stopped when ``stop`` is set meanwhile.
        """
        ...


class Constructor(Protocol):
    """What the registry keeps under a backend's name."""

    def __call__(
        self,
        manager: SubnetManager,
        external: ExternalInterface,
        previous: Previous,
    ) -> Backend:
        """Build the backend; nothing is touched yet.

        ``previous`` is what this host's former run wrote into its subnet file: what is left of
        that in the kernel is ours to remove. Raises BackendError if this host cannot run the
        backend.
        """
        ...
