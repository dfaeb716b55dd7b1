"""Cross-tokenizer knowledge distillation (DWA-KD) for axolotl.

Importing this package imports neither torch nor axolotl; the names below load on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dwakd_plugin.plugin import DWAKDPlugin
    from dwakd_plugin.recipe.schema import DWAKDConfig

__version__ = "0.1.0"
__all__ = ["DWAKDConfig", "DWAKDPlugin"]

_HOMES = {"DWAKDPlugin": "dwakd_plugin.plugin", "DWAKDConfig": "dwakd_plugin.recipe.schema"}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        try:
            return getattr(importlib.import_module(_HOMES[name]), name)
        except ImportError as error:
            # axolotl only logs a plugin's ImportError, and would train without a teacher.
            raise RuntimeError(
                f"dwakd cannot be used in this environment: {error}. Install it, and what it needs,"
                " beside axolotl."
            ) from error
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
