"""Sampling: one loop over diffusion steps, and guidance that is computed only where it counts."""

from denoscope.sampling.diagnosis import ModelFitting, diagnose
from denoscope.sampling.guidance import APG, CFGZeroStar, ClassifierFree, ClassifierGuidance
from denoscope.sampling.sampler import Step, trajectory
from denoscope.sampling.samples import Samples, sample
from denoscope.sampling.schedules import GuidanceSchedule
from denoscope.sampling.solvers import DiffusersSolver, Respaced

__all__ = [
    "APG",
    "CFGZeroStar",
    "ClassifierFree",
    "ClassifierGuidance",
    "DiffusersSolver",
    "GuidanceSchedule",
    "ModelFitting",
    "Respaced",
    "Samples",
    "Step",
    "diagnose",
    "sample",
    "trajectory",
]
