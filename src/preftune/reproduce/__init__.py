"""The papers' claims, run again: claim id -> runs and a check that was fixed beforehand."""
