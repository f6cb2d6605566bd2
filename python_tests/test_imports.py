"""The dependency direction of docs/architecture.md, lean imports, and the public names."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import masked_kernels as mk

PACKAGE = Path(mk.__file__).parent
REPOSITORY = PACKAGE.parent

LAYERS = {
    "backends": set(),
    "_checks": set(),
    "_text": set(),
    "_ops": {"backends"},
    "mask": {"_ops", "_checks", "backends"},
    "draw": set(),
    "prototype": {"_ops", "_checks", "backends", "draw"},
    "rules": {"_ops", "_checks", "backends", "mask"},
    "autograd": {"_ops"},
    "_bound": {"_ops", "backends", "mask", "prototype"},
    "functional": {
        *("_bound", "_ops", "autograd", "_checks", "backends"),
        *("mask", "prototype", "rules"),
    },
    "norm": {"_ops", "autograd", "_checks", "backends"},
    "nn": {
        *("functional", "norm", "_ops", "_checks", "_text", "backends"),
        *("draw", "mask", "prototype", "rules"),
    },
    "recipes": {"nn", "rules"},
    "pruning": {"_checks", "mask", "prototype", "rules", "nn", "backends"},
    "models": {"nn"},
    "storage": {"_checks", "_text", "draw", "mask", "prototype", "rules", "nn", "models", "_host"},
    "distributed": {"_ops", "_checks", "backends", "mask", "rules", "nn"},
    "training": {
        "backends",
        "pruning",
        "mask",
        "prototype",
        "rules",
        "nn",
        "models",
        "recipes",
        "storage",
        "distributed",
    },
}


def imports_of(path: Path) -> set[str]:
    """Dotted names of the package's own modules that a file imports, relative imports resolved."""
    parts = path.relative_to(REPOSITORY).with_suffix("").parts
    package = parts if path.name == "__init__.py" else parts[:-1]
    package = package[:-1] if path.name == "__init__.py" and package[-1] == "__init__" else package
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            name = ".".join((*base, *(node.module or "").split("."))).strip(".")
            found |= {f"{name}.{alias.name}" for alias in node.names} | {name}
    return {name for name in found if name.split(".")[0] == "masked_kernels"}


def layer_of(name: str) -> str | None:
    parts = name.split(".")
    return parts[1] if len(parts) > 1 else None


def test_dependencies_point_one_way() -> None:
    wrong = []
    for path in PACKAGE.rglob("*.py"):
        own = path.relative_to(PACKAGE).with_suffix("").parts[0]
        if own in LAYERS:
            used = {layer_of(name) for name in imports_of(path)} & set(LAYERS) - {own}
            wrong += [
                f"{path.relative_to(PACKAGE)} imports {layer}" for layer in used - LAYERS[own]
            ]
    assert wrong == []


def test_every_module_has_a_layer() -> None:
    top_of_stack = {"__init__", "__main__", "info", "selftest", "_host"}
    names = {path.relative_to(PACKAGE).with_suffix("").parts[0] for path in PACKAGE.rglob("*.py")}
    assert names - top_of_stack <= set(LAYERS)


def test_backends_do_not_import_one_another() -> None:
    backends = {"reference", "cpu", "cuda", "triton"}
    for path in (PACKAGE / "backends").rglob("*.py"):
        own = path.relative_to(PACKAGE / "backends").with_suffix("").parts[0]
        others = {
            name.split(".")[2]
            for name in imports_of(path)
            if name.startswith("masked_kernels.backends.")
        }
        assert not (others & backends - {own}), path


def test_torch_headers_only_in_the_glue() -> None:
    for path in (REPOSITORY / "csrc").rglob("*"):
        if path.suffix in {".h", ".cpp", ".cu", ".cuh"} and path.parent.name != "torch":
            assert "#include <torch/" not in path.read_text(), path


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=REPOSITORY
    )


def test_import_is_lean() -> None:
    """No Triton, no extension, no optional package, no CUDA initialisation, nothing compiled."""
    done = run("""
import sys
for name in ("triton", "matplotlib", "tqdm", "sklearn", "scipy", "masked_kernels._host"):
    sys.modules[name] = None
import torch
import masked_kernels as mk
assert not torch.cuda.is_initialized()
assert not {"masked_kernels.training", "masked_kernels.distributed"} & set(sys.modules)
assert not any(name.startswith("torch._inductor") for name in sys.modules)
with mk.use_backend("reference"):
    y = mk.masked_linear(torch.ones(1, 2), torch.ones(1, 2),
    mk.PackedMask.from_bool(torch.tensor([[True, False]])))
print(y.tolist())
""")
    assert done.stdout == "[[1.0]]\n", done.stderr


def test_import_works_without_the_extension() -> None:
    done = run("""
import importlib.util, torch
torch.ops.load_library = lambda path: (_ for _ in ()).throw(OSError("blocked"))
import masked_kernels as mk
assert mk.backends()["reference"] is None
assert "blocked" in mk.backends()["cpu"], mk.backends()["cpu"]
mask = mk.TopK()(torch.randn(3, 33))
print(mask.count())
""")
    assert done.stdout == "50\n", done.stderr


@pytest.mark.parametrize("name", mk.__all__)
def test_public_names_are_documented(name: str) -> None:
    member = getattr(mk, name)
    assert member.__doc__, name


def test_all_is_sorted_and_complete() -> None:
    assert list(mk.__all__) == sorted(
        mk.__all__, key=lambda n: (not n.isupper(), not n[0].isupper(), n)
    )
    contract = """PackedMask TopK Threshold NM Prototype prototype_period masked_linear
        masked_conv2d scored_linear scored_conv2d nn MaskConfig recipes mask_model_ pack_model_
        materialize_ models save_masked load_masked backends use_backend summary"""
    assert set(contract.split()) <= set(mk.__all__)
