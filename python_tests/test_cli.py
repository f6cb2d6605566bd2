"""``python -m masked_kernels`` in processes of its own."""

import json
import re
import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import pytest
import torch

import masked_kernels as mk
from masked_kernels import info
from masked_kernels.__main__ import main
from masked_kernels.backends import reference

PACKAGE = Path(mk.__file__).parent
BACKENDS = sys.modules["masked_kernels.backends"]  # the package; mk.backends is its function


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "masked_kernels", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model = mk.models.create_model("convmixer", dim=8, depth=1)
    mk.mask_model_(model, mk.recipes.random_padding(1e-1))
    mk.save_masked(model, tmp_path / "model.mk")
    return tmp_path / "model.mk"


def test_info_as_text_and_as_json() -> None:
    done = run("info", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    facts = json.loads(done.stdout)
    assert facts["masked_kernels"] == mk.__version__
    assert facts["packages"]["torch"] == torch.__version__
    assert facts["backends"] == mk.backends()
    assert facts["backends"]["reference"] is None
    assert set(facts["environment"]) == set(info.ENVIRONMENT)


def test_info_text_names_every_backend(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    for name, reason in mk.backends().items():
        state = "available" if reason is None else re.escape(f"unavailable: {reason}")
        assert re.search(rf"^backend {name} +{state}$", text, re.M)


def test_info_knows_every_environment_variable_that_is_read() -> None:
    sources = [*PACKAGE.rglob("*.py"), *(PACKAGE.parent / "csrc").rglob("*.cpp")]
    reads = re.compile(r'(?:getenv\(|environ\S*|VARIABLE = )\s*"(MASKED_KERNELS_\w+)"')
    found = {name for path in sources for name in reads.findall(path.read_text())}
    assert "MASKED_KERNELS_BACKEND" in found
    assert found <= set(info.ENVIRONMENT)


def test_selftest_passes_on_every_available_backend() -> None:
    done = run("selftest")
    assert (done.returncode, done.stderr) == (0, "")
    for name, reason in mk.backends().items():
        assert re.search(rf"^{'ok' if reason is None else 'skipped'} +{name} ", done.stdout, re.M)
    assert " 0 failed," in done.stdout


def test_selftest_finds_a_wrong_backend(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The reference with a linear layer 1 % off and a pack that sets every bit."""
    name = f"{BACKENDS.__name__}.broken"
    broken = ModuleType(name)
    broken.__dict__.update(vars(reference), __name__=name, __spec__=ModuleSpec(name, None))
    broken.masked_linear = lambda *args: reference.masked_linear(*args) * 1.01
    broken.pack = lambda mask: reference.pack(mask | True)
    monkeypatch.setitem(sys.modules, name, broken)
    monkeypatch.setattr(BACKENDS, "ORDER", ("broken", "reference"))
    assert main(["selftest"]) == 1
    text = capsys.readouterr().out
    assert re.search(r"^failed +broken +bits: differ from the reference: pack, unpack", text, re.M)
    assert re.search(r"^failed +broken +linear, dense weight float32: output: error ", text, re.M)
    assert re.search(r"^ok +broken +conv2d, dense weight float32$", text, re.M)
    assert not re.search(r"^failed +reference", text, re.M)


def test_inspect(saved: Path, tmp_path: Path) -> None:
    done = run("inspect", str(saved), "--json")
    assert (done.returncode, done.stderr) == (0, "")
    facts = json.loads(done.stdout)
    assert facts["sizes"]["file_bytes"] == saved.stat().st_size
    assert facts["model"] == {"name": "convmixer", "arguments": {"dim": 8, "depth": 1}}
    assert [layer["name"] for layer in facts["layers"]] == [
        "stem.0",
        "blocks.0.depthwise.0",
        "blocks.0.pointwise.0",
        "head",
    ]
    assert facts["layers"][0]["density"] == 0.5


def test_inspect_as_text(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(saved)]) == 0
    text = capsys.readouterr().out
    assert "create_model('convmixer', dim=8, depth=1)" in text
    assert f"{saved.stat().st_size:,}" in text
    assert re.search(r"^head +linear +10x8 +0\.5000 +prototype/0, period 21 ", text, re.M)


def test_errors_are_one_line_and_no_traceback(saved: Path) -> None:
    saved.write_bytes(saved.read_bytes()[:-1])
    done = run("inspect", str(saved))
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(rf"error: .*{saved.name}: truncated: .*\n", done.stderr)


def test_errors_of_the_command_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["inspect", str(tmp_path / "absent")]) == 1
    assert "absent" in capsys.readouterr().err
    for wrong in ([], ["no-such-command"], ["inspect"]):
        with pytest.raises(SystemExit) as stopped:
            main(wrong)
        assert stopped.value.code == 2
