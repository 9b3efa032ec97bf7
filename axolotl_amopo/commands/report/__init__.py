"""`axolotl amopo report`: what a training run did to each dimension, and what looks wrong."""
