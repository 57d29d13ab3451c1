"""Scaling laws, one per file: from small runs to the amount of domain data, its repetition, and the part for
finetuning.

    law = DCPTLaw().fit(table)                     # a pandas DataFrame, or a dict of columns
    law.predict(params=1e9, tokens=1e10, own_ratio=0.3, interval=0.9)
    law.params_, law.score(other_table), law.bootstrap(table)

`base.py` has the interface, `fitting.py` the fit. Nothing else of spt_fast is imported.
"""

from __future__ import annotations

from spt_fast.laws.annealing import MultiPowerLaw
from spt_fast.laws.base import ExtrapolationWarning, IdentificationWarning, Law, LawWarning, OpenError
from spt_fast.laws.chinchilla import ChinchillaLaw
from spt_fast.laws.cmr import CMRLaw
from spt_fast.laws.cross_domain import CrossDomainDCPTLaw, ProbedDCPTLaw, learnability
from spt_fast.laws.data_constrained import DataConstrainedLaw
from spt_fast.laws.dcpt import DCPTLaw, best_ratio
from spt_fast.laws.finetuning import FinetuneLaw
from spt_fast.laws.forgetting import ForgettingLaw, OffsetForgettingLaw
from spt_fast.laws.mixture_repetition import MixtureRepetitionLaw
from spt_fast.laws.overfitting import OverfittingLaw
from spt_fast.laws.postfinetune import PostFinetuneLaw
from spt_fast.laws.sparse import SparsePretrainingLaw, average_params

__all__ = [
    "CMRLaw",
    "ChinchillaLaw",
    "CrossDomainDCPTLaw",
    "DCPTLaw",
    "DataConstrainedLaw",
    "ExtrapolationWarning",
    "FinetuneLaw",
    "ForgettingLaw",
    "IdentificationWarning",
    "Law",
    "LawWarning",
    "MixtureRepetitionLaw",
    "MultiPowerLaw",
    "OffsetForgettingLaw",
    "OpenError",
    "OverfittingLaw",
    "PostFinetuneLaw",
    "ProbedDCPTLaw",
    "SparsePretrainingLaw",
    "average_params",
    "best_ratio",
    "learnability",
]
