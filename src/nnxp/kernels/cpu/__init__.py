"""Bodies in place for NumPy: what a recording runs, piece by piece while each piece is in cache.

The reference bodies are their oracles. A body is here because a network of bench/models.py is
faster by a tenth with it.
"""

import importlib
import pkgutil

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
