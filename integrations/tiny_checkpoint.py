"""An untrained FLUX.1-Fill of a few megabytes in the standard diffusers folder format, built offline.

For trying the whole path, from photos to a picture, without a 24 GB download: every component has the class,
the configuration keys and the wiring of the real one. The autoencoder is set by hand (a 4x4 cell's mean
colour, read back bilinearly), so that known parts of a picture are recognisable; everything else is random,
so a filled hole is noise.
"""

from __future__ import annotations

import os
import shutil
import string
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, FluxTransformer2DModel
    from transformers import CLIPTextModel, PreTrainedTokenizerFast, T5EncoderModel

TEXT_TOKENS = 32
TEXT_WIDTH = 64
LATENT_CHANNELS = 4
CELL = 4  # pixels per latent, each way; 2x2 latents are one token
PEG = 64.0  # far above any activation, see _through_norm
WORDS = (
    "a an the of in on at with and to is photo picture image cat dog bird cup mug coffee table chair bottle "
    "ball toy car flower tree person face hat shoe bag book clock vase red green blue yellow black white brown "
    "orange purple pink grey striped spotted small large old new left right sitting standing lying wooden "
    "metal glass background"
)


def build(folder: str | os.PathLike[str], seed: int = 0) -> Path:
    """Write the checkpoint for FluxFillPipeline.from_pretrained (safetensors, bfloat16, about 5 MB).

    Args:
        folder: where to write; replaced as a whole if it is there, and never left half written.
        seed: of the random weights; the same seed gives the same weights.

    Returns:
        The folder.

    Raises:
        ValueError: `folder` exists and is not a diffusers checkpoint. OSError: it cannot be written.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxFillPipeline

    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()) and not (folder / "model_index.json").is_file():
        raise ValueError(f"folder: {folder} exists and is not a diffusers checkpoint, so it is not replaced")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipe = FluxFillPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0, max_shift=1.15),
            vae=_autoencoder(),
            text_encoder=_clip(),
            tokenizer=_tokenizer(),  # pyright: ignore[reportArgumentType]
            text_encoder_2=_t5(),
            tokenizer_2=_tokenizer(),  # pyright: ignore[reportArgumentType]
            transformer=_transformer(),
        )
        for part in (pipe.vae, pipe.text_encoder, pipe.text_encoder_2, pipe.transformer):
            part.bfloat16()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        fresh = Path(scratch) / "fresh"
        pipe.save_pretrained(fresh, safe_serialization=True)
        if folder.exists():
            shutil.move(folder, Path(scratch) / "stale")
        os.replace(fresh, folder)
    return folder


def _transformer() -> FluxTransformer2DModel:
    from diffusers import FluxTransformer2DModel

    packed = 4 * LATENT_CHANNELS
    return FluxTransformer2DModel(
        in_channels=packed + packed + 4 * CELL * CELL,  # noisy latents, masked photo's latents, mask pixels
        out_channels=packed,
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=TEXT_WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(4, 14, 14),
    )


def _clip() -> CLIPTextModel:
    from transformers import CLIPTextConfig, CLIPTextModel

    ids = _special_ids()
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(_vocabulary()), hidden_size=TEXT_WIDTH, intermediate_size=2 * TEXT_WIDTH,
            num_hidden_layers=1, num_attention_heads=4, max_position_embeddings=TEXT_TOKENS,
            bos_token_id=ids["<s>"], eos_token_id=ids["</s>"], pad_token_id=ids["<pad>"],
        )
    )  # fmt: skip


def _t5() -> T5EncoderModel:
    from transformers import T5Config, T5EncoderModel

    ids = _special_ids()
    return T5EncoderModel(
        T5Config(
            vocab_size=len(_vocabulary()), d_model=TEXT_WIDTH, d_kv=16, d_ff=2 * TEXT_WIDTH,
            num_layers=1, num_heads=4, feed_forward_proj="gated-gelu",
            pad_token_id=ids["<pad>"], eos_token_id=ids["</s>"],
        )
    )  # fmt: skip


def _vocabulary() -> list[str]:
    letters = string.ascii_lowercase + string.digits + string.punctuation
    return ["<pad>", "</s>", "<s>", "<unk>", *WORDS.split(), *letters, *(f"##{c}" for c in letters)]


def _special_ids() -> dict[str, int]:
    return {token: i for i, token in enumerate(_vocabulary()[:4])}


def _tokenizer() -> PreTrainedTokenizerFast:
    """Words, and letters where a word is unknown."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(_vocabulary()))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single="<s> $A </s>", special_tokens=[("<s>", vocabulary["<s>"]), ("</s>", vocabulary["</s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=TEXT_TOKENS,
        bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>",
    )  # fmt: skip


def _autoencoder() -> AutoencoderKL:
    """Latents are the mean red, green, blue and grey of 4x4 cells, times 2; decoding interpolates them.

    Convolutions of an AutoencoderKL can do that exactly, once its residual branches are silent; the two
    normalisations and activations in front of the last layers are led around (_through_norm).
    """
    from diffusers import AutoencoderKL

    blocks: dict[str, Any] = {  # annotated as tuples of one in diffusers
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "block_out_channels": (16, 16, 32),
    }
    vae = AutoencoderKL(
        **blocks,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=1,
        scaling_factor=2.0,
        shift_factor=0.0,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    encoder: Any = vae.encoder
    decoder: Any = vae.decoder
    for name, parameter in vae.named_parameters():
        if ".conv2." in name or ".to_out." in name:  # the ends of the residual branches
            nn.init.zeros_(parameter)
    same, rgb = _at_centre(1), torch.eye(3)
    mean_of_2x2 = torch.zeros(3, 3)
    mean_of_2x2[:2, :2] = 1 / 4  # the stride-2 convolution pads right and below only
    tent = torch.tensor([1.0, 2.0, 1.0])
    bilinear = tent[:, None] * tent / 16  # on a picture enlarged by repetition
    _set(encoder.conv_in, rgb, same)
    for block in encoder.down_blocks[:2]:
        _set(block.downsamplers[0].conv, rgb, mean_of_2x2)
    _set(encoder.down_blocks[2].resnets[0].conv_shortcut, *_signed(rgb))
    to_latents = torch.cat([rgb, torch.full((1, 3), 1 / 3)])
    _through_norm(encoder.conv_norm_out, encoder.conv_out, to_latents)
    with torch.no_grad():
        encoder.conv_out.bias[LATENT_CHANNELS:] = -12.0  # log variance
    _set(decoder.conv_in, torch.eye(3, LATENT_CHANNELS), same)
    _set(decoder.up_blocks[0].upsamplers[0].conv, rgb, bilinear)
    _set(decoder.up_blocks[1].resnets[0].conv_shortcut, rgb, _at_centre(1, 1))
    _set(decoder.up_blocks[1].upsamplers[0].conv, *_signed(rgb, bilinear))
    _through_norm(decoder.conv_norm_out, decoder.conv_out, rgb)
    return vae


def _at_centre(value: float, size: int = 3) -> Tensor:
    kernel = torch.zeros(size, size)
    kernel[size // 2, size // 2] = value
    return kernel


def _set(conv: nn.Conv2d, channels: Tensor, kernel: Tensor, bias: Tensor | None = None) -> None:
    """A convolution: `channels` (out, in) times `kernel` (height, width); 0 on all other channels."""
    with torch.no_grad():
        conv.weight.zero_()
        conv.weight[: channels.shape[0], : channels.shape[1]] = channels[:, :, None, None] * kernel
        assert conv.bias is not None
        conv.bias.zero_()
        if bias is not None:
            conv.bias[: len(bias)] = bias


def _signed(channels: Tensor, kernel: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Each output twice, with either sign, then two pegs: the layer in front of `_through_norm`."""
    n = channels.shape[0]
    weight = torch.cat([channels, -channels, torch.zeros(2, channels.shape[1])])
    bias = torch.tensor([0.0] * (2 * n) + [PEG, -PEG])
    return weight, _at_centre(1, 1) if kernel is None else kernel, bias


def _through_norm(norm: nn.GroupNorm, conv: nn.Conv2d, channels: Tensor) -> None:
    """`channels` (out, in) on the signed input x, -x, pegs, as if there were no norm and no SiLU between.

    The signs make the mean 0, the pegs alone make the variance, which the norm's weight undoes; and
    silu(x) - silu(-x) = x.
    """
    n = channels.shape[1]
    with torch.no_grad():
        norm.weight.fill_(PEG * (2 / norm.num_channels) ** 0.5)
        norm.bias.zero_()
    _set(conv, torch.cat([channels, -channels], dim=1)[:, : 2 * n], _at_centre(1))
