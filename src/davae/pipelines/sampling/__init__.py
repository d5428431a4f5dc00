"""Images out of pipelines: of prompts and classes, previews on the way, and what makes it faster."""
