"""python-etcd and its urllib3, imported without what nobody uses here.

python-etcd imports dnspython for SRV records: 30 ms of a start and 2.6 MB. urllib3 imports
importlib.metadata for the version of a library for HTTP/2: 6 ms. And where pyOpenSSL is installed,
python-etcd has urllib3 use it, whose sockets nobody can shut down from another thread.
"""

import importlib
import sys
from types import ModuleType
from typing import Any


def _stand_ins() -> dict[str, ModuleType | None]:
    metadata = ModuleType("importlib.metadata")
    vars(metadata)["version"] = _version
    return {
        "dns": ModuleType("dns"),
        "dns.resolver": ModuleType("dns.resolver"),
        "importlib.metadata": metadata,
        # None: an ImportError, which python-etcd expects.
        "urllib3.contrib.pyopenssl": None,
    }


def _version(name: str) -> Any:
    return importlib.import_module("importlib.metadata").version(name)


def _import() -> Any:
    absent = {name: module for name, module in _stand_ins().items() if name not in sys.modules}
    sys.modules.update(absent)  # type: ignore[arg-type]  # None is what the import system takes
    try:
        import etcd
    finally:
        # Who else needs them gets the real ones.
        for name in absent:
            del sys.modules[name]
    return etcd


etcd = _import()
