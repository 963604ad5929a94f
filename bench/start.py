"""How long a start takes, and what the daemon weighs: without peers, and with more and more."""

import os
import sys
import time
from pathlib import Path

from bench.kernelwatch import KernelWatch
from bench.results import Key
from bench.scene import PATIENCE, Effort, Overlay, Scene, Site
from lab import NotInTime
from lab.process import run

BACKENDS = ("host-gw", "vxlan")
SUBNET_ENV = "exec to subnet.env, first start"
READY = "exec to READY=1, first start"
READY_AGAIN = "exec to READY=1, as left"
NOTHING = "an interpreter that does nothing"
CPU_READY = "CPU to READY=1, first start"
CPU_PROGRAMMED = "CPU to the last peer's entry"
PROGRAMMED = "exec to the last peer's entry"
PROGRAMMED_AFTER = "subnet.env to the last peer's entry"
READY_PEERS = "exec to READY=1"
RESTART = "restart to READY=1"
MEMORY = "resident memory"
IDLE_CPU = "CPU at rest"
# Between reads of the monitor, so that reading takes no CPU from what is measured.
_PAUSE = 0.002
# Until a daemon has done what it does after a start.
_SETTLE = 5.0


def cold(scene: Scene, seconds: float) -> None:
    """The first start on a host, whose device has to be made, and another with all as it was."""
    overlays = {backend: Overlay(scene, f"cold-{backend}", backend) for backend in BACKENDS}
    for order in scene.rounds(scene.effort.starts, seconds):
        began = time.monotonic()
        run([sys.executable, "-c", "pass"])
        passed = time.monotonic() - began
        scene.results.add(Key(NOTHING, "none", "python -c pass"), "s", passed)
        for backend, overlay in overlays.items():
            for who in order:
                with Attempt(scene, overlay, who.name):
                    site = Site(overlay, who)
                    try:
                        _cold_once(scene, site, backend)
                    finally:
                        site.clean()
    for overlay in overlays.values():
        overlay.close()


def _cold_once(scene: Scene, site: Site, backend: str) -> None:
    written = site.start()
    ready = site.ready()
    cpu = cpu_seconds(site.daemon.pid)
    site.stop()
    site.start()
    again = site.ready()
    measured = (
        (SUBNET_ENV, written),
        (READY, ready),
        (READY_AGAIN, again),
        (CPU_READY, cpu),
    )
    for measure, seconds in measured:
        scene.results.add(Key(measure, backend, site.who.name), "s", seconds)
    scene.say(f"{backend}, {site.who.name}: cold start, subnet.env after {written:.3f} s")


class Attempt:
    """What fails in it is noted, and the run goes on: another binary may not do all of it."""

    def __init__(self, scene: Scene, overlay: Overlay, name: str) -> None:
        self._scene = scene
        self._what = f"{name}, {overlay.backend}, {overlay.size} peers"

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        if not isinstance(error, NotInTime):
            return False
        self._scene.results.problems.append(f"{self._what}: {error}")
        self._scene.say(f"{self._what} FAILED: {error}")
        return True


def with_peers(scene: Scene, overlay: Overlay, seconds: float) -> None:
    """Starts on a host that has none of the entries, and restarts on one that has all."""
    for order in scene.rounds(scene.effort.rounds, seconds):
        for who in order:
            with Attempt(scene, overlay, who.name):
                site = Site(overlay, who)
                try:
                    _start_once(scene, site)
                finally:
                    site.clean()


def _start_once(scene: Scene, site: Site) -> None:
    overlay = site.overlay
    written, last = start_and_watch(site)
    ready = site.ready()
    cpu = cpu_seconds(site.daemon.pid)
    memory = site.daemon.rss_kb() / 1024
    lacking = site.missing(overlay.size)
    if lacking:
        raise NotInTime(f"{lacking} peers have no entry in the kernel")
    site.stop()
    site.start()
    restart = site.ready()
    measured = (
        (PROGRAMMED, last),
        (PROGRAMMED_AFTER, last - written),
        (CPU_PROGRAMMED, cpu),
        (READY_PEERS, ready),
        (RESTART, restart),
    )
    for measure, value in measured:
        key = Key(measure, overlay.backend, site.who.name, overlay.size)
        scene.results.add(key, "s", value)
    key = Key(MEMORY, overlay.backend, site.who.name, overlay.size)
    scene.results.add(key, "MB", memory)
    scene.say(
        f"{overlay.backend}, {site.who.name}, {overlay.size} peers: all after {last:.3f} s,"
        f" restart {restart:.3f} s, {memory:.1f} MB"
    )


def start_and_watch(site: Site) -> tuple[float, float]:
    """Start it; the seconds until subnet.env and until the last peer's entry were there.

    Raises NotInTime.
    """
    with KernelWatch(site.host, _PAUSE) as watch:
        written = site.start()
        last = watch.wait_written(site.overlay.size, PATIENCE)
        if last is None:
            wanted = site.overlay.size
            raise NotInTime(
                f"entries of {wanted} peers expected in the kernel, found {dict(watch.counts)}"
                f"\n{site.daemon.explain()}"
            )
        return written, last - site.daemon.started


def at_rest(scene: Scene, peers: int) -> None:
    """The CPU time of all of them at once, with what they run, while nothing happens."""
    overlays = [Overlay(scene, f"rest-{backend}", backend) for backend in BACKENDS]
    for overlay in overlays:
        overlay.grow(peers)
        sites = []
        for who in scene.implementations:
            with Attempt(scene, overlay, who.name):
                site = Site(overlay, who)
                sites.append(site)
                start_and_watch(site)
                site.ready()
        _rest(scene, sites, scene.effort)
        for site in sites:
            site.clean()
        overlay.close()


def _rest(scene: Scene, sites: list[Site], effort: Effort) -> None:
    running = [site for site in sites if site.daemon.is_running]
    time.sleep(min(_SETTLE, effort.idle_seconds))
    before, began = [_with_children(site.daemon.pid) for site in running], time.monotonic()
    time.sleep(effort.idle_seconds)
    passed = time.monotonic() - began
    for site, earlier in zip(running, before, strict=True):
        percent = 100 * (_with_children(site.daemon.pid) - earlier) / passed
        about = (site.overlay.backend, site.who.name, site.overlay.size)
        scene.results.add(Key(IDLE_CPU, *about), "%", percent)
        scene.say(f"{', '.join(map(str, about))} peers: {percent:.2f} % of a core at rest")


def cpu_seconds(pid: int) -> float:
    """The CPU time of all threads of a process, in seconds and to the nanosecond.

    How long a start takes depends on who else wants the CPU; this hardly does. What its children
    (iptables-restore, say) take is not in it: see `children_seconds`. /proc/PID/stat counts whole
    ticks of 10 ms, about what a daemon at rest takes in a minute.
    """
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9


def children_seconds(pid: int) -> float:
    """The CPU time of a process' children that have ended, and of theirs.

    In whole ticks of 10 ms of user and of system time; the kernel adds up what is less.
    """
    # The second field, the command's name, may hold anything. Fields 16 and 17 are wanted.
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    user, system = int(fields[13]), int(fields[14])
    return (user + system) / os.sysconf("SC_CLK_TCK")


def _with_children(pid: int) -> float:
    return cpu_seconds(pid) + children_seconds(pid)
