"""`axolotl amopo compare`: train variants of a config, score them alike, and say what differs."""
