"""Every launcher trains the same ten steps to the same losses, by one process on each of two hosts."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hosts import ADDRESSES, NAMES, Cluster
from tiny_run import Training

PYTHON = sys.executable


def wait_for_all(processes: list["subprocess.Popen[str]"]) -> str:
    """Wait for commands of several hosts; return what they printed."""
    outs = [process.communicate(timeout=600)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), "\n".join(outs)
    return "\n".join(outs)


@pytest.mark.parametrize("rendezvous", ["static", "elastic"])
def test_torchrun(two: Cluster, training: Training, rendezvous: str) -> None:
    save = two.folder / f"torchrun-{rendezvous}"
    start = [PYTHON, "-m", "torch.distributed.run", "--nproc-per-node", "1"]
    processes = []
    for number, host in enumerate(NAMES):
        if rendezvous == "static":
            meet = ["--nnodes", "2", "--node-rank", str(number), "--master-addr", "n1", "--master-port", "29610"]
        else:
            meet = ["--nnodes", "1:2", "--rdzv-backend", "c10d", "--rdzv-endpoint", "n1:29620", "--rdzv-id", "tiny"]
        processes.append(two.start(host, *start, *meet, *training.script(save)))
    assert wait_for_all(processes).count("launcher: torchrun; rank 0 of 2, 1 on this host") == 1
    training.assert_trained(save)


def test_ssh(ssh: Cluster, training: Training) -> None:
    save = ssh.folder / "ssh-run"
    status, out = ssh.run("n1", PYTHON, *training.script(save, f"hostfile={ssh.folder / 'hosts'}", "launcher=ssh"))
    assert status == 0, out
    assert "launcher: ssh; 2 processes on 2 hosts (n1, n2)" in out
    training.assert_trained(save)


def test_deepspeeds_launcher_with_pdsh(pdsh: Cluster, training: Training) -> None:
    save = pdsh.folder / "pdsh-run"
    status, out = pdsh.run("n1", PYTHON, *training.script(save), "-H", pdsh.folder / "hosts")
    assert status == 0, out
    assert "launcher: DeepSpeed; rank 0 of 2, 1 on this host, meeting at 10.77.0.1:29500" in out
    training.assert_trained(save)


def test_mpirun(openmpi: Cluster, training: Training) -> None:
    save = openmpi.folder / "mpirun"
    words = ["mpirun.openmpi", "-n", "2", "-H", "n1:1,n2:1", "-x", "MASTER_ADDR=n1", PYTHON, *training.script(save)]
    status, out = openmpi.run("n1", *words)
    assert status == 0, out
    assert out.count("launcher: Open MPI; rank 0 of 2, 1 on this host, meeting at n1:29500") == 1
    training.assert_trained(save)


def test_mpich_from_the_configuration(mpich: Cluster, training: Training) -> None:
    save = mpich.folder / "mpich-run"
    words = training.script(save, "launcher=mpich", f"hostfile={mpich.folder / 'hosts'}", "master_port=29630")
    status, out = mpich.run("n1", PYTHON, *words)
    assert status == 0, out
    assert out.count("launcher: MPI (PMI); rank 0 of 2, 1 on this host, meeting at n1:29630") == 1
    training.assert_trained(save)


def test_srun(slurm: Cluster, training: Training) -> None:
    save = slurm.folder / "srun"
    words = ["srun", "--nodes=2", "--ntasks-per-node=1", PYTHON, *training.script(save)]
    status, out = slurm.run("n1", *words)
    assert status == 0, out
    assert out.count("launcher: Slurm; rank 0 of 2, 1 on this host, meeting at n1:2") == 1
    training.assert_trained(save)


def test_pods(two: Cluster, training: Training) -> None:
    """The variables of the manifest that we write, as Kubernetes would set them in two pods."""
    save, path = two.folder / "pods", two.folder / "tiny.yaml"
    script = training.script(save)
    words = ["kubernetes", *script[1:], "--nodes", "2", "--gpus-per-node", "0", "--image", "neox", "--name", "tiny"]
    words += ["--max-restarts", "0"]
    status, out = two.run("n1", PYTHON, "-m", "neox.launch", *words, "-o", path)
    assert status == 0, out
    container = yaml.safe_load(path.read_text())["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"][
        "containers"
    ][0]
    assert container["command"][2:] == ["train.py", *script[1:]]
    variables = {entry["name"]: entry.get("value") for entry in container["env"]}
    # JobSet's service gives the first pod this name.
    two.name_hosts(ADDRESSES | {"tiny-host-0-0.tiny": ADDRESSES["n1"]})
    processes = []
    for number, host in enumerate(NAMES):
        pod = variables | {"PET_NODE_RANK": str(number), "KUBERNETES_SERVICE_HOST": "10.96.0.1"}
        processes.append(two.start(host, PYTHON, *script, **pod))
    out = wait_for_all(processes)
    assert out.count("launcher: kubernetes; host 0 of 2, 1 of 2 processes here") == 1
    training.assert_trained(save)


def test_generate_and_evaluate_are_told_the_same(ssh: Cluster, training: Training) -> None:
    """Both scripts start over a hostfile as train.py does; here generate.py, from the weights just trained."""
    source = Path(ssh.folder) / "one-host"
    prompts, samples = ssh.folder / "prompts.txt", ssh.folder / "samples.jsonl"
    prompts.write_text("def main\nimport os\n")
    script = [str(Path(training.script(source)[0]).with_name("generate.py")), str(training.config), f"load={source}"]
    kind = ["--text_gen_type", "input-file", "-i", str(prompts), "-o", str(samples), "-m", "4"]
    over = [f"hostfile={ssh.folder / 'hosts'}", "launcher=ssh"]
    status, out = ssh.run("n1", PYTHON, *script, *over, *kind)
    assert status == 0, out
    assert "launcher: ssh; 2 processes on 2 hosts" in out
    assert len(samples.read_text().splitlines()) == 2
