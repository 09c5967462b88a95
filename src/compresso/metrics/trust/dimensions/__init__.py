"""The eight dimensions of Decoding Compressed Trust (arXiv 2403.15447), one file each, in the published order.

What they ask is worded by us, around texts from the published files: scores compare between models that were asked
alike, and not with published tables.
"""

from compresso.metrics.trust.dimension import Dimension
from compresso.metrics.trust.dimensions.demonstrations import DEMONSTRATIONS
from compresso.metrics.trust.dimensions.ethics import ETHICS
from compresso.metrics.trust.dimensions.fairness import FAIRNESS
from compresso.metrics.trust.dimensions.out_of_distribution import OUT_OF_DISTRIBUTION
from compresso.metrics.trust.dimensions.privacy import PRIVACY
from compresso.metrics.trust.dimensions.robustness import ROBUSTNESS
from compresso.metrics.trust.dimensions.stereotype import STEREOTYPE

DIMENSIONS: tuple[Dimension, ...] = (
    STEREOTYPE,
    ROBUSTNESS,
    OUT_OF_DISTRIBUTION,
    DEMONSTRATIONS,
    PRIVACY,
    ETHICS,
    FAIRNESS,
)
"""Those whose questions have choices; toxicity, whose texts a scorer reads, is in `toxicity.py`."""
