"""How corpora, evaluation sets and a small model get here; nothing else of the library needs a network."""
