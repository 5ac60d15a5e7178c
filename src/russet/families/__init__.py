"""One file a model family: how texts become conditioning, which networks work, and what they are given."""
