"""`axolotl amopo chat`: a page in the browser, with a slider per dimension."""
