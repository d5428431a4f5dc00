"""What a structured latent holds."""
