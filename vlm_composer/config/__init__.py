"""What a training yaml may say: the schema, and how a yaml becomes one that is known to work.

`run` has the whole schema; `model`, `data` and `reports` are its larger sections, `section` and
`times` what stands beside their fields. `loader` reads a yaml, `checks` finds combinations that
cannot work, `train_config` does both. `changes` compares a configuration with that of a checkpoint,
`reference` writes `docs/config.md`.
"""

from vlm_composer.config.train_config import TrainConfig as TrainConfig
