"""What ``hypha`` itself names: exactly that, lazily, and as docs/python.md shows it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import hypha
from hypha.messages import LedgerFile

ROOT = Path(__file__).parent.parent
RECORDED = ROOT / "tests" / "recorded" / "versions" / "0.1.0" / "states" / "scheduler" / "recorded"
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def test_the_exported_names() -> None:
    assert sorted(hypha.__all__) == [
        "AllocationFailed",
        "CaFiles",
        "ConfigError",
        "DataConfig",
        "DataError",
        "Dataset",
        "GatewayConfig",
        "HyphaError",
        "IdentityError",
        "JobFailed",
        "JobResult",
        "LedgerFile",
        "LedgerRound",
        "MadeFiles",
        "Manifest",
        "NetworkError",
        "PrepareOptions",
        "Prepared",
        "Refused",
        "Replayed",
        "SchedulerConfig",
        "WorkerConfig",
        "__version__",
        "evaluate",
        "load_config",
        "load_dataset_directory",
        "make_node",
        "make_org",
        "make_root",
        "prepare",
        "read_ledger",
        "replay",
        "run_data",
        "run_gateway",
        "run_job",
        "run_worker",
    ]


@pytest.mark.parametrize("name", hypha.__all__)
def test_each_name_is_there_and_has_a_docstring(name: str) -> None:
    found = getattr(hypha, name)
    assert found.__doc__
    assert name == "__version__" or found.__name__ == name


def test_no_other_name_is_there() -> None:
    with pytest.raises(AttributeError, match="no attribute 'open_node'"):
        _ = hypha.open_node


def test_the_import_alone_imports_nothing() -> None:
    program = (
        "import sys; before = set(sys.modules); import hypha; print(sorted(set(sys.modules) - before)); "
        "hypha.HyphaError; assert 'trio' not in sys.modules and 'pydantic' not in sys.modules"
    )
    told = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert told.stdout.strip() == "['__future__', 'hypha']"


def test_the_page_on_python_works_as_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = "".join(f"{row}.0,{row + 1}.0,{'ab'[row % 2]}\n" for row in range(20))
    Path("flowers.csv").write_text(f"length,width,kind\n{rows}")
    Path("worker.toml").write_text("resources = { memroy = 4 }\n")
    Path("state").mkdir()
    Path("state/recorded").symlink_to(RECORDED)
    source = "\n".join(BLOCK.findall((ROOT / "docs" / "python.md").read_text(encoding="utf-8")))
    names: dict[str, object] = {}
    exec(compile(source, "docs/python.md", "exec"), names)
    told = capsys.readouterr().out
    assert "20 samples in 1 slices" in told
    assert "['length', 'width', 'kind']" in told or "['kind', 'length', 'width']" in told
    assert "resources.memroy" in told
    ledger = names["ledger"]
    assert isinstance(ledger, LedgerFile)
    assert ledger.rounds
    assert f"{ledger.rounds[-1].theta[:16]}\n" in told
