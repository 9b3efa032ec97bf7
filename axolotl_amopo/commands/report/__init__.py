"""What a training run did, from its log. Nothing here imports torch or axolotl: it must be fast."""
