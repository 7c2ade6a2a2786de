"""Text raters: the text tokens whose attention says which image tokens a question is about."""

import torch


def text_raters(
    image: torch.Tensor,
    text: torch.Tensor,
    image_mask: torch.Tensor | None = None,
    text_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """The raters of SparseVLM (Zhang et al. 2024, arXiv 2410.04417): text tokens whose softmax of image-text products,
    over the text tokens and averaged over the image tokens, is above the mean of the row's text tokens.

    Args:
        image: embeddings of image tokens [B, V, D].
        text: embeddings of text tokens [B, T, D].
        image_mask, text_mask: bool [B, V] and [B, T], True for the tokens that a row has; all of them where None.

    Returns:
        bool [B, T]. Each row that has text has at least one rater: the highest is one where none is above the mean.

    Raises:
        ValueError: shapes do not fit, or a row has no image tokens or no text tokens.
    """
    B, V, D = image.shape
    T = text.shape[1]
    image_mask = torch.ones(B, V, dtype=torch.bool, device=image.device) if image_mask is None else image_mask
    text_mask = torch.ones(B, T, dtype=torch.bool, device=text.device) if text_mask is None else text_mask
    for name, got, expected in (
        ("text", text.shape, (B, T, D)),
        ("image_mask", image_mask.shape, (B, V)),
        ("text_mask", text_mask.shape, (B, T)),
    ):
        if tuple(got) != expected:
            raise ValueError(f"{name} must be {list(expected)}, got {list(got)}")
    for name, mask in (("image", image_mask), ("text", text_mask)):
        if not bool(mask.any(1).all()):
            raise ValueError(f"every row needs {name} tokens, got {mask.sum(1).tolist()} of them")
    products = (image.float() @ text.float().mT).masked_fill(~text_mask[:, None], -torch.inf)
    weights = products.softmax(-1) * image_mask[:, :, None]
    ratings = weights.sum(1) / image_mask.sum(1, keepdim=True)  # [B, T], of sum 1
    above = (ratings > 1 / text_mask.sum(1, keepdim=True)) & text_mask
    return above.scatter(1, ratings.argmax(1, keepdim=True), True)
