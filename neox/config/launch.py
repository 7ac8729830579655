"""Where processes are started, and by what."""

from typing import Annotated, Literal

from neox.config.keys import Int, Lower, Section, Text, dead, internal, not_yet, setting


class LaunchConfig(Section):
    """Hosts and launchers."""

    hostfile: Text | None = setting(
        None,
        "File of lines `HOST slots=N`.",
        rule="Read where train.py is started by hand; absent: $DLTS_HOSTFILE, or /job/hostfile if it exists.",
    )
    include: Text | None = setting(
        None, "Hosts and slots to use, e.g. host1:0,1@host2.", rule="Needs a hostfile; not together with exclude."
    )
    exclude: Text | None = setting(
        None, "Hosts and slots to leave out.", rule="Needs a hostfile; not together with include."
    )
    num_nodes: Int = setting(-1, "Number of hosts to use; -1 is all.", ge=-1, rule="The first hosts of the hostfile.")
    num_gpus: Int | None = setting(None, "Processes of each host; absent: all its devices.", gt=0)
    master_port: Int = setting(29500, "Port where processes meet.", gt=0, lt=65536)
    master_addr: Text | None = setting(None, "Address where processes meet.")
    launcher: Annotated[Literal["pdsh", "ssh", "openmpi", "mpich", "mvapich", "slurm"], Lower] = setting(
        "pdsh",
        "How processes are started on other hosts.",
        rule="Used with a hostfile, deepspeed_slurm, deepspeed_mpi or force_multi; ssh needs nothing but ssh.",
    )
    force_multi: bool = setting(False, "Use the launcher for a single host too.")
    no_ssh_check: bool = setting(False, "Do not ask every host over ssh beforehand.")
    comment: Text | None = setting(None, "Slurm's --comment.")
    account: Text | None = setting(None, "Slurm's --account.")
    deepspeed_slurm: bool = setting(
        False,
        "Start processes with srun; ranks are taken from Slurm in any case.",
        rule="On the hostfile's hosts, else on those of the allocation around us.",
    )
    deepspeed_mpi: bool = setting(
        False, "Start processes with mpirun; ranks are taken from MPI in any case.", rule="Needs a hostfile."
    )
    preflight: bool = setting(
        False,
        "Check hosts, versions, GPUs, links, disks and data before a run of several hosts, and stop if one is not fit.",
        rule="Where train.py starts the hosts, or in a file written by `neox.launch slurm`.",
    )


_INSTEAD_OF_AUTOTUNING = "compare runtime/tokens_per_sec of short runs, train_iters=20 with other overrides."

OTHER_KEYS = (
    internal("user_script", str, "Script that is launched.", instead="name the script on the command line"),
    not_yet("autotuning_run", Literal["tune", "run"], None, f"DeepSpeed's autotuner; {_INSTEAD_OF_AUTOTUNING}"),
    not_yet("autotuning", dict, None, f"Settings of DeepSpeed's autotuner; {_INSTEAD_OF_AUTOTUNING}"),
    dead("deepscale", bool, False, "A retired engine."),
    dead("deepscale_config", str, None, "A retired engine's settings."),
)
