"""`axolotl amopo reference`: take the log-probabilities of other models."""
