"""The web demo, ``kornia-tinyvit demo --web``: its results and its page (needs gradio)."""
