"""What a run needs, before anything is loaded: `axolotl amopo plan`."""
