"""A run as one page of HTML that says first whether the connector learned to see.

`python -m vlm_composer.report RUN_DIR` writes it from the files of the run's folder alone: it needs
no network, no GPU, no towers, and neither torch nor Composer.
"""
