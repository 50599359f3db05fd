"""From a corpus of text to batches of tokens."""
