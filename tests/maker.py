"""`examples/make.py`, which is no part of a package."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType

from tests.runs import REPOSITORY


def _loaded() -> ModuleType:
    spec = importlib.util.spec_from_file_location("examples_make", REPOSITORY / "examples" / "make.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


MAKER = _loaded()
