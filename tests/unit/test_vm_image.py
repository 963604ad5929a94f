"""lab.vm_image: what of its files goes into the machine."""

import py_compile
import shutil
from pathlib import Path

from lab import vm_image

FILES = Path(vm_image.__file__).parent / "vm_root"


def test_bytecode_is_no_part_of_the_image(tmp_path: Path) -> None:
    """`make` compiles lab, and with it the program that runs in the machine."""
    top = tmp_path / "vm_root"
    shutil.copytree(FILES, top, ignore=shutil.ignore_patterns("__pycache__"))
    before = vm_image.root_files(top)
    assert before
    assert py_compile.compile(str(top / "usr/local/lib/lab-agent.py"), doraise=True)
    assert vm_image.root_files(top) == before
