"""`axolotl amopo template`: a chat template that steers."""
