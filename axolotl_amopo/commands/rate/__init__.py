"""`axolotl amopo rate`: rate responses by judges, reward models, functions and formulas."""
