"""Feature sensitivity (FS) and gradient dependence (GD) of a model, and the settings of Skip Tuning they suggest.

FS is defined in `feature_sensitivity.py`, GD in `gradient_dependence.py`.
"""

from .advice import Advice, Setting, advise, insensitive_blocks
from .analysis import Analysis, analyze
from .feature_sensitivity import FeatureSensitivity, measure_feature_sensitivity
from .gradient_dependence import GradientDependence, KeptClasses, gradient_norms, measure_gradient_dependence
from .plots import feature_sensitivity_svg, gradient_dependence_svg

__all__ = [
    "Advice",
    "Analysis",
    "FeatureSensitivity",
    "GradientDependence",
    "KeptClasses",
    "Setting",
    "advise",
    "analyze",
    "feature_sensitivity_svg",
    "gradient_dependence_svg",
    "gradient_norms",
    "insensitive_blocks",
    "measure_feature_sensitivity",
    "measure_gradient_dependence",
]
