"""Critics: how well a text describes a view, as a number."""
