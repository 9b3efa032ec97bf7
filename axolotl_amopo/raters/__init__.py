"""Raters: what gives a response a number per dimension. One kind of rater per file."""
