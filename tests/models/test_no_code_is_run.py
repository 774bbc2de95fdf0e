"""No code that lies in a model's folder is ever run, whatever its configuration asks for."""

import io
import json
from pathlib import Path

import pytest

from tli_engine.cli import main
from tli_engine.testing import save_tiny_model


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_beside_the_weights_is_left_alone(
    file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    model, ran = save_tiny_model(tmp_path / "model", "llama"), tmp_path / "ran"
    (model / "evil.py").write_text(f"open({str(ran)!r}, 'w').close()\nclass Evil: pass\n")
    values = json.loads((model / file).read_text())
    if file == "config.json":
        values["auto_map"] = {"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil"}
    else:
        values |= {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
    (model / file).write_text(json.dumps(values))
    # transformers would ask "Do you wish to run the custom code? [y/N]"
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 5))

    status = main(["scan", str(model), "--limit", "20"])

    assert not ran.exists()
    assert "custom code? [y/N]" not in capfd.readouterr().out
    assert status in (0, 2)
