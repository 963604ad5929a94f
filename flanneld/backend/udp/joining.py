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
_AGAIN = 60.0
# How often a link is made anew that lasts for less than so many seconds.
_OFTEN, _SHORT = 3, 2.0


@dataclass(frozen=True, slots=True)
class _Made:
    """The link, the program that takes packets out of it, and for which device."""

    pair: GroLink
    out: Link
    tun: int

    def is_in_order(self) -> bool:
        """Tell whether packets come through. Raises OSError and DeviceError."""
        return self.out.index() == self.pair.outlet and self.pair.is_in_order()


class Joining:
    """Keeps the link as long as it can be had."""

    def __init__(self) -> None:
        self._made: _Made | None = None
        self._made_at = self._again_at = 0.0
        self._short_lived = 0
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
        made = self._made
        if made is not None and made.tun == tun and self._may_stay(made):
            return made.pair.inlet
        if made is None and now() < self._again_at:
            return 0
        self.close()
        try:
            if made is not None and made.tun == tun:
                self._mend(name)
            self._made = self._make(name, tun)
        except (DeviceError, OSError) as error:
            self._again_at = now() + _AGAIN
            if str(error) != self.trouble:
                self.trouble = str(error)
                log.warning(
                    "TCP packets from the peers go on one by one, which is slower (%s);"
                    " tried again every minute",
                    error,
                )
            return 0
        self._made_at = now()
        if self.trouble:
            self.trouble = ""
            log.info("TCP packets from the peers are joined")
        return self._made.pair.inlet

    @staticmethod
    def _may_stay(made: _Made) -> bool:
        """Tell whether the link is in order, or cannot be looked at."""
        try:
            return made.is_in_order()
        except (DeviceError, OSError):
            return True  # looked at again in some seconds

    def _mend(self, name: str) -> None:
        """Say that it is made anew. Raises DeviceError if that does not last."""
        both = f"{name + INLET} or {name + OUTLET}"
        self._short_lived = self._short_lived + 1 if now() - self._made_at < _SHORT else 0
        if self._short_lived > _OFTEN:
            self._short_lived = 0
            raise DeviceError(f"{both} is set down or changed again and again, by somebody else")
        log.warning("%s was gone, down or changed: both are made anew", both)

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
