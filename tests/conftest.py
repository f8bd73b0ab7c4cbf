"""What every test shares: the --full flag and the paths of the models and data that lie beside the project."""

import os
import shutil
import signal
import tempfile
from pathlib import Path

import pytest
import torch

from tests.toy import Toy

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
ENVIRONMENT = os.environ


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="also run the long matrices (tests marked 'full')")


def pytest_configure(config):
    # A report takes a second or two of every run; the tests of reports ask for it.
    os.environ["ADALORA_REPORT"] = "0"
    # A shell starts what is put in the background with Ctrl-C ignored, and what tests start would inherit that.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # A killed run leaves a lock in DeepSpeed's build folder and every later run waits for it: build in a private one.
    if "TORCH_EXTENSIONS_DIR" not in os.environ:
        folder = os.environ["TORCH_EXTENSIONS_DIR"] = tempfile.mkdtemp(prefix="torch_extensions_")
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
    # The locks of a run that a test kills are removed: they must not be those of another worker's build.
    if worker := os.environ.get("PYTEST_XDIST_WORKER"):
        whole = Path(os.environ["TORCH_EXTENSIONS_DIR"])
        os.environ["TORCH_EXTENSIONS_DIR"] = str(whole / worker)
        if (whole / "built").is_dir():  # tests/run.sh compiled once for all
            shutil.copytree(whole / "built", whole / worker)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Keep a file, whose fixtures are costly, on one worker, and with it what has the machine's SLURM, sshd and network
    namespaces to itself. (pytest 9.2 does not let xdist 3.8 name groups by a mark.)"""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            path = nodeid.split("::")[0]
            return "tests/cluster" if path.startswith("tests/cluster/") else path

    return ByFile(config, log)


def pytest_collection_modifyitems(config, items):
    # What takes longest comes first, so that workers end together.
    items.sort(key=lambda item: item.path.name != "test_quickstart.py")
    if config.getoption("--full"):
        return
    skip = pytest.mark.skip(reason="a long matrix; run it with --full")
    for item in items:
        if item.get_closest_marker("full"):
            item.add_marker(skip)


def pytest_terminal_summary(terminalreporter):
    if stages := os.environ.get("ADALORA_FAILED_STAGES"):
        terminalreporter.section("earlier stages")
        terminalreporter.line(f"failed before pytest, see above: {stages}")


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    if not SHARED.is_dir():
        pytest.skip(f"needs the folder {SHARED}, which is not here")
    return SHARED


@pytest.fixture(scope="session")
def stories260k(shared_dir) -> Path:
    """A real Llama of 260 k parameters with its tokenizer."""
    return _existing(shared_dir / "models" / "stories260k")


@pytest.fixture(scope="session")
def data_dir(shared_dir) -> Path:
    """banking77, gsm8k, e2e_nlg and sgd_chat, each in its folder."""
    return _existing(shared_dir / "data")


@pytest.fixture(scope="session")
def deepspeed_ops() -> None:
    """For tests whose ranks use DeepSpeed under torchrun: its compilation is done before their timeout begins."""
    from tests.distributed.launcher import build_deepspeed_ops

    build_deepspeed_ops()


def _existing(path: Path) -> Path:
    if not path.exists():
        pytest.skip(f"needs {path}, which is not here")
    return path


@pytest.fixture(autouse=True)
def one_environment():
    """Undo what datasets does when it works with processes: it puts a copy into os.environ's place, and rich goes on
    reading the one that it was imported with."""
    os.environ = ENVIRONMENT  # noqa: B003
    yield
    os.environ = ENVIRONMENT  # noqa: B003


@pytest.fixture
def offline(monkeypatch):
    """As with HF_HUB_OFFLINE=1, which huggingface_hub reads when it is imported."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture
def toy():
    torch.manual_seed(0)
    return Toy()


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 32, (8, 12), generator=generator) for _ in range(60)]
