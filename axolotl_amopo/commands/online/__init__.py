"""`axolotl amopo online`: rounds of responses, ratings and training."""
