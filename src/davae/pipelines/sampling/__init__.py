"""Sampling from pipelines: images of prompts and classes, previews, and speed."""
