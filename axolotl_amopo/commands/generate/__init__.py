"""`axolotl amopo generate`: answers of a trained model that is asked for ratings."""
