"""Drawing responses from a language model."""
