"""What a run costs in a problem's prices.

The unit is the forward and backward pass of one response (the reference's forward is in it).
"""

from preftune.advising.signs import model_price
from preftune.advising.stated import Stated


def spent(problem: Stated, trained: float, drawn: float, judged: float) -> float:
    """The price of that; where the judge is a reward model of the run's own pairs, of training it
    on them too."""
    prices = problem.prices
    own_model = model_price(problem.labels.source, len(problem.pairs)) if judged else 0.0
    return trained + prices.sample * drawn + prices.label * judged + own_model
