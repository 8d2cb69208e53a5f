"""Diffusion models behind one protocol."""

from denoscope.denoisers.loading import load
from denoscope.denoisers.noise import Noise
from denoscope.denoisers.protocol import Condition, Denoiser, Posterior
from denoscope.denoisers.schedule import NoiseSchedule
from denoscope.sites import Site, Watch

__all__ = ["Condition", "Denoiser", "Noise", "NoiseSchedule", "Posterior", "Site", "Watch", "load"]
