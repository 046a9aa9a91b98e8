"""Photographs and what training makes of them."""
