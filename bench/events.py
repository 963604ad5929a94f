"""What one event costs, what a burst costs, and what a resync costs."""

import time
from collections.abc import Sequence

from bench.kernelwatch import KernelWatch
from bench.leases import FIRST_OF_BURST, FIRST_OF_EVENTS, FIRST_OF_RESYNC, key, value
from bench.results import Key
from bench.scene import PATIENCE, Overlay, Scene, Site
from bench.start import Attempt, start_and_watch
from lab import NotInTime
from lab.process import freeze, thaw

LATENCY = "write of a lease to the entry"
WRITE = "write of a lease alone"
RESYNC = "resync"
BURSTS = (500, 5_000)
# etcd keeps this many events for watchers that come late.
_HISTORY = 1_000
_RESET = "outside history window"
# No further round after so many seconds.
_BURSTS_SECONDS, _RESYNC_SECONDS = 30.0, 15.0
# Seconds after an entry within which the others of the same peer come.
_SAME_EVENT = 0.005


def drained(count: int) -> str:
    """The name of the measure: from the last write of a burst to the last entry."""
    return f"burst of {count}: last entry after"


def writing(count: int) -> str:
    """The name of the measure of how long the burst itself took."""
    return f"burst of {count}: writing it"


def lost(count: int) -> str:
    """The name of the measure of what never reached the kernel."""
    return f"burst of {count}: lost"


def measure(scene: Scene, overlay: Overlay, bursts: bool) -> None:
    """All of it, of each implementation in its turn; ``bursts`` only if wanted."""
    for who in scene.implementations:
        with Attempt(scene, overlay, who.name):
            site = Site(overlay, who)
            try:
                start_and_watch(site)
                site.ready()
                time.sleep(0.5)
                _one_by_one(scene, site)
                _resyncs(scene, site)
                for count in BURSTS if bursts else ():
                    for _ in scene.rounds(scene.effort.rounds, _BURSTS_SECONDS):
                        _burst(scene, site, count)
            finally:
                site.clean()
                # Whatever a failure left.
                for first, most in (
                    (FIRST_OF_EVENTS, scene.effort.events),
                    (FIRST_OF_RESYNC, 2 * scene.effort.rounds),
                    (FIRST_OF_BURST, max(BURSTS) if bursts else 0),
                ):
                    scene.writer.delete(overlay.prefix, range(first, first + most))


def _remove(site: Site, watch: KernelWatch, numbers: Sequence[int]) -> None:
    """Delete leases, and wait until the daemon has dealt with that."""
    watch.forget()
    site.overlay.scene.writer.delete(site.overlay.prefix, numbers)
    watch.wait_gone(len(numbers))


def _one_by_one(scene: Scene, site: Site) -> None:
    """Leases written one at a time; the writer and the watch have the same clock."""
    overlay = site.overlay
    about = (overlay.backend, site.who.name, overlay.size)
    numbers = range(FIRST_OF_EVENTS, FIRST_OF_EVENTS + scene.effort.events)
    with KernelWatch(site.host) as watch:
        for number in numbers:
            watch.forget()
            content = value(number, overlay.backend)
            began = time.monotonic()
            overlay.client.put(key(overlay.prefix, number), content, ttl=86_400)
            written = time.monotonic()
            seen = watch.wait_next(PATIENCE, _SAME_EVENT)
            if seen is None:
                raise NotInTime(f"no entry for a new lease\n{site.daemon.explain()}")
            scene.results.add(Key(LATENCY, *about), "ms", (seen - began) * 1e3)
            scene.results.add(Key(WRITE, *about), "ms", (written - began) * 1e3)
        _remove(site, watch, numbers)
    latency = scene.results.find(LATENCY, *about)
    if latency is not None:
        scene.say(
            f"{', '.join(map(str, about))} peers: one lease takes {latency.median:.2f} ms,"
            f" 99 % at most {latency.percentile(99):.2f} ms"
        )


def _resyncs(scene: Scene, site: Site) -> None:
    """The daemon sleeps while more happens than etcd remembers, and wakes up.

    One lease before all that, so that a watch of the daemon has something to return with and the
    next one comes too late; and one after it, which only a snapshot can show.
    """
    overlay = site.overlay
    about = (overlay.backend, site.who.name, overlay.size)
    with KernelWatch(site.host) as watch:
        for turn, _ in enumerate(scene.rounds(scene.effort.rounds, _RESYNC_SECONDS)):
            number = FIRST_OF_RESYNC + 2 * turn
            watch.forget()
            resets = site.daemon.log().count(_RESET)
            freeze(site.daemon.pid)
            try:
                scene.writer.put(overlay.prefix, overlay.backend, [number])
                scene.writer.fill_history(_HISTORY + 200)
                scene.writer.put(overlay.prefix, overlay.backend, [number + 1])
                began = time.monotonic()
            finally:
                thaw(site.daemon.pid)
            last = watch.wait_written(2, PATIENCE)
            if last is None:
                raise NotInTime(f"no entry after a resync\n{site.daemon.explain()}")
            said = f"{', '.join(map(str, about))} peers: resync {last - began:.3f} s"
            # The original's words, too.
            if site.daemon.log().count(_RESET) > resets:
                scene.results.add(Key(RESYNC, *about), "s", last - began)
            else:
                said += ", left out: the log does not say that there was one"
                scene.results.problems.append(said)
            scene.say(said)
            _remove(site, watch, [number, number + 1])


def _burst(scene: Scene, site: Site, count: int) -> None:
    """Many new leases as fast as etcd takes them."""
    overlay = site.overlay
    about = (overlay.backend, site.who.name, overlay.size)
    numbers = range(FIRST_OF_BURST, FIRST_OF_BURST + count)
    with KernelWatch(site.host, pause=0.001) as watch:
        began = time.monotonic()
        written = scene.writer.put(overlay.prefix, overlay.backend, numbers)
        last = watch.wait_written(count, PATIENCE / 2)
        # What does come, of a daemon that loses some, is no measure of its speed.
        missing = site.missing(overlay.size + count)
        if last is not None and not missing:
            scene.results.add(Key(drained(count), *about), "s", max(0.0, last - written))
        scene.results.add(Key(writing(count), *about), "s", written - began)
        scene.results.add(Key(lost(count), *about), "leases", missing)
        scene.say(
            f"{', '.join(map(str, about))} peers: {count} more written in"
            f" {written - began:.2f} s, {missing} lost,"
            + (f" the last {last - written:.3f} s after its write" if last else " not complete")
        )
        _remove(site, watch, numbers)
