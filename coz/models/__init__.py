"""Networks that several parts use."""
