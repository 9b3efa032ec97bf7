"""Tokens -> log-probabilities: batches that share prompts, on any transformers causal model."""
