"""What the kernel refuses: said once, and tried again at first soon, then at longer intervals."""

import errno
import logging
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence

from flanneld.kernel.netlink import Refusal
from flanneld.kernel.state import Entry, Found, Neighbour, Route, Slot
from flanneld.logs import log_many

log = logging.getLogger(__name__)

# Seconds until refused entries are tried again: soon at first, then at the original's interval.
FIRST_CHECK_REFUSED, CHECK_REFUSED = 1.0, 10.0

# The device is gone or down. The kernel may say so before it reports the event.
_DEVICE_AWAY = frozenset({errno.ENODEV, errno.ENETDOWN})

# "neighbour table overflow", in the words of errno.
_TABLE_FULL = frozenset({errno.ENOBUFS, errno.ENOMEM, errno.ENOSPC})


class Refusals:
    """The wanted entries that the kernel refuses, and those it does not delete."""

    def __init__(self) -> None:
        # Why; empty where that has not been said yet.
        self._refused: dict[Entry, str] = {}
        self._kept: dict[Found, str] = {}
        self._patience = 0.0

    def __len__(self) -> int:
        return len(self._refused)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._refused)

    def __contains__(self, entry: Entry) -> bool:
        return entry in self._refused

    def note(
        self,
        tried: Sequence[Entry],
        refused: Mapping[Entry, Refusal],
        wanted: Mapping[Slot, Entry],
    ) -> float | None:
        """Note what of the entries tried was refused.

        Return the seconds until it should be tried again; None if nothing is refused now.
        """
        # Who watches the device mends it, and says so: said here only if the next try fails, too.
        silent = [
            e for e, why in refused.items() if why.number in _DEVICE_AWAY and e not in self._refused
        ]
        found = {entry: str(why) for entry, why in refused.items()} | dict.fromkeys(silent, "")
        fresh = [e for e, why in found.items() if why and self._refused.get(e) != why]
        recovered = [e for e in tried if e in self._refused and e not in refused] if self else []
        for entry in recovered:
            del self._refused[entry]
        self._refused.update(found)
        if self._refused:
            self._refused = {
                entry: why
                for entry, why in self._refused.items()
                if wanted.get(entry.slot) == entry
            }
        log_many(log, "Error adding %s", [f"{e}: {refused[e]}" for e in fresh], logging.ERROR)
        if any(isinstance(e, Neighbour) and refused[e].number in _TABLE_FULL for e in fresh):
            log.error(
                "The kernel's neighbour table is full: set the sysctl"
                " net.ipv4.neigh.default.gc_thresh3 to %d or more",
                2 * sum(isinstance(entry, Neighbour) for entry in wanted.values()) + 1024,
            )
        log_recovered(recovered)
        if not self._refused:
            return None
        self._patience = FIRST_CHECK_REFUSED if fresh or silent else self._patience * 2
        return min(self._patience, CHECK_REFUSED)

    def note_present(self, missing: Container[Slot]) -> None:
        """Note, after a comparison, that all but these slots are as wanted, whoever did it."""
        present = [entry for entry in self._refused if entry.slot not in missing]
        for entry in present:
            del self._refused[entry]
        log_recovered(present)

    def note_kept(self, tried: Sequence[Found], kept: Mapping[Found, Refusal]) -> None:
        """Note which of the entries tried could not be deleted."""
        if not tried:
            return
        found = {item: str(why) for item, why in kept.items()}
        fresh = [item for item, why in found.items() if self._kept.get(item) != why]
        self._kept = found
        lines = [f"{item.entry}: {found[item]}" for item in fresh]
        log_many(log, "Error deleting %s", lines, logging.ERROR)

    def is_kept(self, item: Found) -> bool:
        """Tell whether the last try to delete this entry failed."""
        return item in self._kept


def log_recovered(entries: Iterable[Entry]) -> None:
    """Say which entries are back that somebody had changed, or the kernel had refused."""
    routes, others = [], []
    for entry in entries:
        if isinstance(entry, Route):
            routes.append(f"{entry.dst} : {entry.via}")
        else:
            others.append(str(entry))
    log_many(log, "Route recovered %s", routes)
    log_many(log, "Recovered %s", others)
