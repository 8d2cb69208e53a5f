"""Small trainers for what must be trained."""

from denoscope.training.classifier import read_labelled, train_classifier
from denoscope.training.config import DenoiserConfig, read_denoiser_config
from denoscope.training.denoiser import train_denoiser

__all__ = ["DenoiserConfig", "read_denoiser_config", "read_labelled", "train_classifier", "train_denoiser"]
