"""The structured autoencoder."""
