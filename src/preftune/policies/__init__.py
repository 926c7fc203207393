"""Policies: one protocol, a table of logits and any Hugging Face causal language model."""
