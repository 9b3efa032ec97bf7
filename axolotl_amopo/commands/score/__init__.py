"""`axolotl amopo score`: how often models order rated pairs as the ratings do."""
