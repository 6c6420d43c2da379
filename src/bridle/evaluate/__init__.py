"""Measuring whether a control steers, and telling it: figures, a report page, a contact sheet."""

from bridle.evaluate.evaluate import Generate, HeldOutPair, Reconstruct, evaluate
from bridle.evaluate.fidelity import Fidelity, edge_f1, ssim
from bridle.evaluate.gallery import write_sheet
from bridle.evaluate.report import write_report
from bridle.evaluate.result import Evaluation, read_evaluation, write_evaluation
from bridle.evaluate.verdict import judge, sentence

__all__ = [
    "Evaluation",
    "Fidelity",
    "Generate",
    "HeldOutPair",
    "Reconstruct",
    "edge_f1",
    "evaluate",
    "judge",
    "read_evaluation",
    "sentence",
    "ssim",
    "write_evaluation",
    "write_report",
    "write_sheet",
]
