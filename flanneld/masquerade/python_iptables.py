"""python-iptables, imported without what nobody uses here.

It asks distutils for the directory of packages. Where setuptools is installed, as in every virtual
environment of Python 3.11, distutils is setuptools' own, and with it comes all of setuptools: 17 MB
for as long as the daemon runs, and 0.2 s of a start with ``--ip-masq`` and the legacy iptables.
"""

import importlib
import sys
from typing import Any


def _import() -> tuple[Any, Any]:
    absent = "distutils" not in sys.modules
    if absent:
        # None: a ModuleNotFoundError, upon which python-iptables asks sysconfig.
        sys.modules["distutils"] = None  # type: ignore[assignment]  # see above
    try:
        return importlib.import_module("iptc"), importlib.import_module("iptc.easy")
    finally:
        # Who else needs it gets the real one.
        if absent:
            del sys.modules["distutils"]


iptc, easy = _import()
