"""`preftune diagnose`: what a reference, its data and a reward look like before any training."""
