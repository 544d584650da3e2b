"""A real Slurm on this machine, for tests: its daemons and three pretended machines, in a network of their own.

Every machine is a box with its own name and processes; killing the box is what power loss is to a machine. Nothing
listens outside the boxes' network, which has only loopback, so several clusters can run side by side.
"""

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

NODES = ("n1", "n2", "n3")
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "ip", "unshare", "nsenter", "setpriv")
PACKAGES = "slurmctld slurmd slurm-client munge iproute2"
# On a long list of states, one that a job does not leave again.
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY"}

# A node has more cores here than the machine under it, so that the scripts' own requests fit.
CONFIGURATION = """\
ClusterName=test
SlurmctldHost=ctl(127.0.0.1)
SlurmUser=root
AuthInfo=socket={folder}/munge/socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,bf_interval=1
SlurmdParameters=config_overrides
ReturnToService=1
SlurmdTimeout=60
MinJobAge=3600
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{nodes}
PartitionName=ordinary Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=ALL MaxTime=INFINITE PriorityTier=2
"""


def missing() -> str | None:
    """Why no cluster can be started here; None if one can."""
    if os.geteuid() != 0:
        return "needs root, for namespaces"
    absent = [program for program in PROGRAMS if shutil.which(program) is None]
    if absent:
        return f"{', '.join(absent)} not found; Debian: apt-get install {PACKAGES}"
    unshare = subprocess.run(
        ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "true"], capture_output=True, text=True
    )
    return f"no namespaces: {unshare.stderr.strip()}" if unshare.returncode else None


class Cluster:
    """Slurm's daemons and nodes; `start` them, and `stop` them in any case."""

    def __init__(self, folder: Path) -> None:
        """Prepare `folder`, which holds everything: configuration, key, state and logs of the daemons."""
        self.folder = folder
        self.boxes: dict[str, subprocess.Popen[bytes]] = {}
        for name in ("munge", "state", *(f"spool.{node}" for node in NODES)):
            (folder / name).mkdir()
        for path in (folder, folder / "munge"):
            path.chmod(0o755)
        (folder / "munge/key").write_bytes(os.urandom(1024))
        (folder / "munge/key").chmod(0o400)
        hosts = ["localhost ctl", *NODES]
        (folder / "hosts").write_text("".join(f"127.0.0.1 {names}\n" for names in hosts))
        nodes = "\n".join(
            f"NodeName={node} NodeAddr=127.0.0.1 Port={17001 + number} CPUs=64 RealMemory=100000"
            for number, node in enumerate(NODES)
        )
        (folder / "slurm.conf").write_text(CONFIGURATION.format(folder=folder, nodes=nodes))

    def start(self) -> None:
        """Bring all of it up, and wait until every node takes jobs."""
        # Without a second address resolvers take the network for one that cannot reach 127.0.0.1.
        network = "ip link set lo up && ip address add 127.0.1.1/8 dev lo && echo up && exec sleep infinity"
        self._spawn("network", "unshare", "--net", "bash", "-c", network)
        self.wait_until("the network", lambda: "up" in self._log("network"))
        munge = self.folder / "munge"
        files = {
            "key-file": "key",
            "socket": "socket",
            "pid-file": "pid",
            "log-file": "log",
            "seed-file": "seed",
        }
        self._spawn("munged", "munged", "--foreground", *(f"--{k}={munge / v}" for k, v in files.items()))
        self.wait_until("munged", (munge / "socket").exists)
        self._start_box("ctl", "slurmctld -D")
        for node in NODES:
            self._start_box(node, f"slurmd -D -N {node}")
        self.wait_until("the nodes", lambda: self.idle_nodes() == set(NODES))

    def stop(self) -> None:
        """End everything that `start` started."""
        for box in reversed(self.boxes.values()):
            box.send_signal(signal.SIGKILL)
            box.wait()

    def run(self, *command: str, cwd: Path | None = None, **environment: str) -> str:
        """The output of a command that runs in the cluster's network.

        Raises:
            CalledProcessError: with what it wrote on stderr as a note.
        """
        done = subprocess.run(
            [*self._enter(), *command],
            cwd=cwd,
            env=os.environ | self._environment() | environment,
            capture_output=True,
            text=True,
            timeout=60,
        )
        if done.returncode:
            error = subprocess.CalledProcessError(done.returncode, command, done.stdout, done.stderr)
            error.add_note(done.stderr)
            raise error
        return done.stdout

    def idle_nodes(self) -> set[str]:
        """The nodes that could take a job now."""
        try:
            return set(self.run("timeout", "3", "sinfo", "-hrN", "-t", "idle", "-o", "%N").split())
        except subprocess.CalledProcessError:  # slurmctld is not there yet
            return set()

    def facts(self, job: str) -> dict[str, str]:
        """What Slurm knows of a job, e.g. {"JobState": "RUNNING", "Restarts": "0", "ExitCode": "0:0"}."""
        text = self.run("scontrol", "--oneliner", "show", "job", job).splitlines()[0]
        return dict(re.findall(r"(\w+)=(\S*)", text))

    def wait_for_end(self, *jobs: str, seconds: float = 300) -> list[dict[str, str]]:
        """The facts of each job, once it has ended for good."""
        self.wait_until(
            f"the end of jobs {jobs}",
            lambda: all(self.facts(job)["JobState"] in ENDED for job in jobs),
            seconds,
        )
        return [self.facts(job) for job in jobs]

    def wait_for_restart(self, job: str, restarts: int, seconds: float = 300) -> None:
        """Wait until the job runs, having been requeued `restarts` times."""

        def has_restarted() -> bool:
            facts = self.facts(job)
            return facts["JobState"] == "RUNNING" and facts["Restarts"] == str(restarts)

        self.wait_until(f"restart {restarts} of job {job}", has_restarted, seconds)

    def wait_until(self, what: str, is_there: Callable[[], bool], seconds: float = 120) -> None:
        """Poll until `is_there`. Raises TimeoutError, with what the daemons said last."""
        end = time.monotonic() + seconds
        while not is_there():
            if time.monotonic() > end:
                logs = "".join(f"\n--- {name}\n{self._log(name)[-1000:]}" for name in self.boxes)
                raise TimeoutError(f"{what}: not after {seconds} s{logs}")
            time.sleep(0.2)

    def lose_and_reboot(self, node: str) -> None:
        """Kill a machine with everything that runs on it, and start it again; it takes jobs after `resume`."""
        box = self.boxes.pop(node)
        box.kill()
        box.wait()
        self._start_box(node, f"slurmd -b -D -N {node}")  # -b: says that it has rebooted

    def resume(self, node: str) -> None:
        """What an administrator does when a machine is well again."""
        self.run("scontrol", "update", f"nodename={node}", "state=resume")

    def _start_box(self, name: str, command: str) -> None:
        setup = f"hostname {name} && mount --bind {self.folder}/hosts /etc/hosts && exec {command}"
        self._spawn(
            name,
            *self._enter(),
            *("unshare", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"),
            *("bash", "-c", setup),
        )

    def _spawn(self, name: str, *command: str) -> None:
        with (self.folder / f"{name}.out").open("ab") as log:
            self.boxes[name] = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *command],  # nothing outlives a killed test run
                env=os.environ | self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def _enter(self) -> list[str]:
        return ["nsenter", f"--net=/proc/{self.boxes['network'].pid}/ns/net"]

    def _environment(self) -> dict[str, str]:
        return {"SLURM_CONF": str(self.folder / "slurm.conf")}

    def _log(self, name: str) -> str:
        return (self.folder / f"{name}.out").read_text()
