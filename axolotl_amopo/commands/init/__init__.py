"""`axolotl amopo init`: a first config, written from the data."""
