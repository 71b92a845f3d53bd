"""The layout keeps its promises: imports go one way, and nothing breaks `import transformers`."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted([*ROOT.glob("specdec/**/*.py"), *ROOT.glob("kernels/**/*.py"), *ROOT.glob("cli/**/*.py")])


def imported(path):
    """All modules that a file imports, at the top or inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def uses(path, package):
    return any(name == package or name.startswith(package + ".") for name in imported(path))


def test_no_package_is_called_kernels_or_cli():
    # Transformers imports names from a package called `kernels` when it finds one.
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "cli" / "__init__.py").exists()


def test_transformers_imports_at_the_repository_root():
    subprocess.run(
        [sys.executable, "-c", "import transformers, torch; transformers.LlamaConfig()"], cwd=ROOT, check=True
    )


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path):
    name = path.relative_to(ROOT).as_posix()
    if name.startswith("kernels/"):
        assert not uses(path, "specdec")
    if not name.startswith("cli/"):
        assert not uses(path, "specdec_cli")
    if name.startswith("specdec/policies/"):
        assert not uses(path, "specdec.drafters")
        assert not uses(path, "specdec.controllers")
    if name.startswith(("specdec/drafters/", "specdec/controllers/")):
        assert not uses(path, "specdec.policies")
    if name.startswith("specdec/controllers/"):
        assert not uses(path, "specdec.drafters")
    if uses(path, "transformers"):
        assert name.startswith(("specdec/models/", "cli/")), "transformers stays in specdec/models"
    if uses(path, "hypothesis"):
        assert name == "specdec/testing.py"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_annotations_stay_real(path):
    # Postponed annotations would hide the shapes from the checker.
    assert "__future__" not in set(imported(path))


@pytest.mark.parametrize("statement", ["import specdec", "import specdec_cli.main"])
def test_light_imports_stay_light(statement):
    heavy = ("torch", "transformers", "rich", "hypothesis", "pydantic", "scipy", "matplotlib", "pyarrow", "jinja2")
    check = f"import sys; {statement}; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_public_name_resolves():
    import specdec

    for name in specdec.__all__:
        assert getattr(specdec, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        specdec.nothing  # noqa: B018
