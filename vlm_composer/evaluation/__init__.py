"""What tells whether a connector aligned."""
