"""`gqaprune export` as it is typed."""

from __future__ import annotations

from support.served import served_checkpoint

from hf_gqaprune.cli import main


def test_both_formats_say_what_was_decided(tmp_path, capsys):
    served_checkpoint("first attention removed", tmp_path / "model")
    model, gguf, plain = (str(tmp_path / name) for name in ("model", "model.gguf", "plain"))
    assert main(["export", model, "--to", "gguf", "--dtype", "q8_0", "-o", gguf]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "architecture deci, matrices q8_0; ollama reads model.Modelfile"
    assert lines[1].startswith("1 removed blocks are stored as blocks of zeros, 3,120 parameters")
    assert lines[-1] == f"written to {gguf}"
    assert main(["export", model, "--to", "llama", "-o", plain]) == 2
    assert "--pad makes them 8 / 4 and 96 with" in capsys.readouterr().err
    assert main(["export", model, "--to", "llama", "--pad", "-o", plain]) == 0
    assert "every layer has 8 query / 4 KV heads and FFN 96" in capsys.readouterr().out


def test_bad_input_is_one_line(tmp_path, capsys):
    for line in (["demo", "--to", "onnx"], ["demo", "--to", "gguf", "--dtype", "q4"], ["nowhere", "--to", "gguf"]):
        assert main(["export", *line, "-o", str(tmp_path / "out")]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_plan_says_where_its_model_can_be_served(tmp_path, capsys):
    line = ["plan", "demo", "--backbone-ratio", "0.3", "--criterion", "magnitude", "-o", str(tmp_path / "plan.json")]
    assert main(line) == 0
    served = capsys.readouterr().out.split("served by\n")[1].splitlines()
    assert served[0] == "  transformers: yes, by trust_remote_code, or with hf_gqaprune imported"
    assert served[2].startswith("  llama.cpp: yes, as GGUF of architecture deci; Q8_0 falls back to F16 in layer")
    assert served[4].startswith("  engines for plain Llama: no, layers differ")
