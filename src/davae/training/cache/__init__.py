"""Writing latents and text embeddings to disk, once."""
