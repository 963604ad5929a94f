"""The tunnel's process: ``python -m flanneld.backend.udp``, started by `process` only."""

import os
import signal
import sys

from flanneld.backend.udp import privileges


def run() -> int:
    """Prepare the process, then become the tunnel. Returns the exit status."""
    # Before anything that takes time: nobody else would end a tunnel that is still starting.
    privileges.end_with_parent()
    # The daemon's thread has its signals blocked. The tunnel ends with its daemon and not before,
    # also when a service manager or Ctrl-C signals both.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    # Before numpy is imported: its matrix library would start threads of its own.
    os.environ["OPENBLAS_NUM_THREADS"] = "1"
    from flanneld.backend.udp import tunnel

    return tunnel.main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(run())
