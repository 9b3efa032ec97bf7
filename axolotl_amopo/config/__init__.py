"""The YAML: its `amopo:` block, axolotl's own keys, data entries, devices."""
