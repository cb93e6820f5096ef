"""Imports run one way, files stay short, and importing the package is cheap."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import cnnfamily

PACKAGE = Path(cnnfamily.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))


def imports(file: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_run_one_way(file):
    allowed = {
        "models": {"cnnfamily.models", "cnnfamily.errors", "cnnfamily.scaling", "cnnfamily.rng"},
        "data": {"cnnfamily.data", "cnnfamily.errors", "cnnfamily.parallel", "cnnfamily.rng"},
    }
    found = {name for name in imports(file) if name.startswith("cnnfamily")}
    assert not {name for name in imports(file) if name.split(".")[0] in ("experiments", "tests", "configs")}
    commands = ("preview.py", "prepare.py")  # of `data`: nothing may import them, and they may import anything
    assert not {f"cnnfamily.data.{name.removesuffix('.py')}" for name in commands} & found
    if file.parent.name in allowed and file.name not in commands:
        roots = {".".join(name.split(".")[:2]) for name in found} - {"cnnfamily"}
        assert roots <= allowed[file.parent.name]
    if file.stem in ("step", "losses", "rng", "optim", "scaling"):
        outside = {"pathlib", "json", "os", "cnnfamily.checkpoint", "cnnfamily.runlog", "cnnfamily.data"}
        assert not outside & imports(file), "the mathematics of a step knows no disk"


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_a_file_can_be_read_in_one_sitting(file):
    assert len(file.read_text().splitlines()) <= 350


def test_public_names_exist_and_are_no_modules():
    for name in cnnfamily.__all__:
        assert callable(getattr(cnnfamily, name)), name
        assert not (PACKAGE / f"{name}.py").exists(), "a function must not bear the name of a command's module"
    with pytest.raises(AttributeError, match="no attribute 'lenet'"):
        _ = cnnfamily.lenet


def test_importing_the_package_loads_nothing_heavy():
    heavy = ("orbax", "matplotlib", "tensorflow", "tensorflow_datasets", "grain", "PIL", "rich")
    code = f"import sys, cnnfamily; cnnfamily.create_model; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = ast.literal_eval(done.stdout)
    assert set(loaded) <= {"rich"}, "flax imports rich; nothing else may come along"
