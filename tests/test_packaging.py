"""What a user installs and starts: dependencies, scripts, container images, and nothing of the authors' machines."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
TEST_EXTRA = PROJECT["optional-dependencies"]["test"]
DOCKERFILES = ["docker/Dockerfile", "docker/Dockerfile.cpu"]
IMPORT_NAMES = {"yaml": "pyyaml"}


def requirements(lines: list[str]) -> dict[str, Requirement]:
    return {canonicalize_name(requirement.name): requirement for requirement in map(Requirement, lines)}


def constraints() -> dict[str, Version]:
    """{name: pinned version} of constraints.txt, of which every line is a pin."""
    lines = [line.split("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines()]
    pins = requirements([line for line in lines if line])
    for name, pin in pins.items():
        assert [specifier.operator for specifier in pin.specifier] == ["=="], f"{name} is not pinned with =="
    return {name: Version(next(iter(pin.specifier)).version) for name, pin in pins.items()}


def project_files() -> list[Path]:
    """Every file git tracks or would track."""
    if not (shutil.which("git") and (ROOT / ".git").exists()):
        pytest.skip("needs git and a checkout")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    return [path for name in listing.stdout.decode().split("\0") if name and (path := ROOT / name).is_file()]


def text_of(path: Path) -> str:
    content = path.read_bytes()
    return "" if b"\0" in content else content.decode(errors="replace")


def shell_scripts() -> list[Path]:
    return [path for path in project_files() if re.match(r"#!.*\b(ba)?sh\b", text_of(path)[:100])]


# Dependencies -----------------------------------------------------------------------------------------------------


def test_every_dependency_has_a_tested_version_within_its_range():
    """Else two installations of one commit differ, or pip finds no solution."""
    pins, wanted = constraints(), requirements(PROJECT["dependencies"] + TEST_EXTRA)
    assert wanted.keys() - pins.keys() == {"torch"}
    assert {
        name: str(pins[name]) for name, want in wanted.items() if name in pins and pins[name] not in want.specifier
    } == {}


def test_torch_is_left_to_the_machine_and_set_up_uses_its_range():
    """Else constraints.txt would replace the CUDA torch of a container."""
    assert not [name for name in constraints() if name == "torch" or name.startswith(("nvidia", "triton", "cuda"))]
    script = (ROOT / "launch" / "setup.sh").read_text()
    torch = next(line for line in PROJECT["dependencies"] if line.startswith("torch>"))
    assert f'TORCH_RANGE="{torch}"' in script
    tested = re.search(r'TORCH_WITHOUT_GPU="torch==([\d.]+)"', script)
    assert tested and Version(tested[1]) in Requirement(torch).specifier
    low, high = re.findall(r'torch\.__version__ [<>]=? "([\d.]+)"', script)
    assert torch == f"torch>={low},<{high}"


def test_attaching_by_hand_imports_no_trainer():
    """Else every hand-written loop waits for libraries that only a run needs: 5.8 s instead of 2.9 s."""
    script = "import sys; from adalora_scale import RankAllocator, inject_adalora; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    heavy = {"accelerate", "bitsandbytes", "datasets", "deepspeed", "peft", "transformers.training_args", "trl"}
    assert heavy.isdisjoint(done.stdout.split())


def test_every_library_the_package_imports_is_declared():
    """Else an installation without a lucky transitive dependency fails on import."""
    declared = {canonicalize_name(name) for name in requirements(PROJECT["dependencies"])}
    extras = PROJECT["optional-dependencies"]
    brought = [line for extra in ("quickstart", "gpu", "sweep") for line in extras[extra]]
    optional = {canonicalize_name(name) for name in requirements(brought)}
    missing = set()
    for path in (ROOT / "adalora_scale").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                modules = [node.module or ""]
            else:
                continue
            for name in {module.split(".")[0] for module in modules} - sys.stdlib_module_names - {"adalora_scale"}:
                # What an extra brings may be imported where it is used, by code that does without it.
                allowed = declared | optional if node.col_offset else declared
                if canonicalize_name(IMPORT_NAMES.get(name, name)) not in allowed:
                    missing.add(f"{path.relative_to(ROOT)} imports {name}")
    assert missing == set()


def test_the_licence_is_the_one_declared():
    """Else nobody may use the project."""
    assert PROJECT["license"] == "Apache-2.0"
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text and "Version 2.0, January 2004" in text and "END OF TERMS" in text


# Scripts ----------------------------------------------------------------------------------------------------------


def test_shell_scripts_parse():
    """Else a script fails at the line nobody ran."""
    scripts = shell_scripts()
    assert {"launch/setup.sh", "tests/run.sh", ".ci/run"} <= {path.relative_to(ROOT).as_posix() for path in scripts}
    for script in scripts:
        result = subprocess.run(["bash", "-n", script], capture_output=True, text=True)
        assert result.returncode == 0, result.stderr


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not installed")
def test_shell_scripts_pass_shellcheck():
    """Else an unquoted path with a space breaks a launch."""
    result = subprocess.run(
        ["shellcheck", "-x", "-S", "warning", *shell_scripts()], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout


def test_set_up_refuses_what_it_cannot_do_in_one_line(tmp_path):
    """Else a user reads a shell trace, or loses a folder."""
    script = ROOT / "launch" / "setup.sh"
    (tmp_path / "kept").touch()

    def refusal(*arguments: str, **environment: str) -> str:
        variables = {"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": str(tmp_path)} | environment
        result = subprocess.run(["bash", script, *arguments], env=variables, capture_output=True, text=True)
        assert result.returncode == 1
        assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
        return result.stderr

    assert "--oops" in refusal("--oops")
    empty = str(tmp_path / "new")
    assert "Python 3.11 or newer" in refusal(ADALORA_PYTHON="no-such-python", ADALORA_VENV=empty)
    assert "not a Python environment" in refusal(ADALORA_PYTHON=sys.executable, ADALORA_VENV=str(tmp_path))
    assert (tmp_path / "kept").exists()


def test_continuous_integration_runs_what_developers_run():
    """Else the two drift apart."""
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111
    commands = [line for line in script.read_text().splitlines() if line and not line.startswith(("#", "set ", "cd "))]
    assert commands == ["bash tests/run.sh"]


# Nothing of the authors' machines -----------------------------------------------------------------------------------

REGISTRIES = (
    r"(pypi|pythonhosted|anaconda|npmjs|rubygems|quay|docker)\.(org|com|io)\b",
    r"\bdownload\.pytorch\.org|\b(nvcr|ghcr|gcr)\.io\b|\bpypi\.[a-z]+\.",
)
PRIVATE = (r"(?<![\w.~}-])/(work|root)(?![\w-])", r"(?<!torch)\." + "library" + r"\b")


@pytest.mark.parametrize("pattern", REGISTRIES + PRIVATE)
def test_no_file_names_a_registry_or_a_private_path(pattern):
    """Else the project works only where it was written."""
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}"
        for path in project_files()
        for number, line in enumerate(text_of(path).splitlines(), start=1)
        if re.search(pattern, line)
    ]
    assert found == []


def test_the_search_for_private_paths_finds_them():
    """Else the test above passes on anything."""
    registries, private = "|".join(REGISTRIES), "|".join(PRIVATE)
    for text in ("https://pypi" + ".org/simple", "https://download." + "pytorch.org/whl/cpu", "nvcr" + ".io/nvidia"):
        assert re.search(registries, text), text
    for text in ("cd /wo" + "rk/main", "'/ro" + "ot/x'", "see ." + "library/README", 'open("/wo' + 'rk")'):
        assert re.search(private, text), text
    for text in ("/workspace/x", "frame/work/x", "$dir/root", "a library/", "torch.library.custom_op", "/rootless"):
        assert not re.search(private, text), text


# Container images ---------------------------------------------------------------------------------------------------


def instructions(dockerfile: str) -> list[tuple[str, str]]:
    lines = [line for line in (ROOT / dockerfile).read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n", " ", "\n".join(lines))
    pairs = [line.split(maxsplit=1) for line in joined.splitlines() if line.strip()]
    return [(name.upper(), " ".join(value.split())) for name, value in pairs]


@pytest.mark.parametrize("dockerfile", DOCKERFILES)
def test_an_image_has_a_pinned_base_and_does_not_run_as_root(dockerfile):
    """Else it changes by itself, or a training job owns its host."""
    steps = instructions(dockerfile)
    assert steps[0][0] == "FROM"
    assert re.fullmatch(r"[a-z/]+:\d+\.\d+[\w.-]*", steps[0][1]), steps[0][1]
    users = [value for name, value in steps if name == "USER"]
    assert users and int(users[-1]) >= 1000
    assert any(name == "RUN" and f"useradd --uid {users[-1]} --create-home" in value for name, value in steps)


@pytest.mark.parametrize("dockerfile", DOCKERFILES)
def test_hadolint_finds_nothing(dockerfile):
    """Nothing builds the images here, so a linter that knows Docker's pitfalls, and shellcheck in RUN, reads them."""
    hadolint = Path(sys.executable).with_name("hadolint")
    # DL3008: Debian and Ubuntu keep one version of a package; the base image's tag pins the release.
    command = [hadolint, "--no-color", "--ignore", "DL3008", ROOT / dockerfile]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_hadolint_finds_mistakes(tmp_path):
    """Else the test above passes on anything."""
    (tmp_path / "Dockerfile").write_text("FROM debian\nRUN cd /tmp && apt-get install curl\nUSER root\n")
    result = subprocess.run(
        [Path(sys.executable).with_name("hadolint"), tmp_path / "Dockerfile"], capture_output=True, text=True
    )
    assert result.returncode == 1 and {"DL3006", "DL3002", "DL3014"} <= set(re.findall(r"DL\d+", result.stdout))


@pytest.mark.parametrize("dockerfile", DOCKERFILES)
def test_an_image_installs_the_project_as_tested(dockerfile):
    """Else an image runs versions nobody tested."""
    runs = " && ".join(value for name, value in instructions(dockerfile) if name == "RUN")
    pip_installs = re.findall(r"pip install ([^&]*)", runs)
    if not pip_installs:
        assert "bash launch/setup.sh" in runs
    for arguments in pip_installs:
        assert "--constraint constraints.txt" in arguments
        # and nothing else: pyproject.toml names the rest
        assert arguments.split("--editable ")[1].strip() in (".", '".[gpu]"')


def test_the_cuda_image_keeps_a_torch_in_range():
    """Else pip replaces the image's torch, or refuses to install."""
    base = re.fullmatch(r"pytorch/pytorch:([\d.]+)-cuda[\d.]+-cudnn\d+-runtime", instructions(DOCKERFILES[0])[0][1])
    assert base
    assert Version(base[1]) in requirements(PROJECT["dependencies"])["torch"].specifier
    runs = " && ".join(value for name, value in instructions(DOCKERFILES[0]) if name == "RUN")
    assert "'torch==' + torch.__version__" in runs and "--constraint /tmp/torch.txt" in runs


def test_the_images_see_the_files_they_install_and_run():
    """Else .dockerignore makes an image that cannot be built."""
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    needed = [
        "pyproject.toml",
        "constraints.txt",
        "LICENSE",
        "README.md",
        "adalora_scale",
        "configs",
        "launch",
        "tests",
        "docker",
        ".ci",
    ]
    unneeded = [".git", ".venv", "runs", "logs", ".mypy_cache"]
    assert [name for name in needed + unneeded if any(fnmatch(name, pattern) for pattern in allowed)] == needed


def test_the_cpu_image_uses_a_tested_python():
    """Else the image cannot install the pinned wheels."""
    version = re.match(r"python:(\d+\.\d+)-slim", instructions(DOCKERFILES[1])[0][1])
    assert version and version[1] in PROJECT["requires-python"]


@pytest.mark.parametrize("module", ["adalora_scale", "adalora_scale.cli"])
def test_version_names_what_a_report_of_a_fault_needs(module):
    """Else every report begins with a question, or a job script with the module's older name does nothing."""
    command = [sys.executable, "-m", module, "--version"]
    said = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    assert said.startswith(f"adalora-scale {PROJECT['version']} (")
    assert f"transformers {constraints()['transformers']}" in said
