"""Each router chooses the experts, and weights them, as the reference's own module does."""

import pytest
import torch
from lmserve.model.errors import CheckpointError
from lmserve.model.router import Router
from lmserve.model.torch_experts import TorchRouter
from transformers import AutoConfig
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeTopkRouter
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssTopKRouter
from transformers.models.phimoe.modeling_phimoe import sparsemixer
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

HIDDEN, EXPERTS = 24, 12


def filled(module, correction=False):
    torch.manual_seed(3)
    for parameter in module.parameters():
        parameter.data.normal_()
    if correction:
        module.e_score_correction_bias.normal_(std=0.3)
    return module


def qwen(normalized):
    config = AutoConfig.for_model(
        "qwen3_moe", hidden_size=HIDDEN, num_experts=EXPERTS, num_experts_per_tok=4, norm_topk_prob=normalized
    )
    return filled(Qwen3MoeTopKRouter(config)), Router("softmax", 4, normalized=normalized)


def gpt_oss():
    config = AutoConfig.for_model(
        "gpt_oss", hidden_size=HIDDEN, num_local_experts=EXPERTS, num_experts_per_tok=4, num_hidden_layers=1
    )
    return filled(GptOssTopKRouter(config)), Router("softmax_of_chosen", 4)


def glm(groups, normalized):
    config = AutoConfig.for_model(
        "glm4_moe",
        hidden_size=HIDDEN,
        num_attention_heads=4,
        n_routed_experts=EXPERTS,
        num_experts_per_tok=4,
        n_group=groups,
        topk_group=(groups + 1) // 2,
        norm_topk_prob=normalized,
        routed_scaling_factor=1.7,
    )
    router = Router(
        "corrected_sigmoid", 4, factor=1.7, normalized=normalized, groups=groups, top_groups=(groups + 1) // 2
    )
    return filled(Glm4MoeTopkRouter(config), correction=True), router


def deepseek(groups):
    config = AutoConfig.for_model(
        "deepseek_v2",
        hidden_size=HIDDEN,
        num_attention_heads=4,
        n_routed_experts=EXPERTS,
        num_experts_per_tok=4,
        topk_method="group_limited_greedy" if groups > 1 else "greedy",
        n_group=groups,
        topk_group=2 if groups > 1 else 1,
        routed_scaling_factor=16.0,
    )
    return filled(DeepseekV2TopkRouter(config)), Router(
        "grouped_softmax", 4, factor=16.0, groups=groups, top_groups=2 if groups > 1 else 1
    )


@pytest.mark.parametrize(
    ("module", "router"),
    [qwen(True), qwen(False), gpt_oss(), glm(1, True), glm(4, True), glm(6, False), deepseek(1), deepseek(3)],
)
def test_routers_that_are_modules(module, router):
    x = torch.randn(50, HIDDEN, generator=torch.Generator().manual_seed(1))
    bias = getattr(module, "bias", None)
    ours = TorchRouter(
        module.weight, bias, correction=getattr(module, "e_score_correction_bias", None), router=router.check(EXPERTS)
    )
    assert_same(ours.route(x), module(x)[2], module(x)[1])


@pytest.mark.parametrize("jitter", [0.01, 0.3])
def test_the_sparse_mixer(jitter):
    logits = torch.randn(50, EXPERTS, generator=torch.Generator().manual_seed(2))
    ours = TorchRouter(torch.eye(EXPERTS), router=Router("sparse_mixer", 2, jitter=jitter))
    weights, chosen = sparsemixer(logits, jitter_eps=jitter, training=False)
    assert_same(ours.route(logits), chosen, weights)


def test_numbers_of_the_experts():
    logits = torch.tensor([[0.0, 2.0, 1.0]])
    scale = torch.tensor([3.0, 5.0, 7.0])
    ours = TorchRouter(torch.eye(3), scale=scale, router=Router("sigmoid", 2, factor=0.5))
    expected = torch.tensor([[1.0, 2.0, 2.5 * torch.tensor(2.0).sigmoid(), 3.5 * torch.tensor(1.0).sigmoid()]])
    torch.testing.assert_close(ours.route(logits), expected)


def assert_same(routing, chosen, weights):
    """Whatever the order of a row's experts."""
    found, own = routing.chunk(2, dim=-1)
    mine = torch.zeros(len(routing), EXPERTS).scatter(1, found.long(), own)
    theirs = torch.zeros(len(routing), EXPERTS).scatter(1, chosen, weights.float())
    assert (mine > 0).any()
    torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("router", [Router("softmax", 13), Router("softmax", 0), Router("softmax", 5, groups=3)])
def test_choices_that_cannot_be_made_are_refused(router):
    with pytest.raises(CheckpointError, match=r"each token is to go to \d+ experts"):
        router.check(EXPERTS)
