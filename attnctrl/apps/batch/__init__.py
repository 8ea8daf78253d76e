"""`attnctrl batch`: many requests from a file, in batches, resumable at any moment."""
