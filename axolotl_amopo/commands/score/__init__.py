"""`axolotl amopo score`: what training did to each dimension, on rated pairs."""
