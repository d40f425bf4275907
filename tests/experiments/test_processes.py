"""A run in several processes: the same numbers as in one, and what happens when they disagree or one is lost."""

import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import pytest

from experiments.paper.char_lm import main
from experiments.training import data, processes

pytestmark = pytest.mark.usefixtures("promotes", "quick_compile")
ROOT = pathlib.Path(__file__).parents[2]
MESH = "data=2,fsdp=2,model=2"
OPTIONS = (
    f"--steps 6 --batch 8 --length 16 --mem-len 16 --dim 32 --inner-dim 64 --shallow-share 0 --mesh {MESH} "
    "--log-every 1 --eval-every 100 --save-every 2 solver:picard --solver.rtol 1e-4 --solver.max-steps 60 "
    "adjoint:implicit adjoint.solver:picard --adjoint.solver.rtol 1e-4 --adjoint.solver.max-steps 60"
).split()


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    corpus = data.load("shakespeare")
    path.write_text(corpus.vocabulary.decode(corpus.train[:6000]))
    return path


def start(run: pathlib.Path, text: pathlib.Path, *options: str, **environment) -> subprocess.Popen:
    """A process that trains; its output goes to files beside the run."""
    flags = "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0"
    environment = os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": str(ROOT), **environment}
    command = [sys.executable, "-m", "experiments.paper.char_lm", "train", "--run", run, "--data", text]
    command = [*map(str, command), *options, *OPTIONS]
    index = options[-1].rpartition(",")[2]
    with open(f"{run}{index}.out", "w") as out, open(f"{run}{index}.err", "w") as err:
        return subprocess.Popen(command, env=environment, cwd=run.parent, stdout=out, stderr=err)


def start_two(run: pathlib.Path, text: pathlib.Path) -> list[subprocess.Popen]:
    port = free_port()
    return [start(run, text, "--coordinator", f"localhost:{port},2,{index}") for index in range(2)]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def finish(*started: subprocess.Popen) -> list[int]:
    try:
        return [process.wait(timeout=300) for process in started]
    finally:
        for process in started:
            process.kill()


def metrics(run: pathlib.Path, *names: str) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: line.get(name) for name in names} for line in lines]


NUMBERS = ("step", "loss", "grad_norm", "fwd_steps", "bwd_steps", "fwd_residual", "bwd_residual")


def test_two_processes_are_one_and_a_lost_one_is_named(tmp_path, text):
    alone, cut, whole = tmp_path / "alone", tmp_path / "cut", tmp_path / "whole"
    main(["train", "--run", str(alone), "--data", str(text), *OPTIONS])  # on the eight devices of the tests
    assert finish(*start_two(whole, text)) == [0, 0]
    first, second = metrics(alone, *NUMBERS), metrics(whole, *NUMBERS)
    for name, rel in {"step": 0, "loss": 1e-5, "grad_norm": 1e-3, "fwd_steps": 0, "bwd_steps": 0}.items():
        in_one, in_two = ([line[name] for line in lines if line[name] is not None] for lines in (first, second))
        assert in_one == pytest.approx(in_two, rel=rel), name
    one, two = (json.loads((run / "report.json").read_text()) for run in (alone, whole))
    assert two["valid_loss"] == pytest.approx(one["valid_loss"], rel=1e-5)
    # What two have saved one restores, on another mesh: a finished run is measured again.
    other = ["data=4,seq=2" if option == MESH else option for option in OPTIONS]
    main(["train", "--run", str(whole), "--data", str(text), *other])
    again = json.loads((whole / "report.json").read_text())
    assert again["steps"] == 6 and again["valid_loss"] == pytest.approx(two["valid_loss"], rel=1e-5)
    # The first prints, and only it; Gloo's threads write to both, and into each other's lines.
    ours = re.compile(r"step \d/6: loss|parameters, from step|valid_loss")
    printed = [set(ours.findall(pathlib.Path(f"{whole}{i}.out").read_text())) for i in range(2)]
    assert printed == [{*(f"step {k}/6: loss" for k in range(1, 7)), "parameters, from step", "valid_loss"}, set()]

    started = start_two(cut, text)
    deadline = time.monotonic() + 200
    while not (cut / "checkpoints/2/manifest.json").exists():
        assert time.monotonic() < deadline and all(process.poll() is None for process in started)
        time.sleep(0.05)
    started[1].kill()
    lost = time.monotonic()
    code, killed = finish(*started)
    assert time.monotonic() - lost < 60 and killed == -signal.SIGKILL and code != 0
    said = pathlib.Path(f"{cut}0.err").read_text()
    assert re.search(r"Task 1 |task:1 |stopped sending heartbeats\):\s+1\b", said), said
    # The same command continues, bit for bit.
    assert finish(*start_two(cut, text)) == [0, 0]
    assert metrics(cut, *NUMBERS) == second


def test_processes_that_disagree_leave_before_they_compile(tmp_path, text):
    other, port = tmp_path / "other.txt", free_port()
    other.write_text(text.read_text()[::-1])
    address = f"localhost:{port},2"
    started = [
        start(tmp_path / "run", text, "--coordinator", f"{address},0"),
        start(tmp_path / "run", other, "--seed", "1", "--coordinator", f"{address},1"),
    ]
    assert finish(*started) == [1, 1]
    said = pathlib.Path(f"{tmp_path / 'run'}0.err").read_text()
    assert "the processes disagree: what differs from process 0 is" in said and "seed in process 1" in said
    assert "text in process 1" in said and not (tmp_path / "run").exists()


def test_a_coordinator_that_is_not_there_is_named_in_time(tmp_path, text):
    address = f"localhost:{free_port()},2,1"
    began = time.monotonic()
    (code,) = finish(start(tmp_path / "run", text, "--coordinator", address, DEQ_JAX_JOINING="5"))
    assert code != 0 and time.monotonic() - began < 60
    said = pathlib.Path(f"{tmp_path / 'run'}1.err").read_text()
    assert f"--coordinator {address}: joining, for at most 5 s" in said and "DEADLINE_EXCEEDED" in said


@pytest.mark.parametrize("coordinator", ["localhost", "localhost:1,2", "localhost:1,2,2", "localhost:1,two,0"])
def test_a_coordinator_is_an_address_a_number_and_a_place(coordinator):
    with pytest.raises(ValueError, match=r"--coordinator must be auto or HOST:PORT,COUNT,INDEX"):
        with processes.joined(coordinator):
            pass


def test_one_process_asks_nobody():
    assert processes.is_first() and processes.from_first(lambda: {"a": 1}) == {"a": 1}
    with pytest.raises(OSError, match="full"):
        processes.from_first(lambda: (_ for _ in ()).throw(OSError("full")))
    processes.check_same({"seed": 1})
