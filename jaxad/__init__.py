"""jaxad: image anomaly detection in pure-functional JAX, made for speed.

    import jaxad
    data = jaxad.load("synthetic", image_size=64)
    detector = jaxad.fit_detector("memae", data)
    scores = detector.score(images)

Names are looked up when first used: `import jaxad` imports nothing heavy.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_WHERE = {
    "Batch": "jaxad.core",
    "Detector": "jaxad.detector",
    "Method": "jaxad.core",
    "Phase": "jaxad.core",
    "Scores": "jaxad.core",
    "Source": "jaxad.core",
    "calibrate": "jaxad.score",
    "config": "jaxad.core",
    "fit": "jaxad.train",
    "fit_detector": "jaxad.runs",
    "fit_stream": "jaxad.train",
    "get_method": "jaxad.methods",
    "load": "jaxad.data",
    "load_detector": "jaxad.runs",
    "normalize": "jaxad.score",
    "score_dataset": "jaxad.score",
    "static": "jaxad.core",
}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"jaxad has no {name!r}; it has {', '.join(sorted(_WHERE))}")
    module = importlib.import_module(_WHERE[name])
    return module.get if name == "get_method" else getattr(module, name)


def __dir__() -> list[str]:
    return sorted([*_WHERE, "__version__"])
