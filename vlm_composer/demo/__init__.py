"""The real parts that `make demo` trains on: two pretrained towers and image–caption pairs."""
