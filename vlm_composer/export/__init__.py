"""A trained connector as a Hugging Face folder, which loads where this project is not."""
