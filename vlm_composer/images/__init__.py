"""Images: what Pillow opens, as upright RGB pixels."""
