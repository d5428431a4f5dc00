"""Analysis of structured latents."""
