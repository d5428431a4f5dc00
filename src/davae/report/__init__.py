"""The HTML report of a run, in one file: recording its contents, and building the page."""

from davae.report.build import build_report
from davae.report.recorder import STAGES, FigureRecorder
from davae.report.schema import Alignment, EachWay, Figures, Generation, Reconstruction, Summary, WarmStart, usual_run

__all__ = [
    "STAGES",
    "Alignment",
    "EachWay",
    "FigureRecorder",
    "Figures",
    "Generation",
    "Reconstruction",
    "Summary",
    "WarmStart",
    "build_report",
    "usual_run",
]
