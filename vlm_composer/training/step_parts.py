"""The parts that a step's time is spent on: StepTimes measures them, reports name them.

It imports nothing, so that a report needs neither torch nor Composer.
"""

PARTS = {
    "data_wait": "waiting for data",
    "vision": "vision tower",
    "connector": "connector",
    "llm_forward": "language model",
    "head_and_loss": "head and loss",
    "backward": "backward",
    "optimizer": "optimizer",
    "other": "other",
}
"""Parts of a step, as the loggers and as the log line call them."""
