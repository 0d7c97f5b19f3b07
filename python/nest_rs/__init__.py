"""NeST: make open-weight language models refuse what they should, by moving almost nothing.

Names are loaded when first used, so that importing the package, or asking the command line for help, stays quick.
Loading `NestConfig` also teaches PEFT the adapter type "NEST".
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nest_rs.config import TuneConfig as TuneConfig
    from nest_rs.errors import NestError as NestError
    from nest_rs.numeric import ActivationStore as ActivationStore
    from nest_rs.numeric import KMeans as KMeans
    from nest_rs.numeric import LogisticProbe as LogisticProbe
    from nest_rs.numeric import pooled_stats as pooled_stats
    from nest_rs.numeric import select_rows as select_rows
    from nest_rs.numeric import silhouette_score as silhouette_score
    from nest_rs.patch import NestPatch as NestPatch
    from nest_rs.run import tune as tune
    from nest_rs.tuner import NestConfig as NestConfig

_HOME = {
    "ActivationStore": "numeric",
    "KMeans": "numeric",
    "LogisticProbe": "numeric",
    "NestConfig": "tuner",
    "NestError": "errors",
    "NestPatch": "patch",
    "TuneConfig": "config",
    "pooled_stats": "numeric",
    "select_rows": "numeric",
    "silhouette_score": "numeric",
    "tune": "run",
}

__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return version("nest-rs")
    if name not in _HOME:
        raise AttributeError(f"module `nest_rs` has no attribute `{name}`")
    return getattr(import_module(f"nest_rs.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
