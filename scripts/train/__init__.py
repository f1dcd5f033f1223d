"""Training of the embedded models: one loop, and what each family adds to it."""
