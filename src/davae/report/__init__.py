"""The HTML report of a run, in one file: recording its contents, and building the page."""

from davae.report.build import build_report
from davae.report.recorder import STAGES, FigureRecorder
from davae.report.schema import Alignment, Figures, Generation, Reconstruction, Summary, ThreeWay, WarmStart, usual_run

__all__ = [
    "STAGES",
    "Alignment",
    "FigureRecorder",
    "Figures",
    "Generation",
    "Reconstruction",
    "Summary",
    "ThreeWay",
    "WarmStart",
    "build_report",
    "usual_run",
]
