"""`axolotl amopo steer`: what a trained model gives when ratings are asked for."""
