"""The language models of drawn problems: trained from nothing on the small language, once a folder.

The older one stands where its training was stopped early; the reference went on from there.
"""

from pathlib import Path

from preftune.problems import small_models, story
from preftune.problems.small_models import Shape

SHAPE = Shape()
OLDER, REFERENCE = "models/older", "models/reference"
"""Below the problems' folder."""
UPDATES = {OLDER: 100, REFERENCE: 500}


def make(folder: Path, seed: int) -> None:
    """Train both, unless they are there already."""
    stages = {
        Path(name).name: story.corpus(UPDATES[name] * small_models.BATCH, seed + later)
        for later, name in enumerate((OLDER, REFERENCE))
    }
    small_models.chain(folder / "models", story.words(), stages, shape=SHAPE, seed=seed)
