"""A look at the data of a config before anything is trained."""
