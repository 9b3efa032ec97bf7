"""`axolotl amopo configs`: the example configs that come with the plugin."""
