"""Received TCP joined to super-packets, before it goes on: the fast path's other way in.

Over a wire packets come one by one, and every step behind the fast path's program (forwarding, the
bridge, the container's stack) costs as much for a packet as for a super-packet. So the program puts
TCP into a link that joins it, and what comes out is received as if from the TUN device.
"""

import logging
import socket
from contextlib import ExitStack, suppress
from dataclasses import dataclass

from flanneld.backend.udp import programs
from flanneld.clock import now
from flanneld.errors import DeviceError
from flanneld.kernel import grolink
from flanneld.kernel.bpf import TCX_INGRESS, Link, hook_in
from flanneld.kernel.grolink import INLET, OUTLET, GroLink

log = logging.getLogger(__name__)

# Seconds until the link is tried again that could not be made.
AGAIN = 60.0


@dataclass(frozen=True, slots=True)
class _Made:
    """The link, the program that takes packets out of it, and for which device."""

    pair: GroLink
    out: Link
    tun: int

    def is_in_order(self, tun: int) -> bool:
        """Tell whether packets come through, to that device. Raises OSError and DeviceError."""
        return ((self.tun, self.out.index()) == (tun, self.pair.outlet)) and self.pair.is_in_order()


class Joining:
    """Keeps the link as long as it can be had."""

    def __init__(self) -> None:
        self._made: _Made | None = None
        self._again_at = 0.0
        self.trouble = ""
        """Why there is none; empty if there is one, or it was not tried yet."""

    def is_touched_by(self, index: int) -> bool:
        """Tell whether the device is one of the link's."""
        pair = None if self._made is None else self._made.pair
        return pair is not None and index in (pair.inlet, pair.outlet)

    def ensure(self, tun: int) -> int:
        """Make the link, or make it anew if something is wrong with it.

        Returns the index of the device into which packets for the TUN device with index ``tun`` are
        to be put; 0 if there is none, which is said once. Raises OSError if that device is gone.
        """
        name = socket.if_indextoname(tun)
        try:
            if self._made is not None and self._made.is_in_order(tun):
                return self._made.pair.inlet
            if self._made is not None:
                if self._made.tun == tun:
                    both = f"{name + INLET} or {name + OUTLET}"
                    log.warning("%s was gone, down or changed: both are made anew", both)
                self.close()
            elif now() < self._again_at:
                return 0
            self._made = self._make(name, tun)
        except (DeviceError, OSError) as error:
            self.close()
            self._again_at = now() + AGAIN
            if str(error) != self.trouble:
                self.trouble = str(error)
                log.warning(
                    "TCP packets from the peers go on one by one, which is slower (%s);"
                    " looked at again every minute",
                    error,
                )
            return 0
        if self.trouble:
            self.trouble = ""
            log.info("TCP packets from the peers are joined")
        return self._made.pair.inlet

    def close(self) -> None:
        """Remove the link. Safe to repeat."""
        made, self._made = self._made, None
        if made is not None:
            made.out.close()
            made.pair.close()

    @staticmethod
    def _make(name: str, tun: int) -> _Made:
        with ExitStack() as stack:
            pair = GroLink.make(name)
            stack.callback(pair.close)
            out = hook_in("flannel_joined", programs.joined(tun), pair.outlet, TCX_INGRESS)
            stack.pop_all()
            return _Made(pair, out, tun)


def remove_left(tun: int) -> None:
    """Remove the link of this TUN device that a killed daemon has left. What fails is left."""
    with suppress(DeviceError, OSError):
        grolink.remove_left(socket.if_indextoname(tun))
