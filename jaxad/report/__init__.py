"""The report of a run: one self-contained HTML file, its words and its pictures.

Everything here takes plain values (dicts, lists, NumPy arrays) and knows nothing of methods or engines.
"""

from jaxad.report.choice import choose
from jaxad.report.page import write_report
from jaxad.report.pictures import Picture, colour_scale, heat_map, outline, overlay, save_map
from jaxad.report.words import metric_rows, sentence

__all__ = [
    "Picture",
    "choose",
    "colour_scale",
    "heat_map",
    "metric_rows",
    "outline",
    "overlay",
    "save_map",
    "sentence",
    "write_report",
]
