"""Placement from the variables that each launcher exports."""

import pytest

from neox.errors import LaunchError
from neox.launch.environment import Placement, detect, export, strip_local_rank
from neox.launch.nodelist import expand_nodelist, tasks_on_node

TORCH = {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "MASTER_ADDR": "n1", "MASTER_PORT": "29501"}
OPENMPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
SRUN = {
    "SLURM_JOB_ID": "123456",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
    "SLURM_NTASKS": "6",
    "SLURM_STEP_NUM_TASKS": "6",
    "SLURM_STEP_TASKS_PER_NODE": "2(x3)",
    "SLURM_JOB_NODELIST": "n[07-09,12]",
    "SLURM_STEP_NODELIST": "n[08-09,12]",
}
PMI = {"PMI_RANK": "1", "PMI_SIZE": "2", "MV2_COMM_WORLD_LOCAL_RANK": "1", "MV2_COMM_WORLD_LOCAL_SIZE": "2"}


def test_no_launcher():
    assert detect({"PATH": "/bin", "MASTER_ADDR": "n1", "MASTER_PORT": "1", "OMP_NUM_THREADS": "2"}) is None


@pytest.mark.parametrize(
    ("extra", "local_size", "launcher"),
    [
        ({"TORCHELASTIC_RUN_ID": "x", "LOCAL_WORLD_SIZE": "4"}, 4, "torchrun"),
        ({"CROSS_RANK": "1", "LOCAL_SIZE": "4"}, 4, "deepspeed"),
        ({"NEOX_LOCAL_LAUNCH": "1", "LOCAL_WORLD_SIZE": "8"}, 8, "local"),
        ({}, None, "environment"),
    ],
)
def test_torch_names(extra, local_size, launcher):
    assert detect(TORCH | extra) == Placement(5, 1, 8, local_size, "n1", 29501, launcher)


def test_torch_names_win_over_slurm_and_mpi():
    assert detect(TORCH | SRUN | OPENMPI).rank == 5
    assert detect(TORCH | SRUN | OPENMPI).world_size == 8


@pytest.mark.parametrize("missing", ["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_partial_torch_names(missing):
    environ = {name: value for name, value in TORCH.items() if name != missing}
    with pytest.raises(LaunchError, match=f"not {missing}: set all of") as error:
        detect(environ)
    assert "\n" not in str(error.value)


def test_openmpi_over_two_hosts():
    environ = OPENMPI | {"MASTER_ADDR": "n1", "MASTER_PORT": "29512"}
    assert detect(environ) == Placement(3, 1, 4, 2, "n1", 29512, "openmpi")
    with pytest.raises(LaunchError, match="-x MASTER_ADDR=HOST"):
        detect(OPENMPI)


def test_openmpi_on_one_host_needs_no_address():
    placement = detect(OPENMPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "3"})
    assert (placement.master_addr, placement.master_port) == ("127.0.0.1", 29500)


def test_openmpi_daemons_started_by_slurm():
    daemon = SRUN | {"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2"}
    assert detect(daemon | OPENMPI | {"MASTER_ADDR": "n1"}).rank == 3


def test_partial_openmpi():
    with pytest.raises(LaunchError, match="OMPI_COMM_WORLD_SIZE is not set"):
        detect({"OMPI_COMM_WORLD_RANK": "0"})


def test_srun_step_on_part_of_the_job():
    assert detect(SRUN) == Placement(5, 1, 6, 2, "n08", 23456, "slurm")


def test_srun_without_step_variables_uses_the_job():
    environ = {name: value for name, value in SRUN.items() if name == "SLURM_STEP_ID" or "STEP" not in name}
    placement = detect(environ)
    assert (placement.master_addr, placement.world_size, placement.local_world_size) == ("n07", 6, None)


def test_srun_keeps_the_users_rendezvous():
    # Job scripts often export these (and WORLD_SIZE) before srun.
    placement = detect(SRUN | {"MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "6000", "WORLD_SIZE": "6"})
    assert (placement.rank, placement.master_addr, placement.master_port) == (5, "10.0.0.7", 6000)


def test_srun_step_smaller_than_the_job():
    environ = SRUN | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_NTASKS": "6"}
    environ |= {"SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_TASKS_PER_NODE": "1"}
    assert detect(environ).world_size == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"SLURM_STEP_ID": None},  # batch script
        {"SLURM_STEP_ID": "4294967291"},  # SLURM_BATCH_SCRIPT
        {"SLURM_STEP_ID": "4294967290"},  # shell of salloc with use_interactive_step
        {"SLURM_PTY_PORT": "36011"},  # srun --pty bash
        {"SLURM_PROCID": None},
    ],
)
def test_slurm_shells_are_no_ranks(changes):
    environ = {name: value for name, value in (SRUN | changes).items() if value is not None}
    assert detect(environ) is None


def test_srun_with_pmi_plugin():
    assert detect(SRUN | {"PMI_RANK": "5", "PMI_SIZE": "6"}).launcher == "slurm"


def test_hydra_proxies_started_by_slurm():
    proxy = SRUN | {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_NODEID": "0"}
    assert detect(proxy | PMI) == Placement(1, 1, 2, 2, "127.0.0.1", 29500, "pmi")


@pytest.mark.parametrize(
    ("rank_name", "size_name"),
    [
        ("MV2_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_SIZE"),
        ("MVP_COMM_WORLD_LOCAL_RANK", "MVP_COMM_WORLD_LOCAL_SIZE"),
        ("MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    ],
)
def test_pmi_dialects(rank_name, size_name):
    environ = {"PMI_RANK": "3", "PMI_SIZE": "4", rank_name: "1", size_name: "2", "MASTER_ADDR": "n1"}
    assert detect(environ) == Placement(3, 1, 4, 2, "n1", 29500, "pmi")


def test_mvapichs_own_starter():
    local = {"MV2_COMM_WORLD_LOCAL_RANK": "1", "MV2_COMM_WORLD_LOCAL_SIZE": "2", "MASTER_ADDR": "n1"}
    environ = {"MV2_COMM_WORLD_RANK": "3", "MV2_COMM_WORLD_SIZE": "4"} | local
    assert detect(environ) == Placement(3, 1, 4, 2, "n1", 29500, "pmi")


def test_pmi_without_local_rank():
    with pytest.raises(LaunchError, match="no local rank"):
        detect({"PMI_RANK": "0", "PMI_SIZE": "2"})
    assert detect({"PMI_RANK": "0", "PMI_SIZE": "1"}).local_world_size == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"RANK": "8"}, "rank 8 is outside a world of 8"),
        ({"RANK": "-1"}, "RANK='-1' is not a whole number"),
        ({"WORLD_SIZE": "eight"}, "WORLD_SIZE='eight' is not a whole number"),
        ({"LOCAL_RANK": "4", "LOCAL_WORLD_SIZE": "4"}, "local rank 4 does not fit 4 processes"),
        ({"LOCAL_WORLD_SIZE": "16"}, "16 processes on this host of 8"),
    ],
)
def test_contradictions(changes, message):
    with pytest.raises(LaunchError, match=message):
        detect(TORCH | changes)


@pytest.mark.parametrize("environ", [SRUN, PMI, OPENMPI | {"MASTER_ADDR": "n1"}])
def test_export_is_read_back_as_torch_names(environ):
    placement = detect(environ)
    exported = dict(environ)
    export(placement, exported)
    again = detect(exported)
    assert again.launcher == "environment"
    assert (again.rank, again.local_rank, again.world_size) == (
        placement.rank,
        placement.local_rank,
        placement.world_size,
    )
    assert (again.master_addr, again.master_port) == (placement.master_addr, placement.master_port)
    assert again.local_world_size == placement.local_world_size


@pytest.mark.parametrize("flag", [["--local_rank=3"], ["--local-rank=3"], ["--local_rank", "3"], []])
def test_strip_local_rank(flag):
    assert strip_local_rank([*flag, "a.yml", "--iteration", "3"]) == ["a.yml", "--iteration", "3"]


@pytest.mark.parametrize(
    ("nodelist", "hosts"),
    [
        ("gpu", ["gpu"]),
        ("n1,n2.cluster.org", ["n1", "n2.cluster.org"]),
        ("n[1-3,5],gpu-[008-010]-ib", ["n1", "n2", "n3", "n5", "gpu-008-ib", "gpu-009-ib", "gpu-010-ib"]),
        ("r[1-2]n[09-10]", ["r1n09", "r1n10", "r2n09", "r2n10"]),
    ],
)
def test_expand_nodelist(nodelist, hosts):
    assert expand_nodelist(nodelist) == hosts


@pytest.mark.parametrize("nodelist", ["", "n[1-", "n]1[", "n[a-b]", "n[]"])
def test_malformed_nodelist(nodelist):
    with pytest.raises(LaunchError, match="MASTER_ADDR"):
        expand_nodelist(nodelist)


def test_tasks_on_node():
    assert [tasks_on_node("2(x3),1,4(x2)", node) for node in range(6)] == [2, 2, 2, 1, 4, 4]
    assert tasks_on_node("2(x3)", 3) is None
    assert tasks_on_node("two", 0) is None
