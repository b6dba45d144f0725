"""What a training yaml may say: the schema, and how a yaml becomes one that is known to work.

`run` has the whole; `model`, `data` and `reports` are its larger sections. `loader` reads a yaml,
`checks` finds values and combinations that cannot work, `changes` tells what differs from the run
that a checkpoint is of.
"""

from vlm_composer.config.run import TrainConfig as TrainConfig
