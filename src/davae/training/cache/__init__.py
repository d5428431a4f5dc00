"""Precomputing latents and text embeddings on disk."""
