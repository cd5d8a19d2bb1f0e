"""The page of ``kornia-tinyvit demo --web``: what it shows, and how it lies on the screen (needs gradio)."""
