"""Stage 1: detail encoders and joint decoders on a frozen base autoencoder."""
