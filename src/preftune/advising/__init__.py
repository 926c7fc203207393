"""What to advise, and how good that advice is: problems, candidates, costs, a fitted rule."""
