"""`attnctrl demo`: the toolkit in a browser. Needs gradio, the extra `demo`; nothing heavy is imported with this package."""
