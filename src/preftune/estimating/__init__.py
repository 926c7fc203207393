"""Memory and time of a run before it runs.

What it will do is counted by the run's own code, with models that have shapes and no weights
(`hollow`, `counts`); bytes follow from shapes (`memory`); seconds from a short probe of the model
itself (`probing`), or from a table.
"""
