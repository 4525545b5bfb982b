"""Runs the scripts in launch/ with fakes for the programs that they call, and checks every decision."""

import itertools
import json
import math
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest
import yaml

from mnv2_jax import config
from tests import cli

LAUNCH = pathlib.Path(cli.ROOT) / "launch"
SCRIPTS = ("local_multihost.sh", "slurm.sbatch", "tpu_pod.sh", "until_finished.sh")
TRAIN = ["-m", "mnv2_jax.main"]
ODD = ["--config=configs/w1_0.py:path=/a b", "--config.data.scales=(128,224)", "--config.optim.peak_lr=$HOME'"]
"""Arguments that a shell script splits or expands if it doesn't quote them."""


@pytest.fixture
def fakes(tmp_path, monkeypatch):
    """Puts a folder first in PATH; ``fakes(name, program)`` adds an executable to it, which may write to $SEEN."""
    folder, seen = tmp_path / "bin", tmp_path / "seen"
    folder.mkdir()
    seen.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("SEEN", str(seen))

    def add(name, program):
        (folder / name).write_text(program)
        (folder / name).chmod(0o755)
        return seen

    return add


def shell(body):
    """Returns a fake in bash that records its arguments, one line per call."""
    note = """(IFS=$'\\x1f'; printf '%s\\n' "${0##*/}$IFS$*" >>"$SEEN/calls")"""
    return f"#!/usr/bin/env bash\n{note}\n{body}\n"


def calls(seen, name=None):
    """Returns the calls of the fakes, in order: [program, *arguments]."""
    path = seen / "calls"
    lines = [line.split("\x1f") for line in path.read_text().split("\n")[:-1]] if path.exists() else []
    return [line for line in lines if name in (None, line[0])]


def launch(script, *arguments, **variables):
    return subprocess.run(
        ["bash", str(LAUNCH / script), *arguments],
        env=os.environ | variables,
        cwd=cli.ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


# Processes in the background ignore Ctrl-C, and a shell can't trap a signal that was ignored when it started.
HEARS_CTRL_C = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)
os.execvp("bash", ["bash", *sys.argv[1:]])
"""


def begin(script, *arguments, **variables):
    return subprocess.Popen(
        [sys.executable, "-c", HEARS_CTRL_C, str(LAUNCH / script), *arguments],
        env=os.environ | variables,
        cwd=cli.ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def until(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# --- all files ---------------------------------------------------------------------------------------------


def test_every_file_is_checked_here():
    assert {path.name for path in LAUNCH.iterdir()} == {*SCRIPTS, "Dockerfile", "jobset.yaml"}
    for script in SCRIPTS:
        assert os.access(LAUNCH / script, os.X_OK) or script == "slurm.sbatch"


@pytest.mark.parametrize("script", SCRIPTS)
def test_shell(script):
    subprocess.run(["bash", "-n", str(LAUNCH / script)], check=True)
    shellcheck = shutil.which("shellcheck", path=f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}")
    if shellcheck is None:
        pytest.skip("shellcheck isn't installed; it comes with the extra dev")
    result = subprocess.run([shellcheck, str(LAUNCH / script)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("name", [*SCRIPTS, "Dockerfile", "jobset.yaml"])
def test_headers_list_variables_and_how_to_resume(name):
    lines = (LAUNCH / name).read_text().splitlines()
    header = "\n".join(itertools.takewhile(lambda line: line.startswith("#"), lines))
    for heading in ("be set:", "Needs:", "Resumes:"):
        assert heading in header
    assert max(map(len, lines)) <= 120


POD = {
    "NAME": "mnv2",
    "ZONE": "us-west4-a",
    "ACCELERATOR_TYPE": "v5litepod-64",
    "RUNTIME_VERSION": "v2-alpha-tpuv5-lite",
    "IMAGE": "us-west4-docker.pkg.dev/p/r/mnv2_jax:tpu",
    "NFS": "10.0.0.2:/share",
    "WORKDIR": "/mnt/shared/runs/a run",
    "POLL_S": "0",
}


@pytest.mark.parametrize(
    ("script", "arguments", "variable"),
    [
        *(("tpu_pod.sh", ["run"], variable) for variable in POD if variable != "POLL_S"),
        ("slurm.sbatch", [], "WORKDIR"),
        ("until_finished.sh", [], "WORKDIR"),
    ],
)
def test_a_missing_variable_is_one_line(fakes, script, arguments, variable):
    for name in ("gcloud", "srun", "python"):
        seen = fakes(name, shell(""))
    result = launch(script, *arguments, **POD | {variable: ""})
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert result.stderr.startswith(f"error: {variable} ")
    assert not calls(seen)


def test_usage():
    for script, arguments in (("tpu_pod.sh", []), ("tpu_pod.sh", ["restart"]), ("local_multihost.sh", ["--config=x"])):
        result = launch(script, *arguments, **POD)
        assert result.returncode == 2
        assert result.stderr.startswith("error: usage: ")
        assert result.stderr.count("\n") == 1


# --- tpu_pod.sh --------------------------------------------------------------------------------------------

CLOUD = f"""#!{sys.executable} -SE
import json, os, pathlib, sys
here, arguments = pathlib.Path(os.environ["SEEN"]), sys.argv[1:]
states, ends = here / "states", here / "ends"
def take(path):  # the first line; the last one stays
    first, *rest = path.read_text().split()
    path.write_text(" ".join(rest or [first]))
    return first
with open(here / "calls", "a") as file:
    file.write("\\x1f".join(["gcloud", *arguments]).replace("\\n", "\\\\n") + "\\n")
verb, command = arguments[3], arguments[-1].partition("=")[2]
if verb == "list" and states.exists():
    print(take(states))
elif verb == "create":
    states.write_text(os.environ.get("STATES", "ACCEPTED WAITING_FOR_RESOURCES PROVISIONING ACTIVE"))
elif verb == "delete":
    states.unlink()
elif verb == "ssh" and command.startswith("test -e"):
    sys.exit(not (here / "finished").exists())
elif verb == "ssh" and "docker wait" in command:
    end, *rest = ends.read_text().split()
    ends.write_text(" ".join(rest))
    if end == "finished":
        (here / "finished").touch()
    elif end == "preempted":
        states.write_text("SUSPENDING SUSPENDED")
        sys.exit(255)
    elif end == "deleted":
        states.unlink()
        sys.exit(255)
    else:
        sys.exit(int(end))
"""


@pytest.fixture
def cloud(fakes):
    """``cloud(*ends)`` runs `tpu_pod.sh run`; ``ends`` are the ends of the workers' runs, one after the other."""
    seen = fakes("gcloud", CLOUD)

    def run(*ends, **variables):
        (seen / "ends").write_text(" ".join(ends))
        return launch("tpu_pod.sh", "run", *ODD, **POD | variables)

    run.seen = seen
    return run


def did(seen):
    """Names the calls of gcloud, without those that only list."""

    def name(call):
        command = call[-1].partition("=")[2]
        if call[4] != "ssh":
            return call[4]
        kinds = {"docker pull": "prepare", "docker run": "start", "docker wait": "follow", "test -e": "look"}
        return next(kind for text, kind in kinds.items() if text in command)

    return [name(call) for call in calls(seen) if call[4] != "list"]


ONCE = ["prepare", "start", "follow", "look"]


def test_pod_from_nothing(cloud):
    result = cloud("finished")
    assert result.returncode == 0, result.stderr
    assert did(cloud.seen) == ["create", *ONCE]
    (create,) = [call for call in calls(cloud.seen) if "create" in call]
    assert {"mnv2", "--zone=us-west4-a", "--node-id=mnv2", "--accelerator-type=v5litepod-64", "--spot"} <= set(create)
    assert "mnv2: WAITING_FOR_RESOURCES" in result.stdout
    again = cloud("finished")  # follows the log, or sees that the run is finished
    assert again.returncode == 0
    assert did(cloud.seen) == ["create", *ONCE, *ONCE]


def test_a_preempted_pod_is_created_again_and_gets_the_same_command(cloud):
    result = cloud("preempted", "preempted", "finished", SPOT="1")
    assert result.returncode == 0, result.stderr
    again = ["delete", "create", *ONCE]
    assert did(cloud.seen) == ["create", *ONCE, *again, *again]
    starts = [call for call in calls(cloud.seen) if "docker run" in call[-1]]
    assert starts[0] == starts[1] == starts[2]
    assert "--worker=all" in starts[0]
    deletion = next(call for call in calls(cloud.seen) if "delete" in call)
    assert {"--force", "--quiet"} <= set(deletion)


@pytest.mark.parametrize("end", ["75", "134", "255", "1", "0"])  # 0: stopped after saving
def test_a_pod_with_a_failed_worker_starts_again(cloud, end):
    assert cloud(end, "finished", SPOT="0").returncode == 0
    assert did(cloud.seen) == ["create", *ONCE, *ONCE]
    assert not any("--spot" in call for call in calls(cloud.seen))


def test_pod_gives_up(cloud):
    result = cloud("2")
    assert result.returncode == 2
    assert result.stderr.startswith("error: exit code 2: ")
    result = cloud("75", "75", "finished", MAX_RESTARTS="1")
    assert result.returncode == 75
    assert "MAX_RESTARTS=1 " in result.stderr
    assert did(cloud.seen) == ["create", *ONCE * 3]
    result = cloud("1", "75", "1", "1", "finished")  # a loss that isn't finite comes again
    assert (result.returncode, result.stderr.count("\n")) == (1, 1)
    assert did(cloud.seen) == ["create", *ONCE * 7]
    result = cloud("deleted", "finished")  # somebody deleted it, so it isn't requested again
    assert result.returncode == 1
    assert result.stderr.startswith("error: mnv2 was deleted;")
    assert did(cloud.seen) == ["create", *ONCE * 8]
    result = cloud("finished", WORKDIR="/home/me/run")
    assert result.returncode == 2
    assert "WORKDIR=/home/me/run " in result.stderr
    assert "/mnt/shared" in result.stderr


def test_a_failed_request_is_repeated_max_restarts_times(cloud):
    result = cloud("finished", STATES="FAILED", MAX_RESTARTS="1")
    assert result.returncode == 75
    assert "mnv2 is FAILED" in result.stderr
    assert did(cloud.seen) == ["create", "look", "delete", "create", "look"]


def test_pod_status_and_delete(cloud):
    assert launch("tpu_pod.sh", "up", **POD).returncode == 0
    assert launch("tpu_pod.sh", "status", **POD).returncode == 0
    assert launch("tpu_pod.sh", "delete", **POD).returncode == 0
    verbs = [(call[4], call[-1]) for call in calls(cloud.seen) if call[4] != "list"]
    assert [verb for verb, _ in verbs] == ["create", "ssh", "describe", "ssh", "ssh", "ssh", "delete"]
    assert "docker stop --time=180" in verbs[-2][1]  # the run saves first
    assert not (cloud.seen / "states").exists()


def test_pod_commands_of_gcloud_are_well_formed(cloud, tmp_path):
    gcloud = next((p for p in map(pathlib.Path, os.environ["PATH"].split(":")[1:]) if (p / "gcloud").exists()), None)
    if gcloud is None:
        pytest.skip("gcloud isn't installed")
    cloud("preempted", "finished")
    for verb in ("status", "delete"):
        launch("tpu_pod.sh", verb, **POD)
    commands = {shlex.join(call).replace("\\n", "\n") for call in calls(cloud.seen)}
    commands |= {line[line.index("gcloud") :].partition(" ;;")[0] for line in worker_lines(cloud.seen, "gcloud")}
    verbs = {" ".join(command.split()[3:5]) for command in commands}
    assert verbs == {
        *(f"queued-resources {verb}" for verb in ("create", "delete", "describe", "list")),
        "tpu-vm ssh",
        "us-west4-docker.pkg.dev --quiet",
    }
    bogus = "gcloud compute tpus queued-resources create mnv2 --preemptible=maybe"
    listing = tmp_path / "commands.json"
    listing.write_text(json.dumps([{"command_string": command} for command in [*sorted(commands), bogus]]))
    result = subprocess.run(
        [gcloud / "gcloud", "meta", "lint-gcloud-commands", f"--commands-file={listing}"],
        env=os.environ | {"CLOUDSDK_CONFIG": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    *verdicts, of_bogus = [verdict["error_message"] for verdict in json.loads(result.stdout)]
    assert "--preemptible" in of_bogus  # it does look
    assert verdicts == [None] * len(commands)


def worker_lines(seen, word):
    """Returns the lines of the workers' commands that contain a word."""
    commands = [call[-1].partition("=")[2].replace("\\n", "\n") for call in calls(seen) if call[4] == "ssh"]
    return [line for command in commands for line in command.splitlines() if word in line]


def test_pod_commands_of_the_workers(cloud, fakes):
    cloud("finished")
    commands = [call[-1].partition("=")[2].replace("\\n", "\n") for call in calls(cloud.seen) if call[4] == "ssh"]
    prepare, start, follow, _ = commands
    (cloud.seen / "calls").unlink()
    fakes("sudo", '#!/usr/bin/env bash\nexec "$@"\n')
    fakes("gcloud", shell(""))
    fakes("mountpoint", shell("exit 1"))
    for name in ("apt-get", "mkdir", "mount"):
        fakes(name, shell(""))
    fakes("docker", shell('case $1 in inspect) echo "${RUNNING:-false}" ;; wait) [[ ! $GONE ]] && echo 134 ;; esac'))

    def on_worker(command, **variables):
        return subprocess.run(["bash", "-c", command], env=os.environ | variables, check=False).returncode

    assert on_worker(prepare) == 0
    assert calls(cloud.seen, "mount") == [["mount", "-t", "nfs", POD["NFS"], "/mnt/shared"]]
    assert calls(cloud.seen, "gcloud") == [["gcloud", "auth", "configure-docker", "us-west4-docker.pkg.dev", "--quiet"]]
    assert calls(cloud.seen, "docker") == [["docker", "pull", "--quiet", POD["IMAGE"]]]
    assert on_worker(start) == 0
    run = calls(cloud.seen, "docker")[-1]
    assert run[1] == "run"
    assert run[run.index(POD["IMAGE"]) + 1 :] == [*TRAIN, f"--workdir={POD['WORKDIR']}", *ODD]
    assert {"--privileged", "--network=host", "--init", "--volume=/mnt/shared:/mnt/shared"} <= set(run)
    assert on_worker(start, RUNNING="true") == 0
    assert calls(cloud.seen, "docker")[-1][1] == "inspect"  # a running container is not restarted
    assert on_worker(follow, GONE="") == 134
    assert on_worker(follow, GONE="1") == 75


# --- slurm.sbatch ------------------------------------------------------------------------------------------


@pytest.fixture
def slurm(fakes, tmp_path):
    seen = fakes("scontrol", shell(""))
    # Like srun, which kills its tasks on SIGTERM; scancel signals the tasks themselves, which save.
    fakes(
        "srun",
        shell(
            'trap "exit 137" TERM; trap "exit 0" USR1; echo $$ >"$SEEN/srun"\n'
            '[[ $CODE == wait ]] && while :; do sleep 0.05; done\n[[ $CODE == finished ]] || exit "$CODE"\n'
            'mkdir -p "$WORKDIR"; touch "$WORKDIR/summary.json"'
        ),
    )
    fakes("scancel", shell('kill -USR1 "$(<"$SEEN/srun")"'))
    variables = {"WORKDIR": str(tmp_path / "a run"), "SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "4"}
    return seen, variables


@pytest.mark.parametrize(
    ("code", "requeued", "returned"),
    [
        ("finished", False, 0),
        ("0", True, 0),  # stopped after saving
        ("75", True, 0),
        ("134", True, 0),
        ("137", True, 0),
        ("2", False, 2),
        ("1", False, 1),
        ("253", False, 253),
    ],
)
def test_slurm_job_is_requeued_unless_finished_or_the_users_error(slurm, code, requeued, returned):
    seen, variables = slurm
    result = launch("slurm.sbatch", *ODD, **variables, CODE=code)
    assert result.returncode == returned
    assert calls(seen, "scontrol") == ([["scontrol", "requeue", "7"]] if requeued else [])
    (srun,) = calls(seen, "srun")
    assert srun[srun.index("python") :] == ["python", *TRAIN, f"--workdir={variables['WORKDIR']}", *ODD]
    assert "--cpus-per-task=4" in srun


def test_slurm_forwards_sigterm_and_requeues_the_job(slurm):
    seen, variables = slurm
    job = begin("slurm.sbatch", **variables, CODE="wait")
    until((seen / "srun").exists)
    job.send_signal(signal.SIGTERM)
    out, _ = job.communicate(timeout=30)
    assert job.returncode == 0
    assert "(exit code 0)" in out
    assert [call[0] for call in calls(seen)] == ["srun", "scancel", "scontrol"]
    assert calls(seen, "scancel") == [["scancel", "--signal=TERM", "7"]]


def test_slurm_job_is_requeued_a_limited_number_of_times(slurm):
    seen, variables = slurm
    result = launch("slurm.sbatch", **variables, CODE="75", SLURM_RESTART_COUNT="3", MAX_RESTARTS="3")
    assert result.returncode == 75
    assert "(exit code 75) after MAX_RESTARTS=3 " in result.stderr
    assert not calls(seen, "scontrol")


def test_slurm_directives():
    text = (LAUNCH / "slurm.sbatch").read_text()
    directives = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?$", text, re.MULTILINE))
    assert directives["signal"] == "B:TERM@180"
    assert directives["ntasks-per-node"] == "1"
    assert directives["open-mode"] == "append"
    assert {"requeue", "nodes", "gpus-per-node", "time"} <= set(directives)
    assert text.index("#SBATCH") < text.index("\nset ")  # sbatch ignores directives after the first command


# --- until_finished.sh and the JobSet ----------------------------------------------------------------------

PYTHON = """trap 'echo stopped >>"$SEEN/stopped"; exit 0' TERM
touch "$SEEN/started"
[[ $CODE == wait ]] && while :; do sleep 0.05; done
[[ $CODE == finished ]] || exit "$CODE"
mkdir -p "$WORKDIR"; touch "$WORKDIR/summary.json\""""


@pytest.mark.parametrize(("code", "returned"), [("finished", 0), ("0", 75), ("2", 2), ("75", 75), ("134", 134)])
def test_a_container_succeeds_only_with_a_finished_run(fakes, tmp_path, code, returned):
    seen = fakes("python", shell(PYTHON))
    variables = {"WORKDIR": str(tmp_path / "a run"), "CODE": code}
    assert launch("until_finished.sh", *ODD, **variables).returncode == returned
    assert calls(seen) == [["python", *TRAIN, f"--workdir={variables['WORKDIR']}", *ODD]]


def test_a_container_that_is_stopped_saves_and_fails(fakes, tmp_path):
    seen = fakes("python", shell(PYTHON))
    container = begin("until_finished.sh", WORKDIR=str(tmp_path / "run"), CODE="wait")
    until((seen / "started").exists)
    container.send_signal(signal.SIGTERM)
    assert container.wait(30) == 75
    assert (seen / "stopped").exists()
    container.stdout.close()


JOBSETS = {jobset["metadata"]["name"]: jobset for jobset in yaml.safe_load_all((LAUNCH / "jobset.yaml").read_text())}


def job_of(jobset):
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    return replicated, job, job["template"]["spec"], container


def test_jobset_schema():
    jsonschema = pytest.importorskip("jsonschema", reason="pip install .[dev]")
    schema = json.loads((pathlib.Path(__file__).parent / "golden" / "jobset_schema.json").read_text())
    validator = jsonschema.Draft202012Validator(schema)
    for jobset in JOBSETS.values():
        assert not [error.message for error in validator.iter_errors(jobset)]
    text = (LAUNCH / "jobset.yaml").read_text()
    for right, wrong in (
        ("maxRestarts", "maxRestart"),
        ("FailJobSet", "Fail"),
        ("completions: 4", "completions: four"),
    ):
        damaged = next(yaml.safe_load_all(text.replace(right, wrong, 2)))
        assert list(validator.iter_errors(damaged)), wrong


@pytest.mark.parametrize("name", ["mnv2-tpu", "mnv2-gpu"])
def test_jobset_restarts_after_all_but_the_users_errors(name):
    assert set(JOBSETS) == {"mnv2-tpu", "mnv2-gpu"}
    policy = JOBSETS[name]["spec"]["failurePolicy"]
    replicated, job, pod, container = job_of(JOBSETS[name])
    assert policy["maxRestarts"] >= 10
    assert [(rule["action"], rule["onJobFailureReasons"]) for rule in policy["rules"]] == [
        ("FailJobSet", ["PodFailurePolicy"])
    ]
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob"
    assert rule["onExitCodes"] == {"containerName": container["name"], "operator": "In", "values": [2]}
    assert pod["restartPolicy"] == "Never"
    assert job["backoffLimit"] == 0
    assert job["parallelism"] == job["completions"]
    assert replicated["replicas"] == 1
    assert pod["terminationGracePeriodSeconds"] >= 120
    mounted = {mount["mountPath"] for mount in container["volumeMounts"]}
    environment = {variable["name"]: variable["value"] for variable in container["env"]}
    assert "/shared" in mounted
    assert environment["WORKDIR"].startswith("/shared/")
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}


def test_jobset_for_tpus_has_a_pod_for_every_host_of_the_slice():
    _, job, pod, container = job_of(JOBSETS["mnv2-tpu"])
    topology = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    chips = container["resources"]["limits"]["google.com/tpu"]
    assert job["parallelism"] * chips == math.prod(map(int, topology.split("x")))
    assert "cloud.google.com/gke-tpu-accelerator" in pod["nodeSelector"]
    annotations = JOBSETS["mnv2-tpu"]["metadata"]["annotations"]
    assert annotations["alpha.jobset.sigs.k8s.io/exclusive-topology"] == "cloud.google.com/gke-nodepool"


def test_jobset_for_gpus_names_the_coordinator_as_jobset_does():
    replicated, job, pod, container = job_of(JOBSETS["mnv2-gpu"])
    flags = dict(argument.split("=", 1) for argument in container["args"])
    assert flags["--coordinator_address"] == f"mnv2-gpu-{replicated['name']}-0-0.mnv2-gpu:8482"
    assert flags["--num_processes"] == str(job["completions"])
    assert flags["--process_id"] == "$(JOB_COMPLETION_INDEX)"
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 8
    assert "cloud.google.com/gke-accelerator" in pod["nodeSelector"]


def test_named_flags_and_configs_exist():
    help_text = cli.run("main", "--help").stdout
    arguments = [argument for jobset in JOBSETS.values() for argument in job_of(jobset)[3]["args"]]
    for name in SCRIPTS:
        arguments += re.findall(
            r"(?<![\w-])--(?:coordinator|num_proc|process_id|workdir)[\w]*", (LAUNCH / name).read_text()
        )
    for argument in arguments:
        flag, _, value = argument.partition("=")
        assert re.search(rf"{flag}\b", help_text), flag
        if flag == "--config":
            config.load(value)  # by name, in any folder


def test_dockerfile():
    lines = (LAUNCH / "Dockerfile").read_text().splitlines()
    (entry,) = [line for line in lines if line.startswith("ENTRYPOINT")]
    assert json.loads(entry.removeprefix("ENTRYPOINT ")) == ["python", *TRAIN]  # a shell would not forward SIGTERM
    installs = [line for line in lines if "pip install" in line]
    assert installs
    assert all("-c constraints.txt" in line for line in installs)
    copied = [line.split()[1:-1] for line in lines if line.startswith("COPY")]
    for path in (path for paths in copied for path in paths):
        assert (pathlib.Path(cli.ROOT) / path).exists()
    assert ["launch/until_finished.sh"] in copied
    for jobset in JOBSETS.values():
        assert job_of(jobset)[3]["command"] == ["launch/until_finished.sh"]


# --- local_multihost.sh ------------------------------------------------------------------------------------

PROCESS = """number=${@: -1}; number=${number#*=}; processes=${@: -2:1}; processes=${processes#*=}
trap 'echo stopped; exit 0' TERM
trap 'echo interrupted; exit 0' INT
[[ $STUBBORN ]] && trap '' TERM
echo "on $XLA_FLAGS, $JAX_PLATFORMS"; echo warned >&2
touch "$SEEN/$number"
until ((processes == $(ls "$SEEN" | grep -c '^[0-9]'))); do sleep 0.02; done
case $number,$ENDS in *,) exit 0 ;; 1,[0-9]*) exit "$ENDS" ;; *) while :; do sleep 0.05; done ;; esac"""


@pytest.fixture
def local(fakes, tmp_path):
    """``local(N, …)`` starts local_multihost.sh; at the end of the test none of its processes may be left."""
    python, launchers = fakes("fake_python", shell(PROCESS)).parent / "bin" / "fake_python", []
    environment = {
        "MARK": str(tmp_path),
        "PYTHON": str(python),
        "GRACE": "1",
        "ENDS": "",
        "STUBBORN": "",
        "PORT": "8483",
    }

    def run(number, *arguments, **variables):
        launchers.append(begin("local_multihost.sh", str(number), *arguments, **environment | variables))
        return launchers[-1]

    run.seen = tmp_path / "seen"
    yield run
    try:
        until(lambda: not left_over(str(tmp_path)))
    finally:
        for process in left_over(str(tmp_path)):
            process.kill()
        for process in launchers:
            process.stdout.close()
            process.wait()


def left_over(mark):
    processes = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("MARK") == mark and process.status() != psutil.STATUS_ZOMBIE:
                processes.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return processes


def test_local_processes_get_the_same_command_and_their_numbers(local):
    process = local(3, *ODD, DEVICES="2", XLA_FLAGS="--xla_a=1")
    lines = process.communicate(timeout=30)[0].splitlines()
    assert process.returncode == 0
    output = ["on --xla_a=1 --xla_force_host_platform_device_count=2, cpu", "warned"]
    assert sorted(lines) == sorted(f"[{number}] {line}" for number in range(3) for line in output)
    cluster = ["--coordinator_address=localhost:8483", "--num_processes=3"]
    expected = [["fake_python", *TRAIN, *ODD, *cluster, f"--process_id={number}"] for number in range(3)]
    assert sorted(calls(local.seen)) == expected


def test_local_exit_code_is_the_first_that_is_not_0_and_all_processes_end(local):
    start = time.monotonic()
    process = local(3, ENDS="7")
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 7
    assert time.monotonic() - start > 1  # the others had time to end by themselves
    assert sorted(line for line in out.splitlines() if "stopped" in line) == ["[0] stopped", "[2] stopped"]


@pytest.mark.parametrize(("number", "word"), [(signal.SIGTERM, "stopped"), (signal.SIGINT, "interrupted")])
def test_local_signals_are_forwarded(local, number, word):
    process = local(2, ENDS="never")
    until(lambda: all((local.seen / str(n)).exists() for n in range(2)))
    process.send_signal(number)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 0
    assert sorted(line for line in out.splitlines() if word in line) == [f"[0] {word}", f"[1] {word}"]


@pytest.mark.parametrize("stubborn", ["", "1"])
def test_local_processes_end_when_the_launcher_is_killed(local, stubborn, tmp_path):
    process = local(2, ENDS="never", STUBBORN=stubborn)
    until(lambda: all((local.seen / str(n)).exists() for n in range(2)))
    assert len(left_over(str(tmp_path))) >= 5  # the launcher, its guard, two processes and one sed for each
    process.kill()
    process.wait()
    start = time.monotonic()
    until(lambda: not left_over(str(tmp_path)))
    assert time.monotonic() - start < 10


def test_local_stubborn_processes_are_killed_after_a_failure(local):
    process = local(2, ENDS="7", STUBBORN="1")
    process.communicate(timeout=30)
    assert process.returncode == 7
