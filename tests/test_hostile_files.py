"""Files that somebody made to deceive: links, code in task files, planted libraries, escapes, tampered checkpoints."""

import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import aqtx
from aqtx import cli
from aqtx.checkpoint.locate import locate
from aqtx.errors import InputError, printable
from aqtx.evaluate.task_code import refuse_code
from aqtx.formats import kernel_cache
from aqtx.runs.arms import open_arms
from aqtx.runs.fingerprint import SourceWatch
from tests.tiny import write_checkpoint

RECIPE = {
    "version": 1,
    "passes": [{"assign_plan": {"method": "uniform", "candidates": ["mxfp6"]}}, "quantize", "emit"],
    "report": False,
}
SITE = "model.layers.1.mlp.experts.2.up_proj"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run of a random model: (source, output)."""
    root = tmp_path_factory.mktemp("made")
    source = write_checkpoint(root / "source")
    aqtx.apply({**RECIPE, "model": {"source": str(source)}}, output=str(root / "run"))
    return source, root / "run"


@pytest.fixture
def copy(made, tmp_path):
    """The run's folder, to be tampered with."""
    folder = tmp_path / "copy"
    folder.mkdir()
    for file in made[1].iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def change_config(folder: Path, **changes: object) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"].update(changes)
    file.write_text(json.dumps(config))


def quantization(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def change_tensors(folder: Path, **changes: torch.Tensor | None) -> None:
    [file] = folder.glob("*.safetensors")
    tensors = load_file(file) | changes
    save_file({key: value for key, value in tensors.items() if value is not None}, file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": {key: file.name for key, value in tensors.items() if value is not None}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_what_was_written_loads_with_and_without_its_checksums(copy):
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(aqtx.load(copy).module()(ids), aqtx.load(copy, verify=True).module()(ids))


@pytest.mark.parametrize("version", [99, 0, None, "1", True])
def test_another_layout_version_is_refused(copy, version):
    change_config(copy, layout_version=version)
    with pytest.raises(InputError, match=r"layout_version .* is not 1"):
        aqtx.load(copy)


def test_formats_that_were_swapped_are_refused_although_every_shape_fits(copy):
    formats = quantization(copy)["formats"]
    formats[SITE] = "mxfp6_e3m2"
    change_config(copy, formats=formats)
    with pytest.raises(InputError, match="formats or edits are not those that were written"):
        aqtx.load(copy)


def test_edits_that_were_doubled_or_added_are_refused(copy):
    change_config(copy, edits=[{"edit": "hadamard", "weight": f"{SITE}.weight", "block": 32, "seed": None}])
    with pytest.raises(InputError, match="formats or edits are not those that were written"):
        aqtx.load(copy)


def test_a_folder_without_a_digest_loads_with_a_word(copy):
    told = quantization(copy)
    config = json.loads((copy / "config.json").read_text())
    del told["sha256"]
    (copy / "config.json").write_text(json.dumps({**config, "quantization_config": told}))
    with pytest.warns(UserWarning, match="carries no digest"):
        aqtx.load(copy)


@pytest.mark.parametrize(
    ("part", "value", "words"),
    [
        ("scale", torch.zeros(1, 4, dtype=torch.uint8), r"scale is U8 \[1, 4\], mxfp6_e2m3 of \[64, 128\] has U8"),
        ("scale", torch.zeros(0, 4, dtype=torch.uint8), r"scale is U8 \[0, 4\]"),
        ("scale", torch.zeros(64, 4), r"scale is F32"),
        ("qdata", torch.zeros(64, 95, dtype=torch.uint8), r"qdata is U8 \[64, 95\]"),
        ("scale", None, "scale is missing, and mxfp6_e2m3 has it"),
        ("zero_point", torch.zeros(64, 4, dtype=torch.uint8), "mxfp6_e2m3 has no such part"),
    ],
)
def test_parts_of_another_shape_or_dtype_are_told_before_anything_is_computed(copy, part, value, words):
    change_tensors(copy, **{f"{SITE}.weight.{part}": value})
    with pytest.raises(InputError, match=words):
        aqtx.load(copy)


@pytest.mark.parametrize("name", ["model-00001-of-00001.safetensors", "plan.json", "config.json"])
def test_one_flipped_byte_is_found_by_its_checksum(copy, name):
    data = bytearray((copy / name).read_bytes())
    data[-5] ^= 1
    (copy / name).write_bytes(bytes(data))
    with pytest.raises(InputError):
        aqtx.load(copy, verify=True)
    with pytest.raises(InputError, match=name):
        open_arms([str(copy)], None)


def test_a_source_that_changes_during_a_run_is_found_at_once_and_by_the_watch(made, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for file in made[0].iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    program, watch = aqtx.trace(source), SourceWatch(source)
    watch.check()
    weights = source / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])  # a mapped page beyond the end would be a bus error
    with pytest.raises(InputError, match=r"model\.safetensors was changed while it was being read"):
        program.weights.get("model.norm.weight")
    with pytest.raises(InputError, match=r"model\.safetensors was changed while the run"):
        watch.check()


def test_resume_of_a_finished_run_compares_weights_and_text(made, tmp_path):
    source = write_checkpoint(tmp_path / "source")
    text = tmp_path / "text.txt"
    text.write_text("one")
    recipe = {**RECIPE, "model": {"source": str(source)}, "calibration": {"source": str(text)}}
    done = aqtx.apply(recipe, output=str(tmp_path / "run"))
    assert aqtx.apply(recipe, output=str(tmp_path / "run"), resume=True).data == done.data
    text.write_text("two")
    with pytest.raises(InputError, match=r"calibration text.*text\.txt"):
        aqtx.apply(recipe, output=str(tmp_path / "run"), resume=True)
    text.write_text("one")
    write_checkpoint(source, **{"model.norm.weight": torch.ones(128, dtype=torch.bfloat16)})
    with pytest.raises(InputError, match=r"source.*model\.safetensors"):
        aqtx.apply(recipe, output=str(tmp_path / "run"), resume=True)


def test_the_output_cannot_be_the_model(made):
    with pytest.raises(InputError, match="is where the model is read from"):
        aqtx.apply({**RECIPE, "model": {"source": str(made[1])}}, output=str(made[1]), overwrite=True)


@pytest.mark.parametrize("name", ["tokenizer_secret", "model.safetensors", "config.json", "sub"])
def test_links_that_leave_a_checkpoint_folder_are_refused(tmp_path, name):
    folder = write_checkpoint(tmp_path / "source")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_text("secret")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(outside if name == "sub" else outside / "secret")
    with pytest.raises(InputError, match=f"{name} is a link that leaves the checkpoint folder"):
        aqtx.trace(folder)


def test_links_inside_a_folder_and_to_a_folder_are_followed(tmp_path):
    folder = write_checkpoint(tmp_path / "source")
    (folder / "model.safetensors").rename(folder / "weights")
    (folder / "model.safetensors").symlink_to("weights")
    (tmp_path / "link").symlink_to(folder)
    aqtx.trace(tmp_path / "link")


def test_a_shard_below_a_linked_folder_is_refused(tmp_path):
    folder = write_checkpoint(tmp_path / "source")
    (tmp_path / "outside").mkdir()
    (folder / "model.safetensors").rename(tmp_path / "outside" / "a.safetensors")
    (folder / "real").mkdir()
    (folder / "real" / "sub").symlink_to(tmp_path / "outside")
    keys = load_file(tmp_path / "outside" / "a.safetensors")
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": dict.fromkeys(keys, "real/sub/a.safetensors")})
    )
    with pytest.raises(InputError, match="is a link that leaves"):
        aqtx.trace(folder)


TASK = {
    "task": "mine",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "x.jsonl"}},
    "doc_to_text": "{{query}}",
    "metric_list": [{"metric": "acc"}],
}


@pytest.mark.parametrize(
    "text",
    [
        "process_docs: !function evil.run",
        "metric_list: [{metric: !function evil.run}]",
        "x: &a !function evil.run\ny: *a",
        "? !function evil.run\n: 1",
        "include: ../../outside.yaml",
        "doc_to_text: '{{ query.__class__ }}'",
        "metric_list: [{metric: ./evil}]",
        "dataset_path: ./evil.py",
        "dataset_kwargs: {trust_remote_code: true}",
        "broken: [ !function evil.run",
    ],
)
def test_a_task_file_that_runs_code_is_refused_by_file(tmp_path, text):
    (tmp_path / "outside.yaml").write_text("process_docs: !function evil.run")
    folder = tmp_path / "tasks" / "deep"
    folder.mkdir(parents=True)
    (folder / "mine.yaml").write_text(text)
    with pytest.raises(InputError, match=r"\.yaml: .*") as caught:
        refuse_code(tmp_path / "tasks")
    assert "--allow-task-code" in caught.value.problems[-1]


def test_a_plain_task_file_is_let_through(tmp_path):
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(TASK))
    (tmp_path / "words.yaml").write_text("doc_to_text: a__b says !function\ninclude: mine.yaml\n")
    refuse_code(tmp_path)


def test_eval_and_check_refuse_code_in_tasks_and_run_none_of_it(tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(TASK) + "process_docs: !function evil.run\n")
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\ndef run(x): return x\n")
    words = ["eval", "tinymoe", "--perplexity", "none", "--tasks", "mine", "--include-path", str(tmp_path)]
    assert cli.main(words) == 2
    assert "--allow-task-code" in capsys.readouterr().err
    told = ["evaluate.tasks=[mine]", f"evaluate.include_path={tmp_path}"]
    assert cli.main(["check", "quickstart", *told]) == 2
    assert "evaluate.include_path:" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["AQTX_CACHE_DIR", "XDG_CACHE_HOME"])
@pytest.mark.parametrize("value", ["", "relative"])
def test_the_kernel_cache_is_never_the_current_folder(monkeypatch, tmp_path, name, value):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("AQTX_CACHE_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv(name, value)
    folder = kernel_cache.cache_folder()
    assert folder.is_absolute()
    if value == "" or name == "XDG_CACHE_HOME":
        assert folder == tmp_path / "home" / ".cache" / "aqtx"
    assert not folder.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def built(folder: Path, content: bytes = b"code") -> Path:
    made = folder / "staging" / "lib.so"
    made.parent.mkdir(parents=True)
    made.write_bytes(content)
    folder.chmod(0o700)
    kernel_cache.keep(made, folder / "lib.so")
    return folder / "lib.so"


@pytest.mark.parametrize("what", ["cut", "other", "no note", "writable", "note writable", "folder writable", "link"])
def test_a_library_that_others_could_have_written_or_that_is_not_whole_is_built_again(tmp_path, what):
    library = built(tmp_path / "cache")
    note = library.with_name("lib.so.sha256")
    assert kernel_cache.is_trusted(library)
    if what == "cut":
        library.write_bytes(b"co")
    elif what == "other":
        library.write_bytes(b"evil")
    elif what == "no note":
        note.unlink()
    elif what == "link":
        library.rename(tmp_path / "elsewhere.so")
        library.symlink_to(tmp_path / "elsewhere.so")
    else:
        {"writable": library, "note writable": note, "folder writable": library.parent}[what].chmod(0o777)
    assert not kernel_cache.is_trusted(library)


def test_a_library_of_another_user_is_not_trusted(tmp_path, monkeypatch):
    library = built(tmp_path / "cache")
    monkeypatch.setattr(os, "getuid", lambda: os.stat(library).st_uid + 1)
    monkeypatch.setenv("AQTX_CACHE_DIR", str(library.parent))
    assert not kernel_cache.is_trusted(library)
    monkeypatch.undo()
    if os.getuid() == 0:  # only root can give a folder away
        os.chown(library.parent, 12345, 12345)
        monkeypatch.setenv("AQTX_CACHE_DIR", str(library.parent))
        folder = kernel_cache.cache_folder()
        assert folder != library.parent
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_nothing_in_a_name_commands_the_terminal(tmp_path, capsys):
    folder = write_checkpoint(tmp_path / "source", **{"\x1b[2Jevil\x07\u202e.weight": torch.ones(2)})
    assert cli.main(["plan", "quickstart", f"model.source={folder}", f"output={tmp_path / 'out'}"]) == 2
    told = capsys.readouterr().err
    assert "\\x1b[2Jevil\\x07\\u202e" in told
    assert not set(told) & {"\x1b", "\x07", "\u202e"}


def test_printable_keeps_what_can_be_shown():
    assert printable("naïve 模型\u3000\u00a0\n\t$x$") == "naïve 模型\u3000\u00a0\n\t$x$"
    assert printable("\x1b]0;t\x07 \x9b1m \ud800 \r") == "\\x1b]0;t\\x07 \\x9b1m \\ud800 \\r"


STOPPED = """
import os, signal, sys
signal.signal(getattr(signal, sys.argv[1]), signal.SIG_DFL)  # a test run under nohup ignores SIGHUP, and so would this
from aqtx import cli
from aqtx.passes.annotate_alpha import AnnotateAlpha
AnnotateAlpha.run = lambda *_: os.kill(os.getpid(), getattr(signal, sys.argv[1]))
sys.exit(cli.main(["apply", "quickstart", "output=" + sys.argv[2], "evaluate.max_tokens=300"]))
"""


@pytest.mark.parametrize("name", ["SIGTERM", pytest.param("SIGHUP", marks=pytest.mark.slow)])
def test_a_run_that_is_asked_to_end_says_that_it_can_be_resumed(tmp_path, name):
    done = subprocess.run(
        [sys.executable, "-c", STOPPED, name, str(tmp_path / "run")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert f"aqtx: error: stopped by {name}; the same command with --resume goes on" in done.stderr
    assert not [path for path in tmp_path.iterdir() if "lock" in path.name]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_locate_tells_a_name_that_no_file_system_takes():
    for name in ("x" * 5000, "a\0b"):
        with pytest.raises(InputError):
            locate(name)
