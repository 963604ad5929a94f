"""When a backend's device is looked at, and what is said about it."""

import logging
from collections.abc import Sequence
from ipaddress import IPv4Network
from typing import Protocol

from flanneld.clock import now
from flanneld.errors import DeviceError
from flanneld.kernel.netlink import KernelEvent, Overflow

log = logging.getLogger(__name__)

# Seconds until a device that could not be mended is looked at again, and the least time between
# two looks when its events come in a storm.
FAILED, GAP = 1.0, 0.1


class Device(Protocol):
    """The device through which the peers are reached."""

    @property
    def name(self) -> str:
        """The name of the device."""
        ...

    def is_touched_by(self, event: KernelEvent) -> bool:
        """Tell whether the event calls for `ensure`."""
        ...

    def ensure(self) -> bool:
        """Mend the device if need be. Return whether the entries have to be made anew.

        Raises DeviceError, with what stands in the way.
        """
        ...


class DeviceWatch:
    """Looks at a device when its events ask for it; trouble is logged once, and tried again."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._looked_at = 0.0
        self._look_at: float | None = None
        self.trouble = ""
        """Why the device could not be mended the last time; empty if it was."""

    def note(self, events: Sequence[KernelEvent]) -> None:
        """Plan a look if one of the events may mean that the device changed."""
        for event in events:
            if isinstance(event, Overflow) or self._device.is_touched_by(event):
                self.plan()

    def plan(self) -> None:
        """Plan a look, as soon as the last one is not too near."""
        self._look_at = max(now(), self._looked_at + GAP)

    @property
    def is_planned(self) -> bool:
        """Whether a look is planned: until then nothing should be built upon the device."""
        return self._look_at is not None

    def due(self) -> float | None:
        """Return the seconds until the planned look; None if there is none."""
        return None if self._look_at is None else max(0.0, self._look_at - now())

    def look(self) -> bool:
        """Mend the device. Return whether its entries have to be made anew."""
        self._looked_at, self._look_at = now(), None
        try:
            anew = self._device.ensure()
        except DeviceError as error:
            self._look_at = now() + FAILED
            if str(error) != self.trouble:
                self.trouble = str(error)
                log.error("%s (trying again every second)", error)
            return False
        if self.trouble:
            self.trouble = ""
            log.info("The device %s is in order again", self._device.name)
        return anew


def remove_former(subnet: IPv4Network | None, keep: str) -> None:
    """Remove what a former run on this host, with another backend or VNI, has left of devices.

    ``subnet`` is that of the former run, if known; ``keep`` the present device's name.
    """
    # Only after the start, which has to be short.
    from flanneld.kernel import grolink

    try:
        for name in grolink.remove_unused():
            log.info("Removed %s, a device of a former run", name)
    except DeviceError as error:
        log.warning("%s", error)
    if subnet is None:
        return
    from flanneld.kernel import vxlan

    try:
        vxlan.remove_former(subnet.network_address, keep)
    except DeviceError as error:
        log.warning("%s", error)
