"""NEFTune: noise of the right size in training passes alone, and equal after a resume."""

import torch
from small_training import CONFIG as SHAPE
from small_training import OPTIM, STAGE, STEPS, fit, net

from callbacks.noise import EmbeddingNoise
from llm.model.config import GPTConfig
from llm.stages.step_module import StageContext, StepModule

IDS = torch.arange(16).view(2, 8)


def module() -> StepModule:
    return StepModule(net(), OPTIM, STAGE, StageContext("sft", None, torch.ones(70), STEPS, 8))


def test_noise_is_uniform_within_its_bound():
    noise, rows = EmbeddingNoise(5.0, 1), torch.zeros(40, 8, 16)
    noise.generator = torch.Generator().manual_seed(0)
    bound = 5.0 / (8 * 16) ** 0.5
    found = noise.add_noise(None, None, rows)
    assert 0.99 * bound < found.max() <= bound and -bound <= found.min() < -0.99 * bound
    assert abs(found.mean()) < 0.02 * bound and abs(found.std() / (bound / 3**0.5) - 1) < 0.02
    with torch.no_grad():
        assert noise.add_noise(None, None, rows) is rows


def test_copy_candidates_get_no_noise_and_take_none_from_the_tokens():
    copies = {"arch": "modern", "copy_candidate": True, "copy_bos": 69}
    model = net(config=GPTConfig(2, 1, 1, 16, 16, 8, 70, **copies))
    seen, noise = [], EmbeddingNoise(5.0, 1)
    noise.generator = torch.Generator().manual_seed(0)
    table = model.transformer.wte
    table.register_forward_hook(lambda _, ids, rows: seen.append(noise.add_noise(table, ids, rows) - rows))
    model(IDS)
    assert [rows.shape for rows in seen] == [(2, 8, 16)]
    assert 0.97 * 5.0 / (8 * 16) ** 0.5 < seen[0].abs().max() <= 5.0 / (8 * 16) ** 0.5


def test_noise_changes_training_and_resumes_exactly(tmp_path):
    plain, _ = fit(tmp_path / "plain", module=module())
    whole, _ = fit(tmp_path / "whole", module=module(), extra=[EmbeddingNoise(5.0, 1)])
    path = tmp_path / "whole" / "checkpoints" / "step_000004.ckpt"
    rest, _ = fit(tmp_path / "rest", ckpt=path, module=module(), extra=[EmbeddingNoise(5.0, 1)])
    for name, weight in whole.net.state_dict().items():
        assert torch.equal(rest.net.state_dict()[name], weight), name
    assert not torch.equal(plain.net.transformer.wte.weight, whole.net.transformer.wte.weight)
    with torch.no_grad():
        assert torch.equal(whole.net(IDS), whole.net(IDS)) and SHAPE.seq_len == IDS.size(1)
