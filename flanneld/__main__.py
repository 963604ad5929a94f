"""The program ``flanneld``, and ``python -m flanneld``."""

import os
import signal
import sys
from typing import NoReturn


def console() -> NoReturn:
    """Run as a program."""
    # Before anything else is imported, which takes a tenth of a second: ending then is in order.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: os._exit(0))
    from flanneld.main import main

    sys.exit(main(sys.argv[1:], os.environ))


if __name__ == "__main__":
    console()
