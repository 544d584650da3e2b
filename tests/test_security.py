"""What could run code from elsewhere is nowhere in the code, or in one place only; secrets are written nowhere."""

import ast
import json
import os
import runpy
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_prep.errors import UserError
from data_prep.readers.hub import find_hub_shards
from tests.pretend_secrets import SECRETS, files_with_secrets, pretend_secrets
from tests.repository_rules import ROOT, tracked_files

# By pattern: the only files that may use it.
ONLY_IN = {
    "unpickling": {"pretrain/checkpoints/safe_pickle.py"},
    "loading of a Megatron checkpoint": {
        "pretrain/checkpoints/checkpointing.py",
        "soak/comparison.py",
    },  # that of its own runs
    "code of a model folder": {"evaluation/huggingface_model.py"},
}

_UNPICKLERS = {"load", "loads", "Unpickler", "open", "read_pickle"}
_PICKLES = {
    "pickle",
    "_pickle",
    "cPickle",
    "cloudpickle",
    "dill",
    "joblib",
    "marshal",
    "shelve",
    "pandas",
    "pd",
}
_SHELLS = {
    "os.system",
    "os.popen",
    "subprocess.getoutput",
    "subprocess.getstatusoutput",
    "asyncio.create_subprocess_shell",
}
# Of the environment that they are given these use variables that they name, or that they take away.
_TAKE_FEW_VARIABLES = {"work_slice", "hide_secrets", "kept_variables"}
_SAFE_YAML = {
    "safe_load",
    "safe_load_all",
    "safe_dump",
    "safe_dump_all",
    "YAMLError",
    "SafeLoader",
    "SafeDumper",
}


def security_problems(source: str) -> Iterator[str]:
    """Names of the patterns that `source` uses."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield from _problems_of_name(f"{node.module}.{alias.name}")
        elif isinstance(node, ast.Attribute):
            yield from _problems_of_name(ast.unparse(node))
        elif isinstance(node, ast.Call):
            yield from _problems_of_call(node)


def _problems_of_name(name: str) -> Iterator[str]:
    module, _, attribute = name.rpartition(".")
    if (module in _PICKLES and attribute in _UNPICKLERS) or name == "torch.jit.load":
        yield "unpickling"
    if attribute in ("FileSystemReader", "load_state_dict_from_url"):  # unpickle what they read
        yield "unpickling"
    if module.endswith("dist_checkpointing") and attribute.startswith("load"):
        yield "loading of a Megatron checkpoint"
    if module == "yaml" and attribute not in _SAFE_YAML:
        yield "yaml that makes objects"
    if name in _SHELLS:
        yield "a shell"
    if module == "os.environ" and attribute in ("items", "values", "copy"):
        yield "the whole environment"


def _problems_of_call(call: ast.Call) -> Iterator[str]:
    function = ast.unparse(call.func)
    options = {option.arg: ast.unparse(option.value) for option in call.keywords}
    if function in ("eval", "exec", "builtins.eval", "builtins.exec"):
        yield "code from text"
    given = {
        ast.unparse(argument)
        for argument in (*call.args, *(o.value for o in call.keywords if o.arg != "env"))
    }
    if "os.environ" in given and function.rpartition(".")[2] not in _TAKE_FEW_VARIABLES:
        yield "the whole environment"
    if options.get("shell", "False") != "False":
        yield "a shell"
    if options.get("allow_pickle", "False") != "False":
        yield "unpickling"
    if function == "torch.load" and options.get("weights_only") != "True":
        yield "unpickling"
    if options.get("trust_remote_code", "False") != "False":
        yield "code of a model folder"


def test_nothing_from_elsewhere_is_run() -> None:
    found: dict[str, set[str]] = {}
    for path in tracked_files(".py"):
        for problem in security_problems((ROOT / path).read_text()) if path.parts[0] != "tests" else ():
            found.setdefault(problem, set()).add(str(path))
    assert found == ONLY_IN, "more than may be, or an exception that is needed no more"


@pytest.mark.parametrize(
    "bad",
    [
        "import pickle\npickle.load(stream)",
        "pickle.loads(data)",
        "from pickle import loads",
        "class Mine(pickle.Unpickler): ...",
        "shelve.open(path)",
        "pd.read_pickle(path)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=trusted)",
        "torch.jit.load(path)",
        "from torch.distributed.checkpoint import FileSystemReader",
        "numpy.load(path, allow_pickle=True)",
        "dist_checkpointing.load(state, folder)",
        "dist_checkpointing.load_plain_tensors(folder)",
        "from megatron.core.dist_checkpointing import load",
        "yaml.load(text, Loader=yaml.Loader)",
        "from yaml import full_load",
        "eval(text)",
        "exec(text)",
        "subprocess.run(command, shell=True)",
        "subprocess.run(command, shell=asked)",
        "os.system(command)",
        "from os import popen",
        "json.dumps(dict(os.environ))",
        "write_json_whole(path, content=os.environ)",
        "os.environ.items()",
        "AutoModel.from_pretrained(folder, trust_remote_code=True)",
        "load_dataset(name, trust_remote_code=trusted)",
    ],
)
def test_what_would_run_is_found(bad: str) -> None:
    assert list(security_problems(bad))


@pytest.mark.parametrize(
    "good",
    [
        "model.eval()",
        "pickle.UnpicklingError",
        "json.load(stream)",
        "torch.load(path, weights_only=True)",
        "yaml.safe_load(text)",
        "numpy.load(path)",
        "subprocess.run(command, shell=False)",
        "AutoModel.from_pretrained(folder)",
        "model.load_state_dict(state)",
        "subprocess.run(command, env=os.environ)",
        "os.environ.get('RANK')",
    ],
)
def test_what_runs_nothing_may_stay(good: str) -> None:
    assert not list(security_problems(good))


def test_the_script_of_a_data_set_is_not_run(tmp_path: Path) -> None:
    """Beside the data lies what older releases of `datasets` would have run. The twin runs it."""
    folder, canary = tmp_path / "set", tmp_path / "canary"
    folder.mkdir()
    script = folder / "set.py"
    script.write_text(f"import os\nos.mkdir({str(canary)!r})\n")
    (folder / "train.jsonl").write_text(json.dumps({"text": "words"}) + "\n")
    with pytest.raises(UserError, match=r"scripts are no longer supported, but found set.py"):
        find_hub_shards(f"hub:{folder}")
    assert not canary.exists()
    runpy.run_path(str(script))
    assert canary.exists()


def prepare_data(folder: Path) -> None:
    """From corpora to a blend."""
    from data_prep.blend import BlendConfig, blend
    from data_prep.sample_corpus import SampleCorpusConfig, make_corpora
    from data_prep.tokenize_corpus import TokenizeConfig, tokenize_corpus
    from data_prep.train_tokenizer import TrainTokenizerConfig, train_tokenizer

    corpora, tokenizer = folder / "corpora", folder / "tokenizer"
    make_corpora(SampleCorpusConfig(output=corpora, size_mb=0.5))
    train_tokenizer(TrainTokenizerConfig(corpora=corpora, output=tokenizer, vocab_size=1024))
    for source in ("slimpajama", "starcoder", "proof_pile_2", "wudao"):
        given = {"source": source, "input": str(corpora / source), "output": folder / "tokenized" / source}
        tokenize_corpus(TokenizeConfig(**given, tokenizer=tokenizer, validation_fraction=0.2))  # type: ignore[arg-type]
    blend(
        BlendConfig(
            tokenized=folder / "tokenized",
            tokenizer=tokenizer,
            output=folder / "blend",
            total_tokens=20_000,
            shard_tokens=20_000,
            validation_tokens=1_000,
        )
    )


def test_secrets_are_written_nowhere(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """In no file, name or line. The twin is a file that says what the environment is."""
    with pretend_secrets():
        prepare_data(tmp_path)
        assert len(list(tmp_path.rglob("*.bin"))) > 1
        assert not files_with_secrets(tmp_path)
        printed = capfd.readouterr()
        assert not [secret for secret in SECRETS.values() if secret in printed.out + printed.err]
        (tmp_path / "environment.txt").write_text(str(dict(os.environ)))
        assert files_with_secrets(tmp_path) == [tmp_path / "environment.txt"]
