"""The files for clusters start training as they are, with processes of this machine in the places of the cluster's."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest
import yaml

from lm import api

from .end_to_end import commands
from .gloo import without_gloo

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parents[1] / "examples"
DEADLINE_SECONDS = 120
TINY = {
    "model.num_layers": 1,
    "model.d_model": 16,
    "model.num_heads": 2,
    "model.num_kv_heads": None,
    "model.d_ff": 32,
    "model.remat": False,
    "model.compute_dtype": "float32",
    "tokenizer.kind": "bytes",
    "data.context": 16,
    "training.batch_size": 16,
    "training.gradient_accumulation": 1,
    "optimizer.warmup_steps": 1,
    "evaluation.every_steps": None,
    "checkpoint.every_steps": None,
    "observe.sample_prompt": None,
}
# What Slurm does: srun starts the tasks and tells each which it is, scancel signals them, scontrol notes what is asked.
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
for ((task = 0; task < SLURM_NTASKS; task++)); do
    SLURM_PROCID=$task SLURM_LOCALID=$task SLURM_STEP_ID=0 SLURM_STEP_NODELIST=localhost SLURM_STEP_NUM_NODES=1 "$@" &
    echo $! >> "$FAKE/tasks"
    tasks+=($!)
done
highest=0
for task in "${tasks[@]}"; do
    wait "$task"
    status=$?
    (( status > highest )) && highest=$status
done
exit $highest
"""
SCANCEL = """#!/bin/bash
[[ $1 == --signal=TERM && $2 == "$SLURM_JOB_ID" ]] || exit 1
kill -TERM $(cat "$FAKE/tasks")
"""
SCONTROL = """#!/bin/bash
echo "$@" >> "$FAKE/asked"
"""


@pytest.fixture
def slurm(tmp_path):
    """Starts the script as Slurm does, with two tasks; `slurm.asked()` is what was asked of scontrol."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, content in {"srun": SRUN, "scancel": SCANCEL, "scontrol": SCONTROL}.items():
        (folder / name).write_text(content)
        (folder / name).chmod(0o755)
    running = []

    def start(arguments, restarts=0):
        (folder / "tasks").unlink(missing_ok=True)
        job = next(number for number in range(1000, 5000) if is_free(65535 - 2**12 + 1 + number % 2**12))
        environment = {
            "PATH": f"{folder}:{os.environ['PATH']}", "FAKE": str(folder), "PYTHON": sys.executable,
            "SLURM_JOB_ID": str(job), "SLURM_NTASKS": "2", "SLURM_RESTART_COUNT": str(restarts),
            "SLURM_SUBMIT_DIR": str(commands.ROOT),
        }  # fmt: skip
        command = ["bash", str(EXAMPLES / "slurm.sbatch"), *arguments]
        running.append(started(command, tmp_path / f"log{len(running)}", environment))
        return running[-1], job

    def asked():
        path = folder / "asked"
        return path.read_text().splitlines() if path.exists() else []

    start.asked, start.tasks = asked, lambda: [int(task) for task in (folder / "tasks").read_text().split()]
    yield start
    with contextlib.suppress(FileNotFoundError):
        for task in start.tasks():
            with contextlib.suppress(ProcessLookupError):
                os.kill(task, signal.SIGKILL)
    for process in running:
        process.kill()


def started(command, log, environment, devices=1):
    inherited = {name: value for name, value in os.environ.items() if name != "JAX_NUMPY_RANK_PROMOTION"}
    settings = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
    with log.open("w") as file:
        return subprocess.Popen(
            command, cwd=commands.ROOT, env=inherited | settings | environment, stdout=file, stderr=file
        )


def is_free(port):
    with socket.socket() as one:
        return one.connect_ex(("127.0.0.1", port)) != 0


def ended(process, tmp_path):
    """Its exit status."""
    try:
        return process.wait(DEADLINE_SECONDS)
    except subprocess.TimeoutExpired:
        pytest.fail("\n".join(log.read_text() for log in sorted(tmp_path.glob("log*"))))


def until(reached, process, tmp_path):
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not reached():
        if process.poll() is not None or time.monotonic() > deadline:
            pytest.fail("\n".join(log.read_text() for log in sorted(tmp_path.glob("log*"))))
        time.sleep(0.05)


def flags(**changes):
    fields = TINY | {name.replace("__", "."): value for name, value in changes.items()}
    return [f"--{name}={value}" for name, value in fields.items()]


def starts(workdir):
    return [record["start"] for record in commands.records(workdir) if "start" in record]


def test_slurm_out_of_time_requeued_cancelled(slurm, tmp_path):
    """Two tasks train together, save when the time is nearly up, and the job that is queued again goes on from there;
    one that is cancelled isn't queued again."""
    text = commands.write_text(tmp_path / "text.txt")
    workdir = tmp_path / "run"
    arguments = ["tiny", f"--workdir={workdir}", *flags(data__train=f"text:{text}", training__steps=10**6)]
    job, number = slurm(arguments)
    until(lambda: len(commands.losses(workdir)) > 3, job, tmp_path)
    job.send_signal(signal.SIGUSR1)
    assert ended(job, tmp_path) == 143
    (saved,) = commands.steps(workdir)
    assert slurm.asked() == [f"requeue {number}"]
    (first,) = starts(workdir)
    assert first["mesh"]["data"] == len(first["devices"]) == 2

    job, _ = slurm(arguments, restarts=1)
    until(lambda: len(starts(workdir)) == 2 and commands.losses(workdir)[-1][0] > saved, job, tmp_path)
    for task in slurm.tasks():
        os.kill(task, signal.SIGTERM)
    assert ended(job, tmp_path) == 143
    assert starts(workdir)[1]["resumed_from"] == saved < commands.steps(workdir)[-1]
    assert len(slurm.asked()) == 1, "a cancelled job came back"


@pytest.mark.parametrize(("status", "restarts", "comes_back"), [(2, 0, 0), (1, 0, 1), (1, 20, 0), (0, 0, 0)])
def test_slurm_after_a_failure(slurm, tmp_path, status, restarts, comes_back):
    """A lost process starts the job again, so often; arguments that are at fault don't."""
    (tmp_path / "bin" / "srun").write_text(f"#!/bin/bash\nexit {status}\n")
    assert ended(slurm(["tiny"], restarts=restarts)[0], tmp_path) == status
    assert len(slurm.asked()) == comes_back


@pytest.fixture
def jobset():
    return yaml.safe_load((EXAMPLES / "jobset.yaml").read_text(encoding="utf-8"))


def test_the_jobset_fits_together(jobset):
    """What its controllers would refuse, and what would leave pods waiting for one another."""
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    spec, name = jobset["spec"], jobset["metadata"]["name"]
    (workers,) = spec["replicatedJobs"]
    job = workers["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    environment = {each["name"]: each for each in container["env"]}
    processes = int(environment["LM_PROCESSES"]["value"])
    assert job["completionMode"] == "Indexed", "else no pod has a number, nor a name that is known before"
    assert workers["replicas"] == 1 and job["completions"] == job["parallelism"] == processes
    assert spec["network"]["enableDNSHostnames"]
    host, port = environment["LM_COORDINATOR"]["value"].split(":")
    assert host == f"{name}-{workers['name']}-0-0.{name}", "pod 0 has another name"
    assert [each["containerPort"] for each in container["ports"]] == [int(port)]
    # A pod that is lost ends its job, for which the set starts anew; status 2 ends the set.
    assert job["backoffLimit"] == 0 and spec["failurePolicy"]["maxRestarts"] > 0
    assert pod["restartPolicy"] == "Never", "podFailurePolicy goes with no other"
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob"
    assert rule["onExitCodes"] == {"containerName": container["name"], "operator": "In", "values": [2]}
    (rule,) = spec["failurePolicy"]["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    mounts = {each["name"]: each["mountPath"] for each in container["volumeMounts"]}
    assert mounts.keys() == {each["name"] for each in pod["volumes"]}
    arguments = dict(argument.split("=", 1) for argument in container["args"])
    assert arguments["--workdir"].startswith(mounts["shared"]), "the pods would each write a run of their own"
    assert arguments["--data.train"].startswith(f"jsonl:{mounts['shared']}")
    devices = processes * container["resources"]["limits"]["nvidia.com/gpu"]
    assert devices % int(arguments["--parallel.fsdp"]) == 0


def test_the_pods_of_the_jobset_train_together(jobset, tmp_path):
    """Its command in two processes of four devices, with its environment; /shared is a folder, pod 0 this machine."""
    (tmp_path / "corpus").mkdir()
    with gzip.open(tmp_path / "corpus" / "part.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": commands.sentence(n) * 9}) + "\n" for n in range(200))
    (container,) = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"]
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    assert container["command"][0] == "python"
    command = [sys.executable, *container["command"][1:]]
    command += [argument.replace("/shared", str(tmp_path)) for argument in container["args"]]
    pods = []
    for pod in range(2):
        environment = {}
        for each in container["env"]:
            field = each.get("valueFrom", {"fieldRef": {}})["fieldRef"].get("fieldPath")
            assert field in (None, "metadata.annotations['batch.kubernetes.io/job-completion-index']")
            environment[each["name"]] = each["value"] if field is None else str(pod)
        environment |= {"LM_COORDINATOR": f"127.0.0.1:{port}", "LM_CACHE": str(tmp_path / f"cache{pod}")}
        pods.append(started([*command, *flags(training__steps=3)], tmp_path / f"log{pod}", environment, devices=4))
    try:
        assert [ended(pod, tmp_path) for pod in pods] == [0, 0], (tmp_path / "log0").read_text()
    finally:
        for pod in pods:
            pod.kill()
    workdir = tmp_path / "runs" / "llama_1b"
    (start,) = starts(workdir)
    assert (start["mesh"]["fsdp"], len(start["devices"])) == (8, 8)
    assert [step for step, _ in commands.losses(workdir)] == [1, 2, 3] and commands.steps(workdir) == [3]
    together = json.loads((workdir / "eval.json").read_text(encoding="utf-8"))
    run = api.load(workdir)  # what the two have written, on a device of this one
    assert {device for leaf in jax.tree.leaves(run.params) for device in leaf.devices()} == {jax.devices()[0]}
    assert api.evaluate(run).nats == pytest.approx(together["nats"], rel=1e-6)
    assert without_gloo((tmp_path / "log1").read_text()).strip() == "", "one of them speaks for all"
