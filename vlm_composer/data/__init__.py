"""From a record on disk to a micro-batch. Kept empty: `convert/` imports `schema` through it."""
