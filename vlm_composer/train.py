"""Train a connector: `composer vlm_composer/train.py yamls/stage1.yaml key=value …`.

With `--preflight`, look for what would keep the run from going well, and train nothing.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

from composer import Trainer
from composer.utils import dist, reproducibility
from omegaconf import OmegaConf

from vlm_composer.assembly import assemble_model, assemble_template
from vlm_composer.config import TrainConfig
from vlm_composer.data.leftovers import stop_with_launcher
from vlm_composer.loaders import (
    assemble_encoder,
    assemble_evaluators,
    assemble_train_loader,
    explain_failure,
    features_of,
)
from vlm_composer.plain_text import say
from vlm_composer.planning.choose import choose_parallelism
from vlm_composer.preflight.checks import check_run
from vlm_composer.preflight.command import FLAG, preflight
from vlm_composer.preflight.ranks import Placement, check_ranks, count_gpus
from vlm_composer.preflight.report import judge, refuse
from vlm_composer.ranks import on_every_rank, on_rank_zero
from vlm_composer.training.contact import explain_lost_contact, join_ranks
from vlm_composer.training.freezing import log_parts
from vlm_composer.training.hardware import choose_device
from vlm_composer.training.logging_setup import log_to_stderr
from vlm_composer.training.parallelism import assemble_on_first_rank
from vlm_composer.training.preemption import EXIT_CODE, Preempted
from vlm_composer.training.resumption import find_resumption, open_save_folder, resume
from vlm_composer.training.towers_identity import check_features, identify_towers
from vlm_composer.training.trainer import build_trainer

log = logging.getLogger("vlm_composer.train")  # not __name__: the launcher runs this as a script


def prepare(config: TrainConfig) -> Trainer:
    """Build everything that a run needs, from data to Trainer.

    Args:
        config: As read from a yaml.

    Returns:
        A Trainer that is ready for `fit()`, at its checkpoint where it resumes.

    Raises:
        ValueError: The device, the data, the towers or a checkpoint do not fit the configuration.
        OSError: A file or a store cannot be read.
    """
    device = choose_device(config.device)
    # Wrong ones would wait for each other.
    refuse({"ranks": check_ranks(Placement.of_this_rank(), count_gpus(device))})
    log_to_stderr()
    # Before any streaming object, which asks it for the ranks.
    join_ranks(device, config.dist_timeout)
    config = choose_parallelism(config, device)
    log.info("Configuration:\n%s", OmegaConf.to_yaml(OmegaConf.create(config.recorded())).rstrip())

    # What can be wrong is found before the towers are loaded, and the caches of shards are taken.
    judge(check_run(config, device, starting=True))
    save_folder = open_save_folder(config)
    resumption = find_resumption(config, save_folder)
    template = on_every_rank(lambda: assemble_template(config))
    encoder = on_every_rank(lambda: assemble_encoder(config, template))
    train_data = assemble_train_loader(config, encoder, device)
    evaluators = assemble_evaluators(config, encoder, device)

    # Every rank draws the same connector; ranks differ only once the Trainer has seeded them.
    reproducibility.seed_all(config.seed)
    vlm = assemble_on_first_rank(
        lambda empty: assemble_model(config, device, template.image_token_id, empty_towers=empty),
        config.parallelism,
        device,
    )
    log_parts(vlm)
    towers = on_rank_zero(lambda: identify_towers(config, vlm))
    check_features(features_of(train_data, evaluators), towers)
    trainer = build_trainer(
        config, vlm, train_data, evaluators, device, towers=towers, save_folder=save_folder
    )
    if resumption is not None:
        resume(trainer, resumption, config, towers)
    return trainer


def main(arguments: Sequence[str]) -> int:
    """Read the command line and train.

    Returns:
        The exit code: 0; 75 when the run was stopped by SIGTERM and can go on; 1 for what the user
        can mend, which is told in a line each.
    """
    only_look = FLAG in arguments
    arguments = [argument for argument in arguments if argument != FLAG]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        return 0 if arguments else 1
    if only_look:
        return preflight(arguments[0], arguments[1:])
    stop_with_launcher()
    try:
        config = TrainConfig.read(arguments[0], arguments[1:])
        with explain_lost_contact(config):
            trainer = prepare(config)
    except (ValueError, OSError) as error:  # a ConfigError among them
        log.debug("Preparation failed", exc_info=True)
        say(f"error on rank {dist.get_global_rank()}: {error}")
        return 1
    if _is_finished(trainer):
        log.info("The run is finished: its checkpoint is at %s.", config.max_duration)
        trainer.close()
        return 0
    try:
        with explain_lost_contact(config):
            if config.eval_first and trainer.state.timestamp.batch == 0:
                trainer.eval()
            trainer.fit()
    except Preempted as stop:
        log.warning("%s; start the same command again to go on.", stop)
        trainer.close()
        return EXIT_CODE
    except (ValueError, OSError, RuntimeError, EOFError) as error:
        # A sample, a store, a shard, a disk or another rank: no trace helps.
        if (reason := explain_failure(error)) is None:
            raise
        log.debug("Training failed", exc_info=True)
        say(f"error on rank {dist.get_global_rank()}: {reason}")
        return 1
    trainer.close()
    return 0


def _is_finished(trainer: Trainer) -> bool:
    """Whether the loaded checkpoint is that of the end; Composer's `fit` raises in that case."""
    end = trainer.state.max_duration
    return end is not None and trainer.state.timestamp.get(end.unit) >= end


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
