"""How the base autoencoders of an upgrade are used: one adapter a class."""
