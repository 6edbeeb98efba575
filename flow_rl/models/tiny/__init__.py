"""Builders of tiny models of the real classes, with random weights."""
