"""`axolotl amopo inspect`: the data of a config, before anything is trained."""
