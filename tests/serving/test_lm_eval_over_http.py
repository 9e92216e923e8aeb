"""Scores of lm-eval over HTTP (`local-completions`) and in memory are the same."""

import json

import pytest

pytest.importorskip("transformers")
pytest.importorskip("lm_eval")
pytest.importorskip("tenacity")  # of lm-eval's client

import lm_eval  # noqa: E402
from judging import ROWS, write_bundle, write_tasks  # noqa: E402
from serving_run import ServerProcess  # noqa: E402

from llm.checkpoint.model_folder import save_model_folder  # noqa: E402
from llm.eval.lm_eval_harness import HarnessModel  # noqa: E402
from llm.serving.chat import load_chat_model  # noqa: E402

pytest_plugins = ["judging"]  # its fixtures


@pytest.mark.slow
@pytest.mark.usefixtures("offline")
def test_local_completions_scores_as_the_model_in_memory_does(net, tokenizer, tmp_path):
    write_bundle(tmp_path / "bundle", {"mine": ROWS[:12]})
    write_tasks(tmp_path / "tasks", tmp_path / "bundle", ["mine"])
    stage = tmp_path / "runs" / "tiny" / "sft"
    save_model_folder(stage / "model", net, tokenizer)
    (stage / "run.json").write_text(json.dumps({"stage": "sft", "status": "finished", "parent": None, "metrics": {}}))

    def evaluate(model, **more):
        manager = lm_eval.tasks.TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False)
        tasks = ["mine_choice", "mine_answer", "mine_text"]
        return lm_eval.simple_evaluate(model=model, tasks=tasks, task_manager=manager, bootstrap_iters=0, **more)

    in_memory = evaluate(HarnessModel(load_chat_model(stage, compute="fp32").engine, 8))
    with ServerProcess(tmp_path / "runs", "ui=api", "api.log=none", "compute=fp32") as server:
        arguments = {
            "model": "tiny/sft",
            "base_url": f"{server.url}/v1/completions",
            "tokenizer_backend": "huggingface",
            "tokenizer": str(stage / "model"),
            "max_length": net.config.seq_len,
            "num_concurrent": 4,
        }
        over_http = evaluate("local-completions", model_args=arguments)
    for task, scores in in_memory["results"].items():
        for metric, score in scores.items():
            if isinstance(score, float):
                assert over_http["results"][task][metric] == pytest.approx(score, rel=1e-4), (task, metric)
    for ours, theirs in zip(*(run["samples"]["mine_choice"] for run in (in_memory, over_http)), strict=True):
        for one, other in zip(ours["filtered_resps"], theirs["filtered_resps"], strict=True):
            assert float(other[0]) == pytest.approx(float(one[0]), rel=1e-4) and other[1] == one[1]
