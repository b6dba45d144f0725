"""W&B's own process may end, as it does at Slurm's SIGTERM; the run goes on."""

import os

import psutil

from runs import start


def test_a_run_goes_on_when_the_process_of_wandb_has_ended(
    tiny_config, tmp_path, monkeypatch, caplog
):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    trainer, _, watch = start(tiny_config(loggers={"wandb": {"project": "tests"}}))
    children = psutil.Process(os.getpid()).children(recursive=True)
    services = [child for child in children if child.name() == "wandb-core"]
    assert services
    for service in services:
        service.terminate()
    psutil.wait_procs(services, timeout=30)
    trainer.fit()
    trainer.close()
    assert len(watch.losses) == 4
    assert caplog.text.count("the run goes on without it") == 1
