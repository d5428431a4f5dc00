"""The one-file HTML report of a run: what to record, and how the page is made from it."""

from davae.report.build import build_report
from davae.report.recorder import FigureRecorder
from davae.report.schema import Alignment, Figures, Generation, Reconstruction, Summary, ThreeWay, WarmStart

__all__ = [
    "Alignment",
    "FigureRecorder",
    "Figures",
    "Generation",
    "Reconstruction",
    "Summary",
    "ThreeWay",
    "WarmStart",
    "build_report",
]
