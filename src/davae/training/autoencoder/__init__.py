"""Stage 1: detail encoders and joint decoders."""
