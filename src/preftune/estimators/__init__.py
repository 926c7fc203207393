"""What data, a reference and a policy say about each other before anything is trained.

Pure functions of log-probs, rewards and features; no model is run here. Each gives an `Estimate`:
a value with its interval, or, where the samples do not carry one, a bound or the reason why not.
"""
