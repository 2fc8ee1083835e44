"""Distances between sets of images: FID, KID, CMMD, FWD, precision, recall, density and coverage."""

from arrag_jax.evaluation.metrics.features import clip_features, inception_features
from arrag_jax.evaluation.metrics.frechet import frechet_distance
from arrag_jax.evaluation.metrics.kernels import cmmd, kernel_distance
from arrag_jax.evaluation.metrics.manifold import precision_recall
from arrag_jax.evaluation.metrics.wavelets import fwd

__all__ = [
    "clip_features",
    "cmmd",
    "frechet_distance",
    "fwd",
    "inception_features",
    "kernel_distance",
    "precision_recall",
]
