"""Makes the kernel's entries equal to those wanted, and keeps them so.

The `Reconciler` owns the slots of the entries it is given (see `state`). It writes what is new at
once, and listens to the kernel for what others do: a slot that somebody touched is written again;
after anything that may have cost entries without saying so (a link going down takes its IPv4
routes along silently) the kernel's entries are compared with those wanted. It is used by one
thread only, which calls `Reconciler.handle` when the descriptor is readable and `Reconciler.work`
when `Reconciler.due` says so.
"""

import errno
import logging
from collections.abc import Callable, Iterable, Sequence

from flanneld.clock import now
from flanneld.kernel.netlink import (
    AddressEvent,
    EntryEvent,
    EntrySocket,
    KernelEvent,
    LinkEvent,
    Monitor,
    Overflow,
    Refusal,
)
from flanneld.kernel.refusals import Refusals, log_recovered
from flanneld.kernel.spared import Spared
from flanneld.kernel.state import (
    PROTOCOL,
    PROTOCOL_BOOT,
    Entry,
    Found,
    Route,
    Slot,
    Territory,
    difference,
)
from flanneld.logs import log_many

log = logging.getLogger(__name__)

# Seconds between comparisons when nothing happens: a net below the events, which suffice.
CHECK = 60.0
# Seconds until the kernel is asked again after a request failed as a whole.
CHECK_FAILED = 1.0

# Seconds between two repairs. Somebody who keeps deleting our entries gets slower answers, but
# never slower than half a second.
FIRST_GAP, LONGEST_GAP, CALM = 0.02, 0.5, 5.0

# Stands for every device in `Reconciler.hold`; no device has this index.
ALL = -1

# From so many entries on, routes are spread over scopes: below it costs the kernel next to nothing
# (1,000 routes 15 ms), and the routes look like anybody's.
SPREAD_FROM = 1000


class Reconciler:
    """Keeps a set of entries in the kernel of the present network namespace."""

    def __init__(self, *, neighbours: bool = False) -> None:
        """``neighbours``: there will be neighbours and FDB entries, too.

        Nothing is changed before the first `set_all`. Raises OSError without netlink.
        """
        self._territory = Territory(())
        self._wanted: dict[Slot, Entry] = {}
        # The slots in which something of ours stands, as far as we know.
        self._ours: set[Slot] = set()
        self._touched: dict[Slot, None] = {}
        self._refusals = Refusals()
        # The monitor first: what happens during the first comparison is seen by one of them.
        self._monitor = Monitor(neighbours=neighbours)
        self._requests: EntrySocket | None = None
        self._check_at: float | None = None
        self._gap = FIRST_GAP
        self._repaired_at = now() - CALM
        self._trouble = ""
        self._look_wide = True
        self._spared = Spared()
        self._held = 0
        self._overflowed_at = now() - CALM
        self.in_step = False
        """A comparison has succeeded."""

    def fileno(self) -> int:
        """Return the descriptor that becomes readable when the kernel has something to tell."""
        return self._monitor.fileno()

    def set_all(
        self,
        entries: Iterable[Entry],
        territory: Territory,
        spare: Callable[[Found], bool] | None = None,
    ) -> None:
        """Want exactly these entries, and compare with the kernel at once.

        ``spare`` says which of the entries that are ours and not wanted now may belong to a peer
        all the same: see the module's text.
        """
        self._territory = territory
        self._spared.begin(spare)
        self._wanted = {entry.slot: entry for entry in entries}
        self._ours &= self._wanted.keys()
        self._check()

    def update(self, put: Sequence[Entry], drop: Iterable[Slot]) -> None:
        """Want these entries, too, and those no more: new ones in, old ones out, in one batch."""
        gone = [entry for slot in drop if (entry := self._wanted.pop(slot, None)) is not None]
        self._wanted.update((entry.slot, entry) for entry in put)
        # What is wanted again has been replaced in its slot.
        gone = [entry for entry in gone if entry.slot not in self._wanted]
        self._ours.difference_update(entry.slot for entry in gone)
        self._apply(put, [Found(entry, PROTOCOL) for entry in gone])

    def hold(self, device: int) -> None:
        """Leave the entries of a device (its index, or `ALL`) alone; 0: of none, no more.

        They stay as they are in the kernel, while all others are kept as wanted.
        """
        if device != self._held:
            self._held = device
            self._look_wide = True
            self._check_soon()

    def handle(self) -> list[KernelEvent]:
        """Read what the kernel has to tell, and note what it means for our entries."""
        events = self._monitor.read()
        devices = {entry.oif for entry in self._wanted.values()} if _has_devices(events) else set()
        for event in events:
            match event:
                case EntryEvent():
                    self._entry_event(event)
                case LinkEvent(link=link):
                    self._device_event(link.index in devices)
                case AddressEvent(index=index):
                    self._device_event(index in devices)
                case Overflow():
                    self._overflow()
        return events

    def due(self) -> float | None:
        """Return the seconds until `work` has something to do; None if nothing is planned."""
        times = [self._check_at] if self._check_at is not None else []
        if self._touched:
            times.append(self._repaired_at + self._gap)
        return max(0.0, min(times) - now()) if times else None

    def work(self) -> None:
        """Do what is due."""
        time = now()
        if self._touched and time >= self._repaired_at + self._gap:
            self._repair(time)
        if self._check_at is not None and now() >= self._check_at:
            self._check()

    def summary(self) -> str:
        """Return the state in a few words, for the log."""
        state = self._trouble or ("in step" if self.in_step else "not compared yet")
        return f"{len(self._wanted)} kernel entries, {len(self._refusals)} refused, {state}"

    def close(self) -> None:
        """Close the sockets; the entries stay."""
        self._monitor.close()
        if self._requests is not None:
            self._requests.close()

    def _entry_event(self, event: EntryEvent) -> None:
        found = event.found
        slot = found.entry.slot
        wanted = self._wanted.get(slot)
        if wanted is not None and found.in_slot:
            if event.deleted or not found.is_written_as(wanted):
                self._touched[slot] = None
            elif not isinstance(wanted, Route) and wanted not in self._refusals:
                # Put right by who changed it. Beside a route another may stand, before it.
                self._touched.pop(slot, None)
        elif not event.deleted and self._territory.holds(found):
            self._check_soon()

    def _overflow(self) -> None:
        # In a storm the buffer runs over again and again: one line for all of it.
        if now() - self._overflowed_at >= CALM:
            log.warning("Kernel events were lost: comparing everything")
        self._overflowed_at = now()
        self._look_wide = True
        self._check_soon()

    def _device_event(self, concerns_us: bool) -> None:
        if concerns_us:
            self._check_soon()
        else:
            # An address or a device of somebody else may be what a refused route waits for.
            self._touched.update((entry.slot, None) for entry in self._refusals)

    def _check_soon(self) -> None:
        wait = max(self._repaired_at + self._gap, now())
        self._check_at = wait if self._check_at is None else min(self._check_at, wait)

    def _repair(self, time: float) -> None:
        """Write what somebody touched; in the order wanted, as a route comes after its gateway."""
        if len(self._touched) == 1:
            entries = [self._wanted[s] for s in self._touched if s in self._wanted]
        else:
            entries = [entry for s, entry in self._wanted.items() if s in self._touched]
        entries = [entry for entry in entries if not self._is_held(entry)]
        self._touched.clear()
        self._slow_down(time)
        waiting = set(self._refusals)
        if self._apply(entries, []):
            known = waiting.union(self._refusals)
            log_recovered(entry for entry in entries if entry not in known)

    def _slow_down(self, time: float) -> None:
        calm = time - self._repaired_at >= CALM
        self._gap = FIRST_GAP if calm else min(self._gap * 2, LONGEST_GAP)
        self._repaired_at = time

    def _check(self) -> None:
        """Compare everything with the kernel, and mend what differs."""
        if self._touched:
            # Also what others put before ours, which a look at our own routes does not show.
            self._look_wide = True
            self._touched.clear()
        self._check_at = now() + CHECK
        try:
            found = self._find()
        except OSError as error:
            self._failed(error)
            return
        self._look_wide = False
        self._spared.settle(lambda: difference(self._wanted, found, self._territory.holds).delete)
        if self._spared.until is not None:
            self._check_at = min(self._check_at, self._spared.until)
        changes = difference(self._wanted, found, self._is_stale)
        missing = {entry.slot for entry in changes.write}
        if self._held:
            changes = changes.without(self._is_held)
        self._ours.update(self._wanted.keys() - missing)
        # Gone without a word, as with a link: who came meanwhile did not replace ours. What is
        # ours and only different, or was replaced under our eyes, may be replaced.
        standing = {item.entry.slot for item in found if item.in_slot and item.may_be_replaced}
        self._ours -= missing - standing
        tried_before = set(self._refusals)
        self._refusals.note_present(missing)
        if changes.write or changes.delete:
            self._slow_down(now())
        if not self._apply(changes.write, changes.delete):
            return
        if self._trouble:
            log.info("The kernel takes our entries again")
            self._trouble = ""
        log_many(
            log,
            "Removed stale %s",
            [str(item.entry) for item in changes.delete if not self._refusals.is_kept(item)],
        )
        if self.in_step:
            known = tried_before.union(self._refusals)
            log_recovered(entry for entry in changes.write if entry not in known)
        self.in_step = True

    def _is_stale(self, found: Found) -> bool:
        return self._territory.holds(found) and found not in self._spared

    def _is_held(self, entry: Entry) -> bool:
        return bool(self._held) and self._held in (ALL, entry.oif)

    def _find(self) -> list[Found]:
        """Return the entries to compare with; of others' routes only when there may be news."""
        requests, device = self._socket(), self._territory.device
        if self._held in (device, ALL):
            device = 0  # it may not be there
        if self._look_wide:
            found = requests.routes(0)
        else:
            found = requests.routes(PROTOCOL)
            if device:
                found += [r for r in requests.routes(PROTOCOL_BOOT) if r.entry.oif == device]
        if device:
            found += requests.neighbours(device)
            found += requests.fdb(device)
        return found

    def _apply(self, write: Sequence[Entry], delete: Sequence[Found]) -> bool:
        """Write, then delete. Return False if the kernel could not be asked."""
        if self._held:
            write = [entry for entry in write if not self._is_held(entry)]
            delete = [item for item in delete if not self._is_held(item.entry)]
        try:
            refused, _ = self._socket().apply(write, [], self._may_replace, spread=self._has_many)
            taken = [entry for entry, why in refused.items() if why.number == errno.EEXIST]
            if taken:
                refused = {e: why for e, why in refused.items() if why.number != errno.EEXIST}
                refused |= self._settle(taken)
            # What is new is in before anything goes that packets may still need.
            _, kept = self._socket().apply([], delete)
            self._drop_outdated([entry for entry in refused if entry.slot in self._ours])
            # Asking whether an entry is among none costs as much as its hash.
            accepted = [e for e in write if e not in refused] if refused else write
            self._ours.update(entry.slot for entry in accepted)
            # Nothing of ours stands there any more: what comes there next is not a replacement.
            self._ours.difference_update(entry.slot for entry in refused)
        except OSError as error:
            self._failed(error)
            return False
        self._refusals.note_kept(delete, kept)
        wait = self._refusals.note(write, refused, self._wanted)
        if wait is not None:
            retry = now() + wait
            self._check_at = retry if self._check_at is None else min(self._check_at, retry)
        return True

    @property
    def _has_many(self) -> bool:
        return len(self._wanted) >= SPREAD_FROM

    def _may_replace(self, entry: Entry) -> bool:
        """Tell whether the slot is ours already: what others put into it gives way."""
        return not isinstance(entry, Route) or entry.slot in self._ours

    def _settle(self, entries: Sequence[Entry]) -> dict[Entry, Refusal]:
        """Write entries into slots in which there is something that may have to stay.

        A route of ours, or one that the original left, gives way. The kernel's own route to a
        bridge and anybody else's do not: without them the host might lose more than one peer.
        """
        slots = {entry.slot for entry in entries}
        others: dict[Slot, list[Found]] = {}
        for item in self._socket().routes(0):
            if item.in_slot and item.entry.slot in slots:
                others.setdefault(item.entry.slot, []).append(item)
        refused: dict[Entry, Refusal] = {}
        free: list[Entry] = []
        behind: list[Found] = []
        for entry in entries:
            found = [r for r in others.get(entry.slot, []) if not r.is_written_as(entry)]
            fixed = next((item for item in found if not item.may_be_replaced), None)
            if fixed is not None:
                why = f"in the way is {fixed.entry} (protocol {fixed.protocol})"
                refused[entry] = Refusal(errno.EEXIST, why)
                continue
            free.append(entry)
            if len(found) < len(others.get(entry.slot, [])):
                behind += found  # ours is there, too: the others have been put before it
        refused |= self._socket().apply(free, behind, spread=self._has_many)[0]
        return {
            entry: why
            for entry, why in refused.items()
            # Ours was there already, and is the first now.
            if why.number != errno.EEXIST or entry not in free
        }

    def _drop_outdated(self, refused: Sequence[Entry]) -> None:
        """What we wrote before, and the kernel does not let us replace, must not stay either."""
        slots = {entry.slot for entry in refused if entry not in self._refusals}
        if not slots:
            return
        outdated = [
            item
            for item in self._find()
            if item.entry.slot in slots
            and self._territory.holds(item)
            and not item.is_written_as(self._wanted[item.entry.slot])
        ]
        self._socket().apply([], outdated)

    def _socket(self) -> EntrySocket:
        """Return the socket for requests; events which these cause are no news."""
        if self._requests is None:
            self._requests = EntrySocket()
            self._monitor.ignore(self._requests.port)
        return self._requests

    def _failed(self, error: OSError) -> None:
        """The kernel could not be asked: say so once, and compare again in a moment."""
        reason = (error.strerror or str(error)).lower()
        if reason != self._trouble:
            self._trouble = reason
            log.error("The kernel does not take our entries, trying every second: %s", reason)
        if self._requests is not None:
            self._requests.close()
            self._requests = None
        self._look_wide = True
        self._check_at = now() + CHECK_FAILED


def _has_devices(events: Sequence[KernelEvent]) -> bool:
    return any(isinstance(event, LinkEvent | AddressEvent) for event in events)
