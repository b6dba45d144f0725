"""The format on disk: one parser of `index.json`, one list of encodings, one reader of samples."""
