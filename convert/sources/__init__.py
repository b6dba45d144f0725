"""Where items and images come from: one file a kind of source."""
