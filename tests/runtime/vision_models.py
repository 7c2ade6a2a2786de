"""Tiny random models that read images and videos as tokens, and inputs as their processors return them.

A prompt is rows of pieces, each a number of text tokens, "image" or "video": `[[4, "image", 3, "image", 6],
[2, "video", 5]]`. Rows are padded on the left. What a row holds depends on its pieces alone, not on its batch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import transformers as tf
from torch import nn

Row = Sequence[int | str]
Inputs = dict[str, torch.Tensor]

LAYERS, WIDTH, INNER, HEADS, GROUPS, HEAD, VOCABULARY = 6, 32, 48, 4, 2, 8, 160
PAD, IMAGE, VIDEO, BEGIN, END = 0, 151, 152, 153, 154
WINDOW = 12  # of attention with a sliding window, shorter than every prompt
PIECES = {"image": IMAGE, "video": VIDEO}

SIZES = {
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": GROUPS,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 512,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": None,
}
TOWER = {"hidden_size": WIDTH, "intermediate_size": INNER, "num_hidden_layers": 2, "num_attention_heads": 2}
SLIDING = {
    "head_dim": HEAD,
    "query_pre_attn_scalar": HEAD,
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention"] * (LAYERS // 2),
}
SOFTCAPS = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 10.0}
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}}
QWEN = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": BEGIN, "vision_end_token_id": END}
PATCHES = {"patch_size": 4, "temporal_patch_size": 2, "spatial_merge_size": 2}


@dataclass(frozen=True)
class Family:
    """How a family is built and given pictures.

    Attributes:
        config: makes the configuration.
        span: the tokens in place of which the i-th image or video of a row stands, wrappers included.
        pictures: the inputs besides tokens and their mask, of (model, rows, ids).
        first: the first layer before which tokens may be dropped.
        pieces: what its prompts may hold besides text.
    """

    config: Callable[[], tf.PreTrainedConfig]
    span: Callable[[str, int], list[int]]
    pictures: Callable[[nn.Module, Sequence[Row], torch.Tensor], Inputs]
    first: int = 1
    pieces: tuple[str, ...] = field(default=("image",))


def noise(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def items(row: Row, *kinds: str) -> list[tuple[int, str]]:
    """The images and videos of a row, each with its number among those of its kind."""
    found = []
    for piece in row:
        if piece in PIECES:
            found.append((sum(kind == piece for _, kind in found), piece))
    return [item for item in found if item[1] in kinds]


def seed_of(row: Row, index: int = 0, kind: str = "image") -> int:
    """A seed that depends on nothing but the row, and which of its images or videos it is for."""
    return 100 * sum(piece for piece in row if isinstance(piece, int)) + 10 * index + list(PIECES).index(kind)


def pixels(name: str, *shape: int) -> Callable[[nn.Module, Sequence[Row], torch.Tensor], Inputs]:
    """One tensor `name` of all images in their order, each of `shape`."""

    def made(model, rows, ids):
        found = [noise(seed_of(row, *item), *shape) for row in rows for item in items(row, "image")]
        return {name: torch.stack(found)} if found else {}

    return made


def tiles(model: nn.Module, rows: Sequence[Row], ids: torch.Tensor) -> Inputs:
    """Of images of two sizes in turn, 8 x 16 and 16 x 16, one tile of the whole and tiles of 8 x 8; of videos, frames."""
    images, sizes, videos = [], [], []
    for row in rows:
        for index, kind in items(row, "image", "video"):
            if kind == "video":
                videos.append(noise(seed_of(row, index, kind), 12, 3, 8, 8))
                continue
            count = 5 if index % 2 else 3
            images.append(
                torch.cat([noise(seed_of(row, index, kind), count, 3, 8, 8), torch.zeros(5 - count, 3, 8, 8)])
            )
            sizes.append([16, 16] if index % 2 else [8, 16])
    found = {"pixel_values_videos": torch.stack(videos)} if videos else {}
    return found | ({"pixel_values": torch.stack(images), "image_sizes": torch.tensor(sizes)} if images else {})


def tiled(kind: str, index: int) -> list[int]:
    """The whole in 4 tokens, then 2 or 4 rows of 4 tokens with one more at their end; 12 frames and one token more."""
    return [VIDEO] * 13 if kind == "video" else [IMAGE] * (4 + (20 if index % 2 else 10))


def grids(model: nn.Module, rows: Sequence[Row], ids: torch.Tensor) -> Inputs:
    """Patches in flat rows with grids of (time, height, width), and the kinds of tokens."""
    found = {"mm_token_type_ids": (ids == IMAGE) + 2 * (ids == VIDEO)}
    width = 3 * PATCHES["temporal_patch_size"] * PATCHES["patch_size"] ** 2
    for kind, name, grid in (("image", "pixel_values", image_grid), ("video", "pixel_values_videos", video_grid)):
        parts = [(row, item) for row in rows for item in items(row, kind)]
        if parts:
            sizes = [grid(index) for _, (index, _) in parts]
            patches = [
                noise(seed_of(row, *item), t * h * w, width)
                for (row, item), (t, h, w) in zip(parts, sizes, strict=True)
            ]
            found |= {name: torch.cat(patches), f"{kind}_grid_thw": torch.tensor(sizes)}
    return found


def image_grid(index: int) -> tuple[int, int, int]:
    return (1, 4, 6) if index % 2 else (1, 8, 6)


def video_grid(index: int) -> tuple[int, int, int]:
    return (2, 4, 6)


def wrapped(kind: str, index: int) -> list[int]:
    time, height, width = image_grid(index) if kind == "image" else video_grid(index)
    return [BEGIN, *[PIECES[kind]] * (time * height * width // 4), END]


def wrapped_by_frame(kind: str, index: int) -> list[int]:
    if kind == "image":
        return wrapped(kind, index)
    time, height, width = video_grid(index)
    return [BEGIN, *[VIDEO] * (height * width // 4), END] * time


def nested(model: nn.Module, rows: Sequence[Row], ids: torch.Tensor) -> Inputs:
    """Images by row, those of shorter rows filled up with zeros."""
    found = [[noise(seed_of(row, *item), 3, 32, 32) for item in items(row, "image")] for row in rows]
    most = max(map(len, found))
    if not most:
        return {}
    filled = [torch.stack([*images, *[torch.zeros(3, 32, 32)] * (most - len(images))]) for images in found]
    return {"pixel_values": torch.stack(filled)}


def with_kinds(marked: bool) -> Callable[[nn.Module, Sequence[Row], torch.Tensor], Inputs]:
    """`pixels` with token_type_ids: 1 at images if `marked`, else 0 everywhere, the whole prompt being a prefix."""

    def made(model, rows, ids):
        kinds = (ids == IMAGE).long() if marked else torch.zeros_like(ids)
        return pixels("pixel_values", 3, 16, 16)(model, rows, ids) | {"token_type_ids": kinds}

    return made


def sixteen(kind: str, index: int) -> list[int]:
    return [IMAGE] * 16


def bracketed(kind: str, index: int) -> list[int]:
    return [BEGIN, *sixteen(kind, index), END]


def llava() -> tf.LlavaConfig:
    tower = tf.CLIPVisionConfig(**TOWER, image_size=16, patch_size=4)
    return tf.LlavaConfig(text_config=tf.LlamaConfig(**SIZES), vision_config=tower, image_token_index=IMAGE)


def llava_next() -> tf.LlavaNextConfig:
    tower = tf.CLIPVisionConfig(**TOWER, image_size=8, patch_size=4)
    pinpoints = [[8, 16], [16, 8], [16, 16]]
    text = tf.MistralConfig(**SIZES, sliding_window=None)
    return tf.LlavaNextConfig(
        text_config=text, vision_config=tower, image_token_index=IMAGE, image_grid_pinpoints=pinpoints
    )


def llava_onevision() -> tf.LlavaOnevisionConfig:
    tower = tf.SiglipVisionConfig(**TOWER, image_size=8, patch_size=4, vision_use_head=False)
    pinpoints = [[8, 16], [16, 8], [16, 16]]
    return tf.LlavaOnevisionConfig(
        text_config=tf.Qwen2Config(**SIZES),
        vision_config=tower,
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=pinpoints,
        vision_feature_layer=-1,
        tie_word_embeddings=False,
    )


def qwen2_vl() -> tf.Qwen2VLConfig:
    tower = PATCHES | {"depth": 2, "embed_dim": WIDTH, "hidden_size": WIDTH, "num_heads": 2}
    return tf.Qwen2VLConfig(text_config=SIZES | MROPE, vision_config=tower, **QWEN)


def qwen2_5_vl() -> tf.Qwen2_5_VLConfig:
    tower = PATCHES | {"depth": 2, "hidden_size": WIDTH, "out_hidden_size": WIDTH, "num_heads": 2}
    tower |= {"intermediate_size": INNER, "window_size": 16, "fullatt_block_indexes": [1]}
    return tf.Qwen2_5_VLConfig(text_config=SIZES | MROPE, vision_config=tower, **QWEN)


def qwen3_vl() -> tf.Qwen3VLConfig:
    tower = PATCHES | {"depth": 3, "hidden_size": WIDTH, "out_hidden_size": WIDTH, "num_heads": 2}
    tower |= {"intermediate_size": INNER, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]}
    return tf.Qwen3VLConfig(text_config=SIZES | MROPE | {"head_dim": HEAD}, vision_config=tower, **QWEN)


def internvl() -> tf.InternVLConfig:
    tower = tf.InternVLVisionConfig(**TOWER, image_size=(32, 32), patch_size=(4, 4))
    return tf.InternVLConfig(
        text_config=tf.Qwen2Config(**SIZES), vision_config=tower, image_token_id=IMAGE, tie_word_embeddings=False
    )


def idefics3() -> tf.Idefics3Config:
    tower = TOWER | {"image_size": 32, "patch_size": 4}
    return tf.Idefics3Config(text_config=tf.LlamaConfig(**SIZES), vision_config=tower, image_token_id=IMAGE)


def smolvlm() -> tf.SmolVLMConfig:
    tower = TOWER | {"image_size": 32, "patch_size": 4}
    return tf.SmolVLMConfig(text_config=tf.LlamaConfig(**SIZES), vision_config=tower, image_token_id=IMAGE)


def paligemma(text: tf.PreTrainedConfig | None = None) -> tf.PaliGemmaConfig:
    tower = tf.SiglipVisionConfig(**TOWER, image_size=16, patch_size=4, vision_use_head=False, projection_dim=WIDTH)
    text = text or tf.GemmaConfig(**SIZES, head_dim=HEAD)
    return tf.PaliGemmaConfig(
        text_config=text, vision_config=tower, image_token_index=IMAGE, projection_dim=WIDTH, hidden_size=WIDTH
    )


def paligemma2() -> tf.PaliGemmaConfig:
    return paligemma(tf.Gemma2Config(**SIZES, **SLIDING, **SOFTCAPS))


def gemma3() -> tf.Gemma3Config:
    tower = tf.SiglipVisionConfig(**TOWER, image_size=16, patch_size=4, vision_use_head=False)
    return tf.Gemma3Config(
        text_config=tf.Gemma3TextConfig(**SIZES, **SLIDING),
        vision_config=tower,
        image_token_id=IMAGE,
        boi_token_id=BEGIN,
        eoi_token_id=END,
        mm_tokens_per_image=16,
    )


BOTH = ("image", "video")
FAMILIES = {
    "llava": Family(llava, sixteen, pixels("pixel_values", 3, 16, 16)),
    "llava_next": Family(llava_next, tiled, tiles),
    "llava_onevision": Family(llava_onevision, tiled, tiles, pieces=BOTH),
    "qwen2_vl": Family(qwen2_vl, wrapped, grids, pieces=BOTH),
    "qwen2_5_vl": Family(qwen2_5_vl, wrapped, grids, pieces=BOTH),
    "qwen3_vl": Family(qwen3_vl, wrapped_by_frame, grids, first=2, pieces=BOTH),
    "internvl": Family(internvl, bracketed, pixels("pixel_values", 3, 32, 32)),
    "idefics3": Family(idefics3, bracketed, nested),
    "smolvlm": Family(smolvlm, bracketed, nested),
    "paligemma": Family(paligemma, sixteen, with_kinds(marked=False)),
    "paligemma2": Family(paligemma2, sixteen, with_kinds(marked=False)),
    "gemma3": Family(gemma3, bracketed, with_kinds(marked=True)),
}


def build(name: str, seed: int = 0) -> nn.Module:
    """A model of `FAMILIES` with weights large enough that neither its attention nor its predictions are flat, and that
    never says an image token."""
    config = FAMILIES[name].config()
    torch.manual_seed(seed)
    model = tf.AutoModelForImageTextToText.from_config(config)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if parameter.dim() >= 2:
                gain = 1.5 if "q_proj" in path or "k_proj" in path else 1.0
                parameter.normal_(std=gain * parameter[0].numel() ** -0.5)
            elif path.endswith("bias"):
                parameter.normal_(std=0.05)
    model.generation_config.suppress_tokens = [IMAGE, VIDEO, BEGIN, END]
    return model.eval().requires_grad_(False)


def text(count: int, seed: int) -> list[int]:
    return torch.randint(3, 140, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def inputs(name: str, model: nn.Module, rows: Sequence[Row]) -> Inputs:
    """What the processor of a family returns for rows of pieces."""
    family, tokens = FAMILIES[name], []
    for row in rows:
        numbered = iter(items(row, *PIECES))
        spans = [
            text(piece, seed_of(row, place)) if isinstance(piece, int) else family.span(piece, next(numbered)[0])
            for place, piece in enumerate(row)
        ]
        tokens.append([token for span in spans for token in span])
    length = max(map(len, tokens))
    ids = torch.tensor([[PAD] * (length - len(row)) + row for row in tokens])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in tokens])
    return {"input_ids": ids, "attention_mask": mask} | family.pictures(model, rows, ids)
