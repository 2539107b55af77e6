"""Classes that the adapter was not written for: nothing but what is derived."""

import diffusers
import pytest
import torch
from support import tiny
from support.tiny import randn

from attar.calibration.catch import catch_block_calls
from attar.errors import AttarError
from attar.models.adapter import ModelAdapter
from attar.models.attention_mass import attention_mass
from attar.models.block import run_block


def sd3():
    model = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pooled_projection_dim=32,
        pos_embed_max_size=8,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    return model, dict(
        hidden_states=randn(2, 4, 8, 8),
        encoder_hidden_states=randn(2, 5, 32),
        pooled_projections=randn(2, 32),
        timestep=torch.tensor([5, 5]),
    )


def auraflow():
    model = diffusers.AuraFlowTransformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_mmdit_layers=2,
        num_single_dit_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pos_embed_max_size=16,
    )
    return model, dict(
        hidden_states=randn(2, 4, 8, 8),
        encoder_hidden_states=randn(2, 5, 32),
        timestep=torch.tensor([0.5, 0.5]),
    )


def chroma():
    model = diffusers.ChromaTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=[4, 4, 8],
        approximator_num_channels=8,
        approximator_hidden_dim=16,
        approximator_layers=1,
    )
    rows, columns = torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij")
    return model, dict(
        hidden_states=randn(2, 16, 4),
        encoder_hidden_states=randn(2, 5, 32),
        img_ids=torch.stack([torch.zeros(16), rows.flatten(), columns.flatten()], dim=1),
        txt_ids=torch.zeros(5, 3),
        timestep=torch.tensor([1.0, 1.0]),
    )


def mochi():
    model = diffusers.MochiTransformer3DModel(
        patch_size=2,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=3,
        pooled_projection_dim=16,
        in_channels=4,
        out_channels=None,
        text_embed_dim=16,
        time_embed_dim=4,
        activation_fn="swiglu",
        max_sequence_length=16,
    )
    return model, dict(
        hidden_states=randn(1, 4, 2, 8, 8),
        encoder_hidden_states=randn(1, 5, 16),
        timestep=torch.tensor([5]),
        encoder_attention_mask=torch.ones(1, 5, dtype=torch.bool),
    )


def allegro():
    model = diffusers.AllegroTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        cross_attention_dim=24,
        sample_width=8,
        sample_height=8,
        sample_frames=8,
        caption_channels=24,
    )
    return model, dict(
        hidden_states=randn(1, 4, 2, 8, 8),
        encoder_hidden_states=randn(1, 5, 24),
        timestep=torch.tensor([5]),
        image_rotary_emb=None,
    )


def wan_image_to_video():
    model = tiny.wan(image_dim=8, added_kv_proj_dim=32)
    call = tiny.wan_call(model, batch=2)
    call["encoder_hidden_states"] = randn(
        2, 512, 32
    )  # the class takes exactly 512 text tokens beside an image
    return model, {**call, "encoder_hidden_states_image": randn(2, 7, 8)}


# builder -> (segments, kinds of attention in the first block)
CASES = {
    sd3: ([3], ["joint", "self"]),
    auraflow: ([2, 2], ["joint"]),  # the streams become one in between
    chroma: ([1, 1, 1, 1], ["joint"]),  # each block has its own modulation
    mochi: ([3], ["joint"]),
    allegro: ([2], ["self", "cross"]),
    wan_image_to_video: ([3], ["self", "cross"]),
}


@pytest.fixture(params=CASES, ids=lambda build: build.__name__)
def case(request):
    torch.manual_seed(0)
    model, call = request.param()
    return request.param, model.eval(), call


def test_chained_blocks_reproduce_the_model(case):
    build, model, call = case
    adapter = ModelAdapter.of(model)
    adapter.observe(call)
    segments, kinds = CASES[build]
    assert [len(s) for s in adapter.segments] == segments
    assert [a.kind for a in adapter.attentions(adapter.blocks[0])] == kinds
    with torch.no_grad():
        for segment in adapter.segments:
            (state,) = catch_block_calls(model, adapter, segment[0].index, [call])
            for block in segment:
                (caught,) = catch_block_calls(model, adapter, block.index, [call])
                for stream in block.streams:
                    assert torch.equal(caught.streams[stream], state.streams[stream])
                state = state.with_streams(run_block(block.module, state, block.outputs))
    assert all(line.role != "other" for b in adapter.blocks for line in adapter.linears(b))


def test_mass_adds_up(case):
    _, model, call = case
    adapter = ModelAdapter.of(model)
    for index, block in enumerate(adapter.blocks):
        (caught,) = catch_block_calls(model, adapter, index, [call])
        with torch.no_grad(), attention_mass(adapter, block) as mass:
            run_block(block.module, caught, block.outputs)
        received = mass.per_stream()
        heads = next(a.module.heads for a in adapter.attentions(block))
        tokens = {name: value.shape[1] for name, value in received.items()}
        expected = heads * sum(tokens.values())
        if [a.kind for a in adapter.attentions(block)] == ["joint", "self"]:
            expected += heads * tokens["hidden_states"]  # the second attention is over the image alone
        total = sum(value.sum(1) for value in received.values())
        torch.testing.assert_close(total, torch.full_like(total, expected), rtol=1e-4, atol=0)


def test_attention_that_takes_samples_one_by_one_is_refused():
    torch.manual_seed(0)
    model, call = mochi()
    pair = {k: torch.cat([v, v]) for k, v in call.items()}
    adapter = ModelAdapter.of(model.eval())
    (caught,) = catch_block_calls(model, adapter, 0, [pair])
    with (
        torch.no_grad(),
        attention_mass(adapter, adapter.blocks[0]),
        pytest.raises(AttarError, match="not on the whole batch of 2"),
    ):
        run_block(adapter.blocks[0].module, caught, adapter.blocks[0].outputs)
