"""Each launch template is one that its platform's own schema takes, and runs the one command."""

import json
import os
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
from composer.cli import launcher
from mcli import FinalRunConfig, RunConfig
from templates import (
    LAUNCH,
    ROOT,
    SLURM,
    container,
    kubernetes,
    mosaicml,
    scripts,
    skypilot,
    train_command,
)

from vlm_composer.config import TrainConfig
from vlm_composer.config.loader import ConfigError
from vlm_composer.training.preemption import EXIT_CODE

NODES, GPUS = 2, 8
STOPPED = [EXIT_CODE, 128 + signal.SIGTERM]
"""Exit codes of a launcher after SIGTERM: in training, and before."""


def test_all_platforms_run_the_same_command():
    commands = {name: train_command(script) for name, script in scripts().items()}
    assert commands.keys() == {path.stem for path in LAUNCH.iterdir()}
    command = commands["slurm"]
    assert command[:3] == ["composer", "vlm_composer/train.py", "yamls/stage1.yaml"]
    assert all(other == command for other in commands.values())


def overrides() -> list[str]:
    words = train_command(SLURM.read_text())[3:]
    values = {"$DATA": "s3://BUCKET/llava", "$SAVE_FOLDER": "s3://BUCKET/runs/stage1"}
    for name, value in values.items():
        words = [word.replace(name, value) for word in words]
    assert not any("$" in word for word in words)
    return words


def test_the_command_is_one_that_training_reads():
    config = TrainConfig.read(ROOT / "yamls" / "stage1.yaml", overrides())
    assert config.train_loader.dataset.remote == "s3://BUCKET/llava/train"
    assert config.save_folder == "s3://BUCKET/runs/stage1"
    assert config.autoresume
    assert config.global_train_batch_size % (NODES * GPUS) == 0


@pytest.mark.parametrize("key", ["save_folder", "autoresume", "save_interval"])
def test_a_key_that_training_does_not_know_would_be_found(key):
    words = [word.replace(f"{key}=", f"{key}s=") for word in overrides()]
    assert words != overrides()
    with pytest.raises(ConfigError, match=f"{key}s"):
        TrainConfig.read(ROOT / "yamls" / "stage1.yaml", words)


def launched(monkeypatch, environment: dict[str, str]) -> tuple[int, int, int, str]:
    """What Composer's launcher makes of an environment: ranks here, in all, the first of them."""
    for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE", "NODE_RANK", "BASE_RANK", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", train_command(SLURM.read_text()))
    options = launcher._parse_args()
    assert options.training_script == "vlm_composer/train.py"
    assert options.master_port == 29500
    return options.nproc, options.world_size, options.base_rank, options.master_addr


# ---- MosaicML


def test_mosaicml_takes_the_run():
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # how mcli reports fields that it does not know
        run = RunConfig.from_file(LAUNCH / "mosaicml.yaml")
        final = FinalRunConfig.finalize_config(run)
    sent = final.to_create_run_api_input()["runInput"]
    assert sent["compute"]["gpus"] == NODES * GPUS
    assert sent["scheduling"]["maxRetries"] > 0
    assert {"envKey": "SAVE_FOLDER", "envValue": "s3://BUCKET/runs/stage1"} in sent["envVariables"]


def test_mosaicml_would_tell_of_an_unknown_field():
    config = mosaicml()
    config["scheduling"]["preemptable"] = True
    with pytest.warns(UserWarning, match="did you mean 'preemptible'"):
        RunConfig.from_dict(config)


# ---- Kubernetes

KUBERNETES = ["1.31", "1.37"]  # podFailurePolicy is stable since the first


@pytest.mark.parametrize("version", KUBERNETES)
def test_kubernetes_takes_the_manifests(version):
    for manifest in kubernetes().values():
        kubernetes_validate.validate(manifest, version, strict=True)


def test_kubernetes_would_refuse_an_unknown_field():
    job = kubernetes()["Job"]
    job["spec"]["podFailurePolicies"] = job["spec"].pop("podFailurePolicy")
    with pytest.raises(kubernetes_validate.ValidationError, match="podFailurePolicies"):
        kubernetes_validate.validate(job, KUBERNETES[0], strict=True)


@pytest.mark.parametrize("node", range(NODES))
def test_each_pod_of_kubernetes_is_a_node(monkeypatch, node):
    spec, service = kubernetes()["Job"]["spec"], kubernetes()["Service"]
    assert spec["completions"] == spec["parallelism"] == NODES
    index = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    environment = {}
    for entry in container()["env"]:
        if "value" in entry:
            environment[entry["name"]] = entry["value"]
        else:
            assert entry["valueFrom"]["fieldRef"]["fieldPath"] == index
            environment[entry["name"]] = str(node)
    # The name of pod 0: `JOB-0`, in the domain that the headless service of this name gives it.
    job = kubernetes()["Job"]["metadata"]["name"]
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == {"job-name": job}
    assert spec["template"]["spec"]["subdomain"] == service["metadata"]["name"]
    master = f"{job}-0.{service['metadata']['name']}"
    assert launched(monkeypatch, environment) == (GPUS, NODES * GPUS, node * GPUS, master)
    assert container()["resources"]["limits"]["nvidia.com/gpu"] == GPUS


def test_kubernetes_does_not_count_a_pod_that_was_stopped_and_saved():
    spec = kubernetes()["Job"]["spec"]
    rules = spec["podFailurePolicy"]["rules"]
    assert {rule["action"] for rule in rules} == {"Ignore"}
    (exits,) = [rule["onExitCodes"] for rule in rules if "onExitCodes" in rule]
    assert (exits["operator"], exits["values"]) == ("In", STOPPED)
    assert exits["containerName"] == container()["name"]
    pod = spec["template"]["spec"]
    assert pod["restartPolicy"] == "Never"  # the API server refuses podFailurePolicy otherwise
    grace = launcher.CLEANUP_TIMEOUT.total_seconds()
    assert pod["terminationGracePeriodSeconds"] >= 2 * grace
    assert {mount["name"] for mount in container()["volumeMounts"]} == {
        volume["name"] for volume in pod["volumes"]
    }


# ---- SkyPilot


def skypilot_mistakes(task: dict) -> list[str]:
    """Against skypilot's schemas; skypilot itself asks for other versions than ours of much."""
    schemas = json.loads(Path(__file__).with_name("skypilot_schema.json").read_text())
    pairs = [(schemas["task"], task), (schemas["resources"], task["resources"])]
    return [
        error.message
        for schema, value in pairs
        for error in jsonschema.Draft202012Validator(schema).iter_errors(value)
    ]


def test_skypilot_takes_the_task():
    task = skypilot()
    assert not skypilot_mistakes(task)
    assert task["num_nodes"] == NODES
    assert task["resources"]["accelerators"].endswith(f":{GPUS}")
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == STOPPED


def test_skypilot_would_refuse_an_unknown_field():
    task = skypilot()
    task["node_count"] = task.pop("num_nodes")
    task["resources"]["spot"] = task["resources"].pop("use_spot")
    first, second = skypilot_mistakes(task)
    assert "node_count" in first
    assert "'spot'" in second


@pytest.mark.parametrize("node", range(NODES))
def test_each_node_of_skypilot_is_a_node(monkeypatch, tmp_path, node):
    # The shell that SkyPilot runs, up to the launcher, which is asked for its environment.
    program = tmp_path / "composer"
    program.write_text("#!/bin/sh\nenv\n")
    program.chmod(0o755)
    sky = {
        "SKYPILOT_NUM_GPUS_PER_NODE": str(GPUS),
        "SKYPILOT_NUM_NODES": str(NODES),
        "SKYPILOT_NODE_RANK": str(node),
        "SKYPILOT_NODE_IPS": "10.0.0.4\n10.0.0.5",
    }
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", skypilot()["run"]],
        env=sky | {"PATH": path},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    wanted = ("LOCAL_WORLD_SIZE", "WORLD_SIZE", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT")
    environment = dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)
    environment = {name: environment[name] for name in wanted}
    master = "10.0.0.4"
    assert launched(monkeypatch, environment) == (GPUS, NODES * GPUS, node * GPUS, master)


# ---- Slurm


def test_every_script_is_bash():
    for script in scripts().values():
        done = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")


def test_sbatch_would_see_every_option():
    lines = SLURM.read_text().splitlines()
    options = [number for number, line in enumerate(lines) if line.startswith("#SBATCH")]
    first_command = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    assert len(options) >= 10
    assert max(options) < first_command  # sbatch stops reading there


@pytest.fixture
def sbatch(tmp_path):
    """Has sbatch read a script; it gets as far as asking a controller that is not there."""
    if shutil.which("sbatch") is None:
        pytest.skip("sbatch (Debian's slurm-client) is not installed")
    config = tmp_path / "slurm.conf"
    config.write_text(
        "ClusterName=none\nSlurmctldHost=localhost(127.0.0.1)\nSlurmctldPort=9\n"
        "GresTypes=gpu\nMessageTimeout=2\n"
    )

    def read(text: str) -> str:
        script = tmp_path / "script.sbatch"
        script.write_text(text)
        done = subprocess.run(
            ["sbatch", "--test-only", script],
            env=os.environ | {"SLURM_CONF": str(config)},
            capture_output=True,
            text=True,
        )
        return done.stderr

    return read


def test_sbatch_reads_the_script(sbatch):
    assert "Unable to contact slurm controller" in sbatch(SLURM.read_text())


def test_sbatch_would_refuse_a_wrong_option(sbatch):
    text = SLURM.read_text()
    assert "Invalid --signal" in sbatch(text.replace("--signal=TERM", "--signal=TREM"))
    assert "unrecognized option '--requeued'" in sbatch(text.replace("--requeue", "--requeued"))
