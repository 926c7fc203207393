"""Preferences by people: two fresh samples side by side on a local page, what is said on disk."""
