"""Commands: --help, and errors of the user as one clear line with exit code 2."""

import importlib
import json
import pathlib
import subprocess
import sys

import pytest

from t5x_lite import __main__ as console
from t5x_lite import cli, config, convert, evaluate, export, generate
from tests import tiny_run

DEMO = "--config=configs/demo.py"


def python(*args: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *args], capture_output=True, text=True)


@pytest.mark.parametrize("command", sorted(console.COMMANDS))
def test_help_shows_an_example_and_the_flags(command, capsys, monkeypatch):
    module = importlib.import_module(f"t5x_lite.{command}")
    monkeypatch.setattr(sys, "argv", [f"{command}.py", "--help"])
    with pytest.raises(SystemExit) as stopped:
        cli.run(module.main)
    shown, wrong = capsys.readouterr()
    assert stopped.value.code == 0 and not wrong
    assert f"python -m t5x_lite.{command} " in shown
    if command == "train":
        assert "--config.optim.learning_rate=" in shown


def test_the_console_script_lists_its_commands():
    done = python("-m", "t5x_lite")
    assert done.returncode == 0
    assert all(command in done.stdout for command in console.COMMANDS)
    done = python("-m", "t5x_lite", "trian")
    assert done.returncode != 0 and "no command 'trian'" in done.stderr


def test_a_user_error_is_short_and_exits_with_2(tmp_path):
    done = python(
        "-m", "t5x_lite", "train", DEMO, f"--workdir={tmp_path / 'w'}",
        "--config.optim.lerning_rate=1",
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("error: --config.optim.lerning_rate")
    assert "--config.optim.learning_rate" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "w").exists()


def parse(*argv: str):
    return cli.parse_config("doc", [*argv], workdir="directory")


def test_overrides_get_the_type_of_their_field():
    raw, found = parse(
        DEMO,
        "--workdir=w",
        "--config.steps=70",
        "--config.optim.learning_rate",
        "2",
        "--config.model.gated=False",
        "--noconfig.model.scan",
        "--config.objective.density=0.3",
        "--config.optim.lr_rules=(('.*', 0.5),)",
        "--config.data.vocab=bytes",
    )
    cfg = config.freeze(raw)
    assert found.workdir == "w" and cfg.steps == 70
    assert cfg.optim.learning_rate == 2.0 and isinstance(cfg.optim.learning_rate, float)
    assert not cfg.model.gated and not cfg.model.scan
    assert cfg.objective["density"] == 0.3
    assert cfg.optim.lr_rules == ((".*", 0.5),)
    assert cfg.data.inputs_length == 128  # from the file


def test_the_argument_after_the_colon_reaches_get_config():
    assert parse("--config=configs/demo.py:smoke", "--workdir=w")[0].steps == 2


@pytest.mark.parametrize(
    "override, message",
    [
        ("--config.optim.lerning_rate=1", "mean --config.optim.learning_rate"),
        ("--config.learning_rate=1", "mean --config.optim.learning_rate"),
        ("--config.modle.d_model=1", "mean --config.model.d_model"),
        ("--config.steps.x=1", "no config key 'steps.x'"),
        ("--config.qwxz=1", "Known here: .*steps"),
        ("--config.steps=many", "--config.steps=many.*int"),
        ("--config.steps", "--config.steps needs a value"),
        ("--config.data={}", "--config.data is a section"),
        ("--config.model.gated=perhaps", "--config.model.gated=perhaps"),
    ],
)
def test_wrong_overrides_name_the_way_out(override, message):
    with pytest.raises((ValueError, KeyError), match=message):
        parse(DEMO, "--workdir=w", override)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("demo.py", None, "there is no file"),
        ("a.txt", "x", "neither a .py file nor"),
        ("a.py", "x = 1", "does not define get_config"),
        ("a.py", "def get_config(arg=''):\n    return 1 / 0", "division.*line 2"),
        ("a.py", "def get_config(", "SyntaxError"),
        ("a.py", "def get_config(arg=''):\n    return None", "returned NoneType"),
        ("a.py", "def get_config():\n    raise ValueError('no')", "ValueError: no"),
    ],
)
def test_config_files_that_cannot_be_used(name, content, message, tmp_path):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        cli.load_config(str(tmp_path / name))


def test_a_missing_config_file_names_the_nearest():
    with pytest.raises(FileNotFoundError, match="Did you mean configs/demo.py"):
        cli.load_config("configs/dmo.py")


def test_unknown_flags_name_the_nearest(capsys):
    with pytest.raises(SystemExit) as stopped:
        parse(DEMO, "--workdir=w", "--wrkdir=w")
    assert stopped.value.code == 2
    assert "'--workdir'" in capsys.readouterr().err


def test_run_keeps_the_traceback_of_a_defect():
    def wrong_input():
        raise cli.config_lib.ConfigError(["config.steps=0 must be at least 1."])

    def ours():
        config.freeze({"steps": 0})

    def defect():
        json.loads("{")

    with pytest.raises(SystemExit) as stopped:
        cli.run(ours)
    assert stopped.value.code == 2
    for main in (defect, wrong_input):  # raised outside the package
        with pytest.raises(ValueError):
            cli.run(main)


# ---- generate and export on a real checkpoint


def test_generate_fills_a_text_and_a_file(tiny_workdir, tmp_path, capsys):
    lines = ["It is a truth ___ acknowledged", "", "___ and <extra_id_3>"]
    (tmp_path / "in.txt").write_text("\n".join(lines))
    flags = [f"--workdir={tiny_workdir}", "--max_length=8"]
    generate.main([*flags, f"--text={lines[0]}"])
    one = capsys.readouterr().out
    assert one.startswith("It is a truth [") and one.endswith("] acknowledged\n")
    generate.main(
        [*flags, f"--input={tmp_path / 'in.txt'}", f"--output={tmp_path / 'o.jsonl'}"]
    )
    assert not capsys.readouterr().out  # it is all in the file
    rows = [json.loads(r) for r in (tmp_path / "o.jsonl").read_text().splitlines()]
    assert [r["text"] for r in rows] == [lines[0], lines[2]]
    assert [len(r["fills"]) for r in rows] == [1, 2]
    assert all(r["score"] < 0 for r in rows)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--text=no gap"], "no gap"),
        (["--text=" + "___ " * 101], "101 gaps.*100 sentinels"),
        (["--input=EMPTY"], "is empty"),
        (["--input=BINARY"], "not UTF-8"),
        (["--input=NOGAP"], "line 2 has no gap"),
        (["--input=MISSING"], "no such file"),
        (["--text=___", "--workdir=MISSING"], "has no checkpoint"),
        (["--text=___", "--step=4"], "--step=4 is not in"),
        (["--text=___", "--top_k=3"], "top_k=3"),
        (["--text=___", "--max_length=0"], "--max_length=0"),
        (["--text=___", "--batch_size=0"], "--batch_size=0"),
        (["--text=___", "--output=MISSING/x.jsonl"], "directory is missing"),
    ],
)
def test_generate_refuses(flags, message, tiny_workdir, tmp_path):
    (tmp_path / "EMPTY").write_text("\n \n")
    (tmp_path / "BINARY").write_bytes(b"\xff\xfe\x00___")
    (tmp_path / "NOGAP").write_text("a ___\nb\n")
    for name in ("EMPTY", "BINARY", "NOGAP", "MISSING"):
        flags = [f.replace(name, str(tmp_path / name)) for f in flags]
    with pytest.raises((ValueError, OSError), match=message):
        generate.main([f"--workdir={tiny_workdir}", *flags])
    assert not (tmp_path / "MISSING").exists()


def test_generate_refuses_another_vocabulary(tmp_path):
    model_file = tmp_path / "v.model"
    model_file.write_bytes(pathlib.Path("data/vocab_4k.model").read_bytes())
    tiny_run.save(tmp_path / "run", str(model_file))
    # The same pieces with one more byte: another file, another fingerprint.
    with model_file.open("ab") as f:
        f.write(b"\x30\x00")
    with pytest.raises(ValueError, match="not the vocabulary of the run"):
        generate.main([f"--workdir={tmp_path / 'run'}", "--text=___"])


def test_export_refuses_a_missing_workdir(tmp_path):
    with pytest.raises(FileNotFoundError, match="has no checkpoint"):
        export.main([f"--workdir={tmp_path / 'no'}", f"--output={tmp_path / 'out'}"])
    assert not list(tmp_path.iterdir())


def test_another_run_is_refused_under_the_flag_that_names_it(tiny_workdir, tmp_path):
    ours, none = f"--workdir={tiny_workdir}", tmp_path / "none"
    with pytest.raises(FileNotFoundError, match=f"^--as={none} has no checkpoint"):
        evaluate.main([ours, f"--as={none}"])
    with pytest.raises(FileNotFoundError, match=f"^--from={none} has no checkpoint"):
        convert.main([f"--from={none}", f"--to=hf:{tmp_path / 'out'}"])
    tiny_run.save(tmp_path / "other", "data/vocab_4k.model")
    with pytest.raises(
        ValueError, match="--as=.*other .* it has another vocabulary. G"
    ):
        evaluate.main([ours, f"--as={tmp_path / 'other'}"])


def test_reading_a_run_leaves_a_half_written_checkpoint_alone(tiny_workdir):
    """Another process may just be writing it."""
    half = tiny_workdir / "checkpoints" / "9.orbax-checkpoint-tmp"
    half.mkdir()
    generate.main([f"--workdir={tiny_workdir}", "--text=a ___", "--max_length=8"])
    assert half.is_dir()
    half.rmdir()
