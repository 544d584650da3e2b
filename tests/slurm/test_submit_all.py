"""The whole way as a chain of jobs: what is submitted, and that it leads from corpora to a Hugging Face folder."""

import json
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from pretrain.recipes import dump_recipe
from tests.pretrain.tiny_runs import tiny_recipe
from tests.repository_rules import ROOT
from tests.slurm.cluster import Cluster
from tests.slurm.conftest import SMALL, make_checkout


def _dry_run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["slurm/submit_all.sh", "--dry-run", *arguments],
        cwd=ROOT,
        env=os.environ | {"BASE_RUN": "none/base", "EXPORT": "none/hf"} | environment,
        capture_output=True,
        text=True,
    )


def _submitted(*arguments: str, **environment: str) -> dict[str, list[str]]:
    """Script -> words of the sbatch command that a dry run prints for it."""
    done = _dry_run(*arguments, **environment)
    assert done.returncode == 0, done.stderr
    commands = [shlex.split(line) for line in done.stdout.splitlines() if line.startswith("sbatch ")]
    return {next(Path(word).stem for word in words if word.endswith(".sh")): words for words in commands}


def test_each_step_waits_for_those_it_needs() -> None:
    commands = _submitted("--array-tasks", "4")
    waits = {
        name: [word.removeprefix("--dependency=") for word in words if word.startswith("--dependency=")]
        for name, words in commands.items()
    }
    assert waits == {
        "tokenize": [],
        "blend": ["afterok:TOKENIZE_JOB"],
        "convert_base": [],
        "pretrain_idm": ["afterok:BLEND_JOB:CONVERT_BASE_JOB"],
        "pretrain_policy": ["afterok:PRETRAIN_IDM_JOB"],
        "export": ["afterok:PRETRAIN_POLICY_JOB"],
    }
    # Otherwise what waits for a failed job would wait for ever.
    assert all("--kill-on-invalid-dep=yes" in words for words in commands.values())
    assert [name for name, words in commands.items() if "--array=0-3" in words] == ["tokenize", "blend"]


def test_a_later_start_waits_for_nothing() -> None:
    commands = _submitted("--from", "pretrain_policy")
    assert list(commands) == ["pretrain_policy", "export"]
    assert not [word for word in commands["pretrain_policy"] if word.startswith("--dependency")]


def test_a_base_that_is_there_is_not_imported_again(tmp_path: Path) -> None:
    commands = _submitted("--from", "blend", BASE_RUN=str(tmp_path))
    assert list(commands) == ["blend", "pretrain_idm", "pretrain_policy", "export"]
    assert "--dependency=afterok:BLEND_JOB" in commands["pretrain_idm"]


def test_facts_of_the_site_and_the_container_reach_each_job() -> None:
    image = "two words; $(no)"
    site = {"CPU_JOB_OPTIONS": "--partition=cpu --mem=8G", "TRAINING_JOB_OPTIONS": "--nodes=2"}
    for name, words in _submitted("--container-image", image, **site).items():
        assert words[-2:] == ["--container-image", image]
        assert ("--nodes=2" in words) == name.startswith("pretrain_")
        assert ("--mem=8G" in words) == (not name.startswith("pretrain_"))


@pytest.mark.parametrize(
    ("arguments", "environment", "complaint"),
    [
        (("--from", "nowhere"), {}, "--from 'nowhere': no such step; one of: tokenize blend"),
        (("--from",), {}, "--from: a value must follow"),
        (("--array-tasks", "0"), {}, "--array-tasks '0'"),
        (("--fast",), {}, "--fast: no such option"),
        ((), {"IDM_RECIPE": "none.yaml"}, "none.yaml: no such recipe"),
        ((), {"EXPORT": "slurm"}, "slurm: is there already"),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_submitted(
    arguments: tuple[str, ...], environment: dict[str, str], complaint: str
) -> None:
    done = _dry_run(*arguments, **environment)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {complaint}") and done.stderr.count("\n") == 1
    assert not done.stdout


@pytest.fixture(scope="module")
def base_model(tmp_path_factory: pytest.TempPathFactory, tiny_blend: Path) -> Path:
    """A small Llama as a Hugging Face folder, with random weights and the tokenizer of the tiny corpora."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("base") / "hf"
    model = tiny_recipe("base", folder, tiny_blend).model
    scaling = {
        "rope_type": "llama3",
        "rope_theta": model.rope_theta,
        "factor": model.rope_scaling_factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = LlamaConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=model.ffn_hidden_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_attention_heads,
        num_key_value_heads=model.num_key_value_heads,
        head_dim=model.head_size,
        max_position_embeddings=model.max_position_embeddings,
        rope_parameters=scaling,
        rms_norm_eps=model.rms_norm_epsilon,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    for path in (tiny_blend / "tokenizer").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.mark.slurm
def test_the_chain_leads_from_corpora_to_a_folder(
    cluster: Cluster, tmp_path: Path, tiny_blend: Path, base_model: Path
) -> None:
    """In two array tasks for the data and on one node for training, with the shipped scripts and the real programs."""
    root = tmp_path / "checkout"
    blend = {
        "tokenized": "data/tokenized",
        "tokenizer": str(tiny_blend / "tokenizer"),
        "output": "data/blend",
        "total_tokens": 100_000,
        "shard_tokens": 50_000,
        "validation_tokens": 2_000,
        # Too little of starcoder to have validation documents.
        "weights": {"slimpajama": 0.5, "proof_pile_2": 0.25, "wudao": 0.25, "starcoder": 0.0},
    }
    checkout = make_checkout(
        cluster,
        root,
        CORPORA=str(tiny_blend.parent / "corpora"),
        TOKENIZER=str(tiny_blend / "tokenizer"),
        BASE_MODEL=str(base_model),
        **{f"{name}_RUN": f"runs/{name.lower()}" for name in ("BASE", "POLICY")},
        EXPORT="runs/hf",
        **{f"{name}_RECIPE": f"{name.lower()}.yaml" for name in ("BLEND", "IDM", "POLICY")},
        CPU_JOB_OPTIONS="--cpus-per-task=1",
        TRAINING_JOB_OPTIONS=" ".join(SMALL),
    )
    (root / "blend.yaml").write_text(json.dumps(blend))
    for stage, start in (("idm", "base"), ("policy", "idm")):
        recipe = tiny_recipe(stage, Path(f"runs/{stage}"), Path("data/blend"), Path(f"runs/{start}"))
        (root / f"{stage}.yaml").write_text(dump_recipe(recipe))
    said = cluster.run("slurm/submit_all.sh", "--array-tasks", "2", cwd=root, **checkout.environment)
    jobs = dict(re.findall(r"^(\w+): job (\d+)", said, flags=re.MULTILINE))
    assert list(jobs) == ["tokenize", "blend", "convert_base", "pretrain_idm", "pretrain_policy", "export"]
    assert f"squeue --jobs={','.join(jobs.values())}" in said
    assert "pretrain.status runs/policy" in said
    cluster.wait_for_end(jobs["export"], seconds=900)
    logs = "".join(checkout.log(job) for job in jobs.values())
    assert {cluster.facts(job)["JobState"] for job in jobs.values()} == {"COMPLETED"}, logs
    assert (root / "runs/hf/config.json").is_file()


@pytest.mark.slurm
def test_what_waits_for_a_failed_job_is_cancelled(cluster: Cluster, tmp_path: Path) -> None:
    """A base that is not there fails convert_base for good; nothing of the chain is left waiting."""
    checkout = make_checkout(
        cluster,
        tmp_path / "checkout",
        PYTHON=str(_failing(tmp_path)),
        CPU_JOB_OPTIONS="--cpus-per-task=1",
        TRAINING_JOB_OPTIONS=" ".join(SMALL),
    )
    said = cluster.run(
        "slurm/submit_all.sh", "--from", "convert_base", cwd=checkout.root, **checkout.environment
    )
    jobs = dict(re.findall(r"^(\w+): job (\d+)", said, flags=re.MULTILINE))
    states = [facts["JobState"] for facts in cluster.wait_for_end(*jobs.values())]
    assert states == ["FAILED", "CANCELLED", "CANCELLED", "CANCELLED"]


def _failing(folder: Path) -> Path:
    script = folder / "python"
    script.write_text("#!/usr/bin/env bash\nexit 2\n")
    script.chmod(0o755)
    return script
