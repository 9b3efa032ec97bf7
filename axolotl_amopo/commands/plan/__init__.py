"""`axolotl amopo plan`: the memory and time that a run needs, before anything is loaded."""
