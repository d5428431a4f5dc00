"""The method against its own parts, and autoencoders against each other."""
