"""What each linear layer of a diffusion model is for, read off its name and its place."""

from __future__ import annotations

from torch import nn

ATTENTION_LEAVES = {
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out": "o",
    "to_qkv": "qkv",
    "to_kv": "kv",
    "add_q_proj": "add_q",
    "add_k_proj": "add_k",
    "add_v_proj": "add_v",
    "to_add_out": "add_o",
    "to_added_qkv": "add_qkv",
    "to_added_kv": "add_kv",
}
FEED_FORWARD = ("ff", "ffn", "mlp", "feed_forward", "img_mlp")
FEED_FORWARD_CONTEXT = ("ff_context", "ffn_context", "txt_mlp", "mlp_context")
FUSED = {"proj_mlp": "ffn.up", "proj_out": "ffn.down"}  # the parallel MLP of single-stream blocks
MODULATION = ("norm", "ada", "mod", "scale_shift", "img_mod", "txt_mod")
TIME = ("time", "adaln", "guidance", "ofs_")
TEXT = ("text", "context", "caption", "txt")
IMAGE = ("image_embed", "img_emb")
HEAD = ("proj_out", "norm_out", "final_layer", "head")

RESNET = {"conv1": "conv1", "conv2": "conv2", "conv_shortcut": "shortcut", "time_emb_proj": "time"}
GATED = {"conv_inverted": "ffn.up", "conv_point": "ffn.down"}  # the gated convolutions of a decoder's blocks
UNET_OUTSIDE = {"conv_in": "embedding", "conv_out": "head", "add_embedding": "text_conditioning"}


def is_attention(module: nn.Module) -> bool:
    """Whether the module is an attention: it makes queries, alone or fused with keys and values."""
    return isinstance(getattr(module, "to_q", None) or getattr(module, "to_qkv", None), nn.Module)


def attention_role(path: str, kind: str) -> str | None:
    """Role of a linear at `path` (dotted, from the attention module) of an attention of that kind."""
    leaf = ATTENTION_LEAVES.get(path.split(".")[0])
    return None if leaf is None else f"{kind}_attn.{leaf}"


def block_role(path: str, linear: nn.Linear) -> str:
    """Role of a linear outside attention; `path` is its dotted place inside the block."""
    parts = path.split(".")
    for names, role in ((FEED_FORWARD_CONTEXT, "ffn_context"), (FEED_FORWARD, "ffn")):
        if any(part in names for part in parts):
            # the projection back to the model's width narrows; where all widths are equal its place tells
            last = linear.in_features == linear.out_features and parts[-1] in ("2", "linear_2", "fc2", "w2")
            return f"{role}.down" if linear.out_features < linear.in_features or last else f"{role}.up"
    if parts[0] in FUSED:
        return FUSED[parts[0]]
    if "timestep_embedder" in parts:  # DiT has the embedding of time in every block
        return "time_conditioning"
    if any(part.startswith(MODULATION) for part in parts):
        return "modulation"
    return "other"


def convolution_role(block: str, path: str) -> str | None:
    """Role of a layer of a unit of a U-Net or a decoder, which is named `block`, or None where that is an attention or
    a feed-forward of linears.

    "resnet.conv1", "resnet.conv2", "resnet.shortcut", "resnet.time", "downsample" or "upsample"; in a decoder also
    "ffn.up" and "ffn.down".
    """
    parts = path.split(".")
    if parts[0] in RESNET:
        return f"resnet.{RESNET[parts[0]]}"
    if parts[0] == "conv" and block.startswith(
        "decoder."
    ):  # all else that has one there changes the resolution
        return "upsample"
    gated = next((GATED[part] for part in parts if part in GATED), None)
    return gated or next((kind for kind in ("downsample", "upsample") if f".{kind}rs." in f".{block}."), None)


def unet_outside_role(path: str) -> str:
    """Role of a layer of a U-Net or an autoencoder that is in no unit; what leads into transformer blocks and out of
    them has its own, and so has the encoder."""
    parts = path.removeprefix("decoder.").split(".")
    if parts[0] == "encoder":
        return "encoder"
    if parts[0] in UNET_OUTSIDE:
        return UNET_OUTSIDE[parts[0]]
    for name in ("proj_in", "proj_out"):
        if name in parts:
            return f"transformer.{name.removeprefix('proj_')}"
    return outside_role(path)


def outside_role(path: str) -> str:
    """Role of a linear that is in no block; the deepest part of the name that tells something decides."""
    if "refiner" in path:
        return "refiner"
    for part in reversed(path.split(".")):
        # one embedder may hold both time and text ("time_text_embed"): only its parts can tell
        hints = [
            role
            for names, role in ((TIME, "time_conditioning"), (TEXT, "text_conditioning"))
            if any(name in part for name in names)
        ]
        if len(hints) == 1:
            return hints[0]
        if any(name in part for name in IMAGE):
            return "image_conditioning"
        if part.startswith(HEAD):
            return "head"
    return (
        "embedding"
        if path.split(".")[0]
        in ("x_embedder", "proj_in", "patch_embed", "patch_embedding", "pos_embed", "img_in")
        else "other"
    )
