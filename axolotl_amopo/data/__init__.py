"""Rows -> rated pairs -> dimension-aware prompts -> token ids."""
