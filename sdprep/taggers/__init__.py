"""Words for an image: one module a tagger."""
