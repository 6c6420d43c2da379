"""Measuring whether a control steers, and telling it: figures, a report page, a contact sheet."""

from bridle.evaluate.evaluate import Generate, HeldOutPair, Reconstruct, evaluate
from bridle.evaluate.fidelity import edge_f1, ssim
from bridle.evaluate.gallery import write_sheet
from bridle.evaluate.maps import depth_rmse, miou, normals_deg, normals_within
from bridle.evaluate.measures import MEASURES, Figures, Measure
from bridle.evaluate.report import write_report
from bridle.evaluate.result import Evaluation, read_evaluation, write_evaluation
from bridle.evaluate.verdict import judge, sentence

__all__ = [
    "MEASURES",
    "Evaluation",
    "Figures",
    "Generate",
    "HeldOutPair",
    "Measure",
    "Reconstruct",
    "depth_rmse",
    "edge_f1",
    "evaluate",
    "judge",
    "miou",
    "normals_deg",
    "normals_within",
    "read_evaluation",
    "sentence",
    "ssim",
    "write_evaluation",
    "write_report",
    "write_sheet",
]
