"""Steering a trained model: the instruction that asks for a rating, at inference."""
