"""What several commands share; a command imports from here and never from another command."""
