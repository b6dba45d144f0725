"""W&B's own process may end, as it does at Slurm's SIGTERM; the run goes on."""

import os
import subprocess
import sys

RUN = """
import os, sys
import psutil
from vlm_composer.config import TrainConfig
from vlm_composer.train import prepare
trainer = prepare(TrainConfig.read(sys.argv[1]))
children = psutil.Process(os.getpid()).children(recursive=True)
services = [child for child in children if child.name() == "wandb-core"]
assert services
for service in services:
    service.terminate()
_, living = psutil.wait_procs(services, timeout=30)
assert not living
trainer.fit()
trainer.close()
print(trainer.state.timestamp.batch.value)
"""


def test_a_run_goes_on_when_the_process_of_wandb_has_ended(tiny_yaml, tmp_path):
    # A process of its own: what W&B has begun in it cannot be undone.
    done = subprocess.run(
        [sys.executable, "-c", RUN, tiny_yaml(loggers={"wandb": {"project": "tests"}})],
        env=os.environ | {"WANDB_MODE": "offline", "WANDB_SILENT": "true"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "4"
    assert done.stderr.count("the run continues without it") == 1
