"""`axolotl amopo generate`: answers of a trained model, asked for ratings."""
