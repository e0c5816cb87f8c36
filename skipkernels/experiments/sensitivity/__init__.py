"""The two measurements that Skip Tuning stands on, of one's own model: they tell which ω and keep ratio to begin with.

FS is feature sensitivity, in `feature_sensitivity.py`; GD is gradient dependence, in `gradient_dependence.py`.
"""

from .advice import Advice, Setting, advise, still_blocks
from .feature_sensitivity import FeatureShift, feature_shift
from .gradient_dependence import GradientSpread, Kept, gradient_norms, gradient_spread
from .measure import Analysis, analyze
from .plots import shift_svg, spread_svg

__all__ = [
    "Advice",
    "Analysis",
    "FeatureShift",
    "GradientSpread",
    "Kept",
    "Setting",
    "advise",
    "analyze",
    "feature_shift",
    "gradient_norms",
    "gradient_spread",
    "shift_svg",
    "spread_svg",
    "still_blocks",
]
