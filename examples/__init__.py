"""A part of each kind, small enough to copy. `docs/extend.md` explains them; `tests/test_examples.py` runs them."""
