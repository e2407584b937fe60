"""Fused bodies for CuPy, in files of the same names as the reference bodies.

A kernel without one here runs its reference body on CuPy, correct and unfused. Every module that
is put here is loaded when the first CuPy array comes; the CUDA sources beside them are compiled
when a kernel of theirs is first launched.
"""

import importlib
import pkgutil

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
